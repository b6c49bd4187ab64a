"""``gradualdiff site``: what waits, in plain words, and a person's answer."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gradualdiff.cli.main import app
from participant.approvals import FILE, Approvals
from shared.errors import RunNotFoundError
from tests.participant.test_asking import ANNOUNCED

TOML = '[site]\nname = "a"\n[data]\npath = "a.jsonl"\ntext = "text"\n'


@pytest.fixture
def approvals(tmp_path, monkeypatch):
    """A site's folder as the working directory, where run ``r`` waits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text(TOML)
    found = Approvals(tmp_path / "workspace" / FILE)
    found.ask(ANNOUNCED, 0.0)
    return found


def site(*arguments, given=None, exit_code=0):
    result = CliRunner().invoke(app, ["site", *arguments], input=given, terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def test_what_waits_is_said_in_plain_words(approvals):
    """The model, the adapter, how long, how much of the text, with whom, and what leaves."""
    said = site("status").stdout
    assert "Run r: waits for approval since 1970-01-01" in said
    for words in ("m (nf4)", "rank 64", "1 steps, 4 examples each step", "a delta of the adapter"):
        assert words in said, words
    (shown,) = json.loads(site("status", "--json").stdout)
    assert shown["digest"] == approvals.asked()["r"].terms
    assert shown["terms"]["settings' sha256"] == "b" * 64


def test_a_person_answers_and_it_stands_who_and_when(approvals):
    """A no to the question changes nothing; declining takes the approval back."""
    terms = approvals.asked()["r"].terms
    site("approve", "r", given="n\n", exit_code=1)
    assert approvals.answer("r", terms) is None
    assert "up to round 3" in site("approve", "r", "--rounds", "3", given="y\n").stdout
    found = approvals.answer("r", terms)
    assert (found.word, found.rounds, "@" in found.by) == ("approved", 3, True)
    assert f"approved by {found.by} on 2" in site("status").stdout
    said = json.loads(site("decline", "r", "--reason", "withdrawn", "--json").stdout)
    assert (said["word"], said["reason"]) == ("declined", "withdrawn")
    assert "withdrawn" in site("status").stdout


def test_a_run_that_was_not_announced_cannot_be_approved_ahead(approvals):
    """Nobody knows its terms yet; what was held is named."""
    with pytest.raises(RunNotFoundError, match=r"run s: .*\(r\)"):
        site("approve", "s", "--yes")


def test_a_site_that_holds_nothing_says_so(approvals, tmp_path):
    """Also before there is a workspace."""
    (tmp_path / "workspace" / FILE).unlink()
    assert "no run was held" in site("status").stdout
    assert json.loads(site("status", "--json").stdout) == []
