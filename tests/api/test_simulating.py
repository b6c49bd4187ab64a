"""``simulate`` from Python: a script that is killed and run again, and what it tells meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gradualdiff as gd
from gradualdiff.embedded import sites
from tests import federations
from tests.numpy_learner import NumpyLearner
from tests.tiny_model import write_federation

ROOT = Path(__file__).parents[2]
# A user's script, but for the learners, which train no language model. It waits to be killed once
# round 2 is open. Nothing is on its standard output but what it prints itself.
SCRIPT = """
import sys
import gradualdiff as gd
from gradualdiff.embedded import sites
from tests.numpy_learner import NumpyLearner

sites.load_learners = lambda *_: {name: NumpyLearner(name) for name in "ab"}


def tell(event):
    if isinstance(event, gd.RunMoved) and event.round == 2 and "wait" in sys.argv:
        print("round 2", flush=True)
        sys.stdin.read()


print(gd.simulate(sys.argv[1], on_event=tell).summary.adapter_sha)
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A federation.toml of two sites and three rounds, over learners without a model."""
    monkeypatch.setattr(
        sites, "load_learners", lambda *_: {name: NumpyLearner(name) for name in "ab"}
    )
    return write_federation(tmp_path, tmp_path, rounds=3)


def test_a_script_that_is_killed_and_run_again_ends_in_the_same_adapter(path, tmp_path):
    """Kill -9 in the middle of round 2; the second start trains what is left."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(path)]
    with subprocess.Popen(
        [*command, "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    ) as killed:
        assert killed.stdout.readline() == "round 2\n"
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    run = gd.open_store(path).run("tiny")
    assert (run.summary.state, run.summary.rounds_closed) == ("round 2 open", 1)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    config = gd.load_config(path)
    undisturbed = federations.run(config, tmp_path / "undisturbed").adapter_sha
    assert done.stdout.split() == [undisturbed]


def test_events_tell_each_round_and_each_step_and_nothing_is_printed(path, capfd):
    """Typed, in order; a run that is there already is resumed, here to its end at once."""
    told = []
    run = gd.simulate(path, on_event=told.append)
    closed = [event.closed for event in told if isinstance(event, gd.RunMoved)]
    assert closed == sorted(closed)
    assert set(closed) == {-1, 0, 1, 2, 3}
    moved = [event for event in told if isinstance(event, gd.SiteMoved)]
    assert {(event.site, event.round) for event in moved if event.step.activity == "train"} == {
        (site, number) for site in "ab" for number in (1, 2, 3)
    }
    assert run.summary.state == "finished"
    assert run.summary.adapter_sha == gd.simulate(path).summary.adapter_sha
    assert capfd.readouterr() == ("", "")


def test_settings_may_differ_from_the_file(path, tmp_path):
    """Overrides are typed and on record; a path in them is relative to the folder that is named."""
    config = gd.load_config(path, ["run.rounds=1", "run.name=short"])
    run = gd.simulate(config, tmp_path)
    assert (run.name, run.summary.rounds) == ("short", 1)
    assert gd.open_store(path).run("short").history.federation.digest == config.digest
    with pytest.raises(gd.errors.ConfigError, match=r"run\.rounds"):
        gd.load_config(path, ["run.rounds=none"])


def test_what_is_on_record_decides_what_may_be_asked(path):
    """Stopped is an error of the tree; resuming and beginning can be insisted on."""
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(gd.errors.RunNotFoundError):
        gd.simulate(path, resume=True)
    with pytest.raises(gd.errors.InterruptedRunError):
        gd.simulate(path, should_stop=stop)
    assert gd.simulate(path).summary.state == "finished"
    with pytest.raises(gd.errors.RunExistsError):
        gd.simulate(path, resume=False)
    with pytest.raises(gd.errors.RunExistsError, match=r"lora\.rank"):
        gd.simulate(gd.load_config(path, ["lora.rank=2"]), path.parent)
