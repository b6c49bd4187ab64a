"""``gradualdiff demo`` started again: what can be resumed is never written over."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from gradualdiff.cli import demo
from gradualdiff.cli.main import app
from gradualdiff.embedded import sites as embedded_sites
from participant.heads import HEADS_FILE
from shared.config import load_federation
from shared.errors import ConfigError, InterruptedRunError, ModelError, RunExistsError
from shared.protocol.ledger import list_runs
from shared.protocol.records import FederationRecord, FinishedRecord
from tests.cli.test_init_and_check import gradualdiff
from tests.federation.test_starting import Stops
from tests.numpy_learner import NumpyLearner
from tests.steering import records, store_of


class Later(Stops):
    at = 2


class NoModel(NumpyLearner):
    def prepare(self, announced, report):
        raise ModelError("base.model: no such model")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """``gradualdiff demo --dir tmp/demo`` over numpy learners."""
    monkeypatch.setattr(embedded_sites, "make_pool", lambda *_: None)
    monkeypatch.setattr(demo, "_replies", lambda *_: [])
    monkeypatch.setattr(demo, "_configure_log", lambda folder: folder.mkdir(exist_ok=True))

    def start(*arguments, sites=NumpyLearner):
        monkeypatch.setattr(
            embedded_sites,
            "load_learners",
            lambda config, *_: {site: sites(site) for site in config.run.participants},
        )
        return CliRunner().invoke(
            app, ["demo", "--dir", str(tmp_path / "demo"), "--json", *arguments]
        )

    return start


@pytest.fixture
def own(tmp_path):
    """Options of one's own: a model, a text with groups, two participants, three rounds."""
    text, model = tmp_path / "mine.jsonl", tmp_path / "model"
    write_text(text, 24)
    model.mkdir()
    return [
        "--model",
        str(model),
        "--data",
        str(text),
        "--group",
        "who",
        "--participants",
        "2",
        "--rounds",
        "3",
    ]


def write_text(path, count):
    rows = [
        {"prompt": f"count {i}", "answer": f"it is {i}", "who": f"person {i % 6}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder):
    """Settings and data, by name; not what a site keeps of the run."""
    found = [*folder.rglob("*.toml"), *folder.rglob("*.jsonl")]
    kept = {path: path.read_bytes() for path in found if path.name != HEADS_FILE}
    return {str(path.relative_to(folder)): data for path, data in kept.items()}


def test_without_options_it_goes_on_with_all_that_it_had(started, own, tmp_path):
    """The hint says so, and the result is that of a demo that nothing stopped."""
    stopped = started(*own, sites=Later)
    assert isinstance(stopped.exception, InterruptedRunError)
    assert str(stopped.exception).endswith(
        f"Resume it with: gradualdiff demo --dir {tmp_path / 'demo'}"
    )
    before = files(tmp_path / "demo")
    done = started()
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "demo") == before
    told = json.loads(done.stdout)["run"]
    assert (told["run"], told["rounds_closed"], told["participants"]) == ("demo-1", 3, 2)
    again = started(*own)  # it is finished: the next one begins
    assert json.loads(again.stdout)["run"]["adapter_sha"] == told["adapter_sha"]
    assert json.loads(again.stdout)["run"]["run"] == "demo-2"


def test_the_same_options_again_are_no_other_options(started, own):
    """Whoever repeats the whole command resumes too."""
    assert isinstance(started(*own, sites=Later).exception, InterruptedRunError)
    assert json.loads(started(*own).stdout)["run"]["run"] == "demo-1"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (["--rounds", "4"], "--rounds is 3 there, 4 here"),
        (["--participants", "3"], "--participants is 2 there, 3 here"),
        (["--learning-rate", "0.5"], "--learning-rate is 0.003 there, 0.5 here"),
        (
            ["--seed", "9", "--local-steps", "1"],
            "--local-steps is 4 there, 1 here; --seed is 1 there",
        ),
        (["--model", "owner/other"], "/model there, owner/other here"),
        (["--set", "lora.alpha=32"], "--set lora.alpha=32 is not so there"),
        (["--data", "other.jsonl"], "--data (and how it is split) is another text there"),
    ],
)
def test_other_options_are_named_and_nothing_is_written(started, own, tmp_path, other, says):
    """Both ways on are told, and the run goes on as it was."""
    assert isinstance(started(*own, sites=Later).exception, InterruptedRunError)
    write_text(tmp_path / "other.jsonl", 30)
    before = files(tmp_path / "demo")
    other = [str(tmp_path / "other.jsonl") if word == "other.jsonl" else word for word in other]
    done = started(*other)
    assert isinstance(done.exception, RunExistsError), done.output
    for words in (says, "(no other option)", "--fresh", "--name"):
        assert words in str(done.exception)
    assert files(tmp_path / "demo") == before
    assert started().exit_code == 0


