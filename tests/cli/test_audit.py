"""``gradualdiff audit``, and that every command that does something for good is in the log."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from typer.testing import CliRunner

from coordinator.audit_log import AuditLog
from gradualdiff.cli.main import app
from shared.errors import (
    ConfigError,
    LedgerDamagedError,
    RunNotFoundError,
    StoreUnavailableError,
)
from shared.topology import audit_key
from tests import federations
from tests.contracts.test_directory_store import small_disk  # noqa: F401 - a fixture
from tests.steering import store_of


@pytest.fixture
def store(tmp_path):
    """A store with one finished run and one that is paused."""
    federations.run(federations.config(("a", "b"), 2), tmp_path)
    return tmp_path / "store"


def gradualdiff(store, *arguments, exit_code=0):
    """Run a command on this store; its result."""
    result = CliRunner().invoke(app, [*arguments, "--store", str(store)], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def logged(store):
    """(what, about, why) of every entry."""
    found = json.loads(gradualdiff(store, "audit", "list", "--json").stdout)
    return [(entry["what"], entry["about"], entry["why"]) for entry in found]


def test_a_run_that_nobody_steered_leaves_an_empty_log(store):
    """A simulation's own doings are none of a person's."""
    assert logged(store) == []
    assert "0 entries" in gradualdiff(store, "audit", "verify").stdout


def test_every_deed_on_a_run_is_logged_before_it_is_done(store):
    """Also the deletion of the run: the log outlives it."""
    gradualdiff(store, "runs", "branch", "test", "--at", "1", "--name", "next", "--reason", "why")
    gradualdiff(store, "runs", "prune", "test", "--keep", "adapters", "--yes")
    gradualdiff(store, "runs", "prune", "test", "--keep", "adapters", "--yes")  # nothing is left
    gradualdiff(store, "runs", "erase", "test", "--site", "a", "--reason", "withdrawn")
    gradualdiff(store, "runs", "erase", "test", "--reason", "withdrawn", "--yes")
    assert "erased on" in gradualdiff(store, "runs", "verify", "test").stdout
    gradualdiff(store, "runs", "delete", "test", "--yes", "--reason", "withdrawn")
    assert logged(store) == [
        ("run.branch", "test@1 next", "why"),
        ("run.prune", "test adapters", "room"),
        ("run.erase", "test all", "withdrawn"),
        ("run.delete", "test", "withdrawn"),
    ]
    shown = gradualdiff(store, "audit", "list").stdout
    assert "withdrawn" in shown


def test_orders_to_an_open_run_are_logged_and_those_that_change_nothing_are_not(tmp_path):
    """Neither those of a run that is not there."""
    config = federations.config(("a", "b"), 2)
    from coordinator.runs.operating import operator_ledger

    operator_ledger(store_of(tmp_path), "test", lambda: 1.0).begin(config)
    store = tmp_path / "store"
    gradualdiff(store, "runs", "pause", "test", "--reason", "lunch")
    gradualdiff(store, "runs", "pause", "test")
    with pytest.raises(RunNotFoundError):
        gradualdiff(store, "runs", "pause", "tset")
    gradualdiff(store, "runs", "resume", "test")
    gradualdiff(store, "runs", "extend", "test", "3")
    gradualdiff(store, "runs", "exclude", "test", "b", "--reason", "broken")
    gradualdiff(store, "runs", "stop", "test", "--reason", "enough")
    assert logged(store) == [
        ("run.pause", "test", "lunch"),
        ("run.resume", "test", "no reason given"),
        ("run.extend", "test 3", "no reason given"),
        ("run.exclude", "test b", "broken"),
        ("run.stop", "test", "enough"),
    ]


def outcomes(store):
    """Deed and exit code of every entry."""
    found = json.loads(gradualdiff(store, "audit", "list", "--json").stdout)
    return [(entry["what"], entry["exit_code"]) for entry in found]


def test_what_became_of_a_deed_is_on_record_and_in_the_chain(store, tmp_path, monkeypatch):
    """Done, failed by an error of ours or by another one, or cut off: then nothing is known."""
    words = ("runs", "export", "test", "--to")
    gradualdiff(store, *words, str(tmp_path / "adapter"), "--reason", "for the ward")
    with pytest.raises(ConfigError):
        gradualdiff(store, *words, str(tmp_path / "adapter"))
    monkeypatch.setattr(AuditLog, "write", cut_off_after_one(AuditLog.write))
    gradualdiff(store, "runs", "branch", "test", "--at", "1", "--name", "next")
    assert outcomes(store) == [("run.export", 0), ("run.export", 10), ("run.branch", None)]
    assert logged(store)[0] == ("run.export", "test@2", "for the ward")
    shown = gradualdiff(store, "audit", "list").stdout
    assert all(word in shown for word in ("done", "failed (10)", "not known"))
    assert "3 of 3 are not signed" in shown
    assert "5 entries" in gradualdiff(store, "audit", "verify").stdout


def cut_off_after_one(write):
    """A log that loses its store once the deed is on record."""

    def written(log, *words, ended=None, **more):
        if ended is not None:
            raise StoreUnavailableError("the store went away")
        return write(log, *words, **more)

    return written


def test_an_export_can_be_verified_without_the_store(store, tmp_path):
    """Line by line each names the sha256 of the one before; an edit of a line is found."""
    for at in ("0", "1", "2"):
        gradualdiff(store, "runs", "branch", "test", "--at", at, "--name", f"from-{at}")
    file = tmp_path / "log.jsonl"
    gradualdiff(store, "audit", "export", "--to", str(file))
    assert gradualdiff(store, "audit", "export").stdout == file.read_text()
    lines = file.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in lines] == [
        None,
        *(hashlib.sha256(line).hexdigest() for line in lines[:-1]),
    ]
    head = hashlib.sha256(lines[-1]).hexdigest()
    elsewhere = tmp_path / "no-store"
    said = gradualdiff(elsewhere, "audit", "verify", "--file", str(file), "--head", head).stdout
    assert f"6 entries, 0 of them signed, each in its place; head sha256 {head}" in said
    file.write_bytes(file.read_bytes().replace(b"from-1", b"from-9"))
    with pytest.raises(LedgerDamagedError, match=audit_key(4)):
        gradualdiff(elsewhere, "audit", "verify", "--file", str(file))


def test_a_copy_that_nobody_can_write_into_is_exported_from(store, tmp_path, small_disk):  # noqa: F811
    """What is left out of the log is said; elsewhere the export is in it."""
    disk, make_read_only = small_disk
    shutil.copytree(store, disk / "store")
    make_read_only()
    done = gradualdiff(disk / "store", "runs", "export", "test", "--to", str(tmp_path / "out"))
    assert "this export is not on the log" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    again = gradualdiff(store, "runs", "export", "test", "--to", str(tmp_path / "again"))
    assert "not on the log" not in again.stderr
    assert ("run.export", "test@2", "no reason given") in logged(store)
