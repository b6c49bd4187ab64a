"""``runs pause|resume|stop|extend|exclude|branch|prune`` as an operator types them."""

from __future__ import annotations

import json

import pytest

from shared import errors, topology
from shared.errors import RunStuckError
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.command_line import gradualdiff
from tests.coordinator.test_controls import when
from tests.steering import ask


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with one finished run."""
    folder = tmp_path_factory.mktemp("finished")
    federations.run(federations.config(), folder)
    return folder / "store"


@pytest.fixture
def paused(tmp_path):
    """A run that is paused after round 1 of 3."""
    sites = when(federations.config(), 1, lambda: ask(tmp_path, "pause", "lunch"))
    with pytest.raises(RunStuckError):
        federations.run(federations.config(), tmp_path, sites)
    return tmp_path


def test_each_word_says_what_happens_next(paused):
    """Pause, extend, exclude, resume, stop of one run; list and show tell of it."""
    store = ("--store", paused / "store")

    def said(*words):
        done = gradualdiff("runs", *words, *store)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "paused after round 1" in said("list")
    assert "lunch" in said("show", "test")
    assert "paused already; nothing done" in said("pause", "test")
    told = said("extend", "test", "2", "--reason", "more text")
    assert "control/00002.json: extend is on record" in told
    assert "ends after round 5" in told
    assert "1/5" in said("list")
    told = said("exclude", "test", "b", "--reason", "broken")
    assert "b is not asked again" in told
    assert "without b" in said("show", "test")
    assert "next round begins" in said("resume", "test")
    assert "not paused; nothing done" in said("resume", "test")
    told = said("stop", "test", "--reason", "enough")
    assert "ends with the adapter of round 1" in told
    assert "runs branch test --at 1 --name NEW" in told
    assert federations.run(federations.config(), paused).last_round == 1
    assert "stopped: enough" in said("show", "test")


def test_json_is_the_record(paused):
    """For scripts; a word that is in force already is null."""
    store = ("--store", paused / "store", "--json")
    record = json.loads(gradualdiff("runs", "extend", "test", "1", *store).stdout)
    assert (record["action"], record["rounds"], record["number"]) == ("extend", 1, 2)
    assert json.loads(gradualdiff("runs", "pause", "test", *store).stdout) is None
    summary = json.loads(gradualdiff("runs", "list", *store).stdout)[0]
    assert (summary["paused"], summary["rounds"]) == ("lunch", 4)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (("pause", "test"), errors.LedgerError.exit_code, "runs branch test --at 3"),
        (("extend", "test", "0"), 2, "equal to 1"),
        (("stop", "test"), 2, "--reason"),
        (("pause", "nobody"), errors.RunNotFoundError.exit_code, "nobody"),
        (("branch", "test", "--at", "9", "--name", "x"), errors.RunNotFoundError.exit_code, "9"),
        (("branch", "test", "--at", "1", "--name", "X_"), errors.ConfigError.exit_code, "--name"),
        (
            ("branch", "test", "--at", "1", "--name", "test"),
            errors.RunExistsError.exit_code,
            "test",
        ),
        (("prune", "test", "--keep", "some"), errors.ConfigError.exit_code, "last:N"),
    ],
)
def test_what_cannot_be_is_refused_with_its_code(finished, command, code, says):
    """One line that says what to do instead; nothing is written."""
    before = [info.key for info in DirectoryStore(finished).list("runs/")]
    done = gradualdiff("runs", *command, "--store", finished)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [info.key for info in DirectoryStore(finished).list("runs/")] == before


def test_a_branch_says_how_to_go_on(finished):
    """The sha256, the setting to change, the command to start."""
    done = gradualdiff("runs", "branch", "test", "--at", "2", "--name", "next", "--store", finished)
    assert done.returncode == 0, done.stderr
    assert "adapter of round 2 of test" in done.stdout
    assert "set run.name to 'next'" in done.stdout
    state = federations.run(
        federations.config(name="next"), finished.parent, store=DirectoryStore(finished)
    )
    assert state.genesis.origin == "test@2"


def test_prune_says_what_is_lost_before_it_deletes(tmp_path):
    """Without --yes it is a plan; with it, verify tells of it and exits 0."""
    federations.run(federations.config(), tmp_path)
    store = ("--store", tmp_path / "store")
    plan = gradualdiff("runs", "prune", "test", "--keep", "adapters", *store)
    assert plan.returncode == 0, plan.stderr
    assert "can no longer recompute rounds 1 to 3" in plan.stdout
    assert "repeat the command with --yes" in plan.stdout
    assert "pruned" not in gradualdiff("runs", "verify", "test", *store).stdout
    done = gradualdiff("runs", "prune", "test", "--keep", "adapters", "--yes", *store)
    assert "Deleted 9 objects" in done.stdout
    found = gradualdiff("runs", "verify", "test", *store)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("cannot be recomputed") == 9
    again = gradualdiff("runs", "prune", "test", "--keep", "adapters", "--yes", *store)
    assert "leaves nothing to delete" in again.stdout
    told = gradualdiff("runs", "prune", "test", "--keep", "last:1", *store, "--json")
    assert json.loads(told.stdout)["deleted"] is False
    upload = topology.inbox_key("test", 3, "a", "d" * 64, 0)
    DirectoryStore(tmp_path / "store").put(upload, b"x")
    plan = gradualdiff("runs", "prune", "test", "--keep", "adapters", *store)
    assert "nothing: no round takes these uploads" in plan.stdout
    assert "repeat the command with --yes" in plan.stdout
    done = gradualdiff("runs", "prune", "test", "--keep", "adapters", "--yes", *store)
    assert "Deleted 1 uploads" in done.stdout
    assert list(DirectoryStore(tmp_path / "store").list(topology.INBOX)) == []


def test_a_store_is_not_made_by_a_word_to_it(tmp_path):
    """A mistyped --store is named, not begun."""
    done = gradualdiff("runs", "pause", "test", "--store", tmp_path / "nowhere")
    assert done.returncode == errors.StoreMissingError.exit_code
    assert not (tmp_path / "nowhere").exists()


def test_the_embedded_run_that_is_paused_names_its_store(paused):
    """What it tells to type can be typed."""
    with pytest.raises(RunStuckError) as stuck:
        federations.run(federations.config(), paused)
    command = str(stuck.value).split("gradualdiff ")[1].split(", then")[0]
    assert gradualdiff(*command.split()).returncode == 0
    assert federations.run(federations.config(), paused).last_round == 3