@pytest.mark.parametrize("option", [["--fresh"], ["--name", "mine"]])
def test_another_run_begins_beside_an_unfinished_one(started, own, tmp_path, option):
    """It has a folder of its own, and both can be gone on with."""
    assert isinstance(started(*own, sites=Later).exception, InterruptedRunError)
    before = files(tmp_path / "demo")
    done = started(*own, "--rounds", "1", *option)
    assert done.exit_code == 0, done.output
    assert {name: files(tmp_path / "demo")[name] for name in before} == before
    assert json.loads(done.stdout)["run"]["run"] in ("demo-2", "mine")
    assert json.loads(started().stdout)["run"]["run"] == "demo-1"


def test_fresh_takes_the_place_of_a_run_without_a_closed_round(started, own, tmp_path):
    """No run is left that waits for ever, and nothing trained on the other text is counted."""
    assert isinstance(
        started(*own, sites=lambda s: Stops(s) if s == "site-2" else NumpyLearner(s)).exception,
        InterruptedRunError,
    )
    done = started(*own, "--fresh", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert list_runs(store_of(tmp_path / "demo")) == {"demo-1": False}


def test_what_does_not_fit_writes_nothing(started, own, tmp_path):
    """A wrong model leaves neither a run nor settings, beside an unfinished run or without one."""
    left = tmp_path / "demo" / ".new-run" / "data"  # as a kill at this point leaves it
    left.mkdir(parents=True)
    write_text(left / "site-9.jsonl", 1)
    assert isinstance(started(*own, sites=NoModel).exception, ModelError)
    assert files(tmp_path / "demo") == {}
    assert list_runs(store_of(tmp_path / "demo")) == {}
    assert isinstance(started(*own, sites=Later).exception, InterruptedRunError)
    before = files(tmp_path / "demo")
    assert isinstance(started(*own, "--fresh", sites=NoModel).exception, ModelError)
    assert files(tmp_path / "demo") == before
    assert json.loads(started().stdout)["run"]["run"] == "demo-1"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rounds", "0"),
        ("--participants", "0"),
        ("--local-steps", "-1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--seed", "-1"),
    ],
)
def test_a_number_that_cannot_be_is_told_by_its_option(tmp_path, option, value):
    """Not by a setting of a file that nobody wrote; and no folder is made."""
    done = gradualdiff("demo", "--dir", tmp_path / "demo", option, value)
    assert done.returncode == ConfigError.exit_code, done.stderr
    assert re.match(f"error: {option}: expected .*, got {value}", done.stderr)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "arguments", [["--name", "No Name"], ["--data", "{}", "--columns", "text=b"], ["--model", "{}"]]
)
def test_a_demo_that_is_refused_leaves_no_folder_behind(tmp_path, arguments):
    """Neither log nor store of a folder that it made; one that was there stays."""
    text, there = tmp_path / "mine.csv", tmp_path / "there"
    text.write_text("a,b\nc,d\n")
    there.mkdir()
    words = [word.replace("{}", str(text)) for word in arguments]
    for folder in (tmp_path / "demo", there):
        done = gradualdiff("demo", "--dir", folder, *words)
        assert done.returncode in (10, 11, 12), done.stderr
    assert not (tmp_path / "demo").exists()
    assert there.is_dir()


def test_a_name_that_is_taken_is_said(started, own, tmp_path):
    """A run that ended keeps its name."""
    assert started(*own, "--name", "mine").exit_code == 0
    assert len(records(tmp_path / "demo", FinishedRecord, "mine")) == 1
    done = started(*own, "--name", "mine")
    assert isinstance(done.exception, RunExistsError)
    assert "runs delete mine" in str(done.exception)


def test_what_set_says_is_in_the_files_of_the_run(started, own, tmp_path):
    """It is on record and needs no option to resume; the same again is no other option."""
    sets = ["--set", "lora.rank=8", "--set", "policy.on_failure=exclude"]
    assert isinstance(started(*own, *sets, sites=Later).exception, InterruptedRunError)
    config = load_federation(tmp_path / "demo" / "federation.toml")
    assert (config.lora.rank, config.policy.on_failure) == (8, "exclude")
    assert started(*sets).exit_code == 0
    [record] = records(tmp_path / "demo", FederationRecord, "demo-1")
    assert record.digest == config.digest


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lora.rnak=8", "--set lora.rnak: expected a known setting"),
        ("run.name=mine", "--set run.name: the demo decides it; use --name"),
        ("store.directory=x", "--set store.directory: the demo decides it; use --dir"),
    ],
)
def test_a_setting_that_cannot_be_given_writes_nothing(started, own, tmp_path, setting, says):
    """A wrong name, and what another option of the demo is for."""
    done = started(*own, "--set", setting)
    assert isinstance(done.exception, ConfigError)
    assert says in str(done.exception)
    assert not (tmp_path / "demo" / "federation.toml").exists()
