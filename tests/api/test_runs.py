"""A store and its runs from Python: the same facts as on the command line, as typed rows."""

from __future__ import annotations

import json
import sys

import pytest

import gradualdiff as gd
from tests import federations
from tests.cli.test_commands import gradualdiff


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
        return {name: getattr(row, name) for name in row.__dataclass_fields__}

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
