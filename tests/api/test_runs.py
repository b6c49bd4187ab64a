"""A store and its runs from Python: the same facts as on the command line, as typed rows."""

from __future__ import annotations

import json
import sys

import pytest

import gradualdiff as gd
from shared import topology
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.command_line import gradualdiff


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with one finished run, ``test``."""
    folder = tmp_path_factory.mktemp("finished")
    federations.run(federations.config(), folder)
    return folder


@pytest.fixture
def run(folder):
    """That run."""
    return gd.open_store(folder / "store").run("test")


def test_rows_are_what_the_command_line_prints(folder, run):
    """One code below both."""

    def printed(*words):
        return json.loads(gradualdiff(*words, "--store", folder / "store", "--json").stdout)

    def columns(row):
        found = {name: getattr(row, name) for name in row.__dataclass_fields__}
        if found.get("traffic") is not None:
            found["traffic"] = found["traffic"].model_dump(mode="json")
        return found

    assert [columns(row) for row in run.rounds] == printed("rounds", "list", "test")
    assert columns(run.summary) == printed("runs", "show", "test")["summary"]
    shown = run.round(2)
    assert columns(shown.summary) == printed("rounds", "show", "test", 2)["round"]
    assert [columns(row) for row in shown.sites] == printed("rounds", "show", "test", 2)["sites"]
    assert run.config.run.name == "test"


def test_a_store_is_named_as_the_option_names_it(folder, tmp_path):
    """Its directory, as text or path, or a federation.toml beside it."""
    named = folder / "federation.toml"
    named.write_text(
        '[run]\nname = "test"\nparticipants = ["a"]\n[base]\nmodel = "none"\n'
        '[store]\ndirectory = "store"\n'
    )
    for path in (folder / "store", str(folder / "store"), named):
        assert [summary.run for summary in gd.open_store(path).runs] == ["test"]
    with pytest.raises(gd.errors.StoreMissingError, match="no store at"):
        gd.open_store(tmp_path)
    with pytest.raises(gd.errors.RunNotFoundError):
        gd.open_store(named).run("other")


def test_a_round_that_is_not_there_is_an_error_of_the_tree(run):
    """As with the command."""
    with pytest.raises(gd.errors.RunNotFoundError, match="no round 9"):
        run.round(9)


def test_rows_become_a_table(run):
    """A column for each field, also of no rows."""
    pytest.importorskip("pandas")
    frame = run.rounds.to_frame()
    assert list(frame["round"]) == [0, 1, 2, 3]
    assert list(frame["held_out_nll"]) == [row.held_out_nll for row in run.rounds]
    assert "held_out_nll" in gd.Rows(gd.RoundSummary, []).to_frame().columns


def test_a_table_without_pandas_says_what_to_install(run, monkeypatch):
    """Whatever else works without it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(gd.errors.MissingPackageError, match="pip install pandas"):
        run.rounds.to_frame()


def test_an_adapter_is_saved_as_the_command_exports_it(folder, run, tmp_path):
    """Byte for byte; into a folder that holds files it is not written."""
    saved = run.adapter(2).save(tmp_path / "saved")
    done = gradualdiff(
        *("runs", "export", "test", "--round", 2, "--to", tmp_path / "told", "--json"),
        *("--store", folder / "store"),
    )
    assert json.loads(done.stdout)["sha"] == saved.sha == run.rounds[2].adapter_sha
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "told").iterdir())
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()
    assert run.adapter().round == 3
    assert run.adapter(run.best_round).sha in {row.adapter_sha for row in run.rounds}
    with pytest.raises(gd.errors.ConfigError, match="not empty"):
        run.adapter().save(str(tmp_path / "saved"))
    with pytest.raises(gd.errors.RunNotFoundError, match="no result of round 9"):
        run.adapter(9)


def test_a_run_is_verified_also_where_its_records_cannot_be_read(tmp_path):
    """What is wrong comes back as findings; nothing is printed and nothing is raised."""
    federations.run(federations.config(), tmp_path)
    run = gd.open_store(tmp_path / "store").run("test")
    told = []
    found = run.verify(told.append)
    assert (found.findings, found.rounds, told) == ([], 3, [0, 1, 2, 3])
    store = DirectoryStore(tmp_path / "store")
    store.put(topology.round_key("test", 2, "opened"), b"{}")
    damaged = gd.open_store(tmp_path / "store").run("test")
    assert {finding.round for finding in damaged.verify().findings} == {2}
    with pytest.raises(gd.errors.LedgerDamagedError):
        _ = damaged.rounds


def test_runs_are_compared_across_stores(run, tmp_path):
    """The loss by round of each; the same run twice is refused."""
    federations.run(federations.config(sites=("a", "b")), tmp_path)
    other = gd.open_store(tmp_path / "store").run("test")
    compared = run.compare(other)
    assert [len(facts.rounds) for facts in compared.runs] == [4, 4]
    assert len({facts.label for facts in compared.runs}) == 2
    assert "not of the same text" in compared.warnings[0]
    with pytest.raises(gd.errors.ConfigError, match="more than once"):
        run.compare(run)


def test_following_ends_with_the_run(run, capfd):
    """One that is over is one view; nothing is printed."""
    (view,) = run.follow()
    assert (view.state, view.adapter_sha) == ("finished", run.summary.adapter_sha)
    (view,) = run.follow(2)
    assert (view.round, view.state) == (2, "finished")
    with pytest.raises(gd.errors.RunNotFoundError):
        list(run.follow(9))
    assert capfd.readouterr() == ("", "")
