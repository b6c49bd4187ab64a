"""Codes for the operator's terminal in what a site says: they are shown, and never acted on."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from coordinator.liveness import RunStatus, SiteStatus
from gradualdiff.cli.main import app, main
from gradualdiff.cli.output import console
from gradualdiff.cli.progress import make_display
from shared import topology
from shared.config import canonical_json
from shared.errors import RunStuckError
from shared.log import configure, get_logger
from shared.protocol.records import (
    ClosedRecord,
    ClosingRecord,
    DeclinedRecord,
    FailedRecord,
    FinishedRecord,
    MemberRecord,
    RefusedRecord,
)
from tests import federations
from tests.steering import records, store_of

# Clear the screen, set the clipboard (OSC 52, ended in two ways), C1's own control sequence, turn
# the writing around, another line, go back to the line's beginning.
CODES = "\x1b[2J\x1b]52;c;cm0gLXJmIC8=\x07\x1b]52;c;eA==\x1b\\\x9b31m\u202e\u2066\nok\r\u2028"
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # rich's own colours
SHA = "a" * 64


def is_safe(text):
    """Nothing in it but plain characters and line breaks, once rich's own colours are gone."""
    return all(line.isprintable() for line in STYLE.sub("", text).split("\n"))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A run whose records hold such codes in every text that a site may have put there.

    Written past the console, as an earlier release took them.
    """
    tmp_path = tmp_path_factory.mktemp("attacked")
    config = federations.config(policy={"on_failure": "exclude"}, rounds=1)
    federations.run(config, tmp_path)
    store = store_of(tmp_path)

    def write(record):
        key = record.key("test")
        store.delete(key)
        store.create(key, canonical_json(record.model_dump(mode="json")))

    def alter(kind, **values):
        (record, *_) = records(tmp_path, kind)
        write(record.model_copy(update=values))

    write(DeclinedRecord(site="c", reason=CODES))
    write(FailedRecord(round=1, site="b", attempt=1, reason=CODES, retryable=True))
    write(RefusedRecord(round=1, site="b", sha=SHA, reason=CODES))
    (member, *_) = records(tmp_path, MemberRecord)
    numerics = member.numerics.model_copy(update={"versions": {CODES: CODES}, "device": CODES})
    write(member.model_copy(update={"numerics": numerics}))
    alter(ClosingRecord, excluded={"c": CODES})
    alter(ClosedRecord, left_out={"a": CODES})
    alter(FinishedRecord, reason=CODES)
    store.delete(topology.accepted_key("test", 1, "b"))
    site = SiteStatus(seen=1.0, progress_at=9e9, round=1, activity=CODES, step=1, of=2)
    status = RunStatus(
        run="test", writer=CODES, at=1.0, round=1, state=CODES, since=1.0, sites={"b": site}
    )
    store.put(topology.status_key("test"), canonical_json(status.model_dump(mode="json")))
    return tmp_path


COMMANDS = [
    ("runs", "list"),
    ("runs", "show", "test"),
    ("runs", "verify", "test"),
    ("rounds", "list", "test"),
    ("rounds", "show", "test"),
    ("rounds", "show", "test", "1"),
    ("rounds", "show", "test", "0"),
    ("rounds", "show", "test", "--follow"),
    ("rounds", "show", "test", "--follow", "--json"),
    ("rounds", "show", "test", "1", "--json"),
    ("runs", "show", "test", "--json"),
]


@pytest.mark.parametrize("colours", [False, True], ids=["plain", "colours"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_acts_on_what_is_on_record(attacked, command, colours, monkeypatch):
    """Tables, lines, JSON and errors, on a terminal and off it."""
    environment = {"COLUMNS": "300"} | ({"FORCE_COLOR": "1", "TERM": "xterm"} if colours else {})
    arguments = [*command, "--store", str(attacked / "store")]
    result = CliRunner().invoke(app, arguments, env=environment)
    told = result.output + result.stderr + str(result.exception or "")
    assert told
    shown = result.output + result.stderr
    if colours and "--follow" in command and "--json" not in command:
        shown = re.sub(r"\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\r", "", shown)  # a table drawn in place
    assert is_safe(shown)
    if "--json" in command:
        assert [json.loads(line) for line in shown.splitlines() if "--follow" in command] or (
            json.loads(shown)
        )


def test_the_codes_are_shown():
    """Not dropped: whoever looks sees that somebody tried."""
    out = io.StringIO()
    printing = console()
    printing.file = out
    printing.print(CODES, markup=False, soft_wrap=True)
    assert is_safe(out.getvalue())
    assert r"\x1b[2J\x1b]52;c;cm0gLXJmIC8=" in out.getvalue()
    assert r"\u202e\u2066" in out.getvalue()


def test_an_error_is_printed_without_them(monkeypatch, capsys):
    """As the console script ends with one that names a site's reason."""

    def fail(*_, **__):
        raise RunStuckError(f"the start waits for b ({CODES})")

    monkeypatch.setattr("gradualdiff.cli.main.app", fail)
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert is_safe(told)
    assert "waits for b" in told


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_a_log_line_is_one_line_without_them(as_json):
    """In a field, in a nested one, in a name; a traceback keeps its line breaks only."""
    stream = io.StringIO()
    configure(stream, json=as_json)
    try:
        get_logger().warning("run.declined", reason=CODES, more={CODES: [CODES]})
        assert stream.getvalue().count("\n") == 1
        get_logger().error("handler.crashed", exc_info=ValueError(CODES))
    finally:
        structlog.reset_defaults()
    assert is_safe(stream.getvalue())
    assert "ValueError" in stream.getvalue()


def test_what_a_site_declines_with_is_safe_from_the_start(tmp_path):
    """At the door: on record, in the error and in the tables of a new run."""

    class Declines(federations.NumpyLearner):
        def prepare(self, announced, report):
            from shared.errors import ModelError

            raise ModelError(CODES)

    config = federations.config()
    sites = federations.learners(config)
    sites["b"] = Declines("b")
    with pytest.raises(RunStuckError) as caught:
        federations.run(config, tmp_path, sites)
    assert is_safe(str(caught.value))
    (declined,) = records(tmp_path, DeclinedRecord)
    assert declined.reason.isprintable()
    assert declined.reason.startswith(r"\x1b[2J")


def test_progress_is_printed_there_too(capsys):
    """While a federation runs in this process."""
    with make_display() as display:
        display.say(CODES)
    assert is_safe(capsys.readouterr().err)


def test_nothing_in_the_command_line_prints_past_that_place():
    """One console and one function print; JSON goes by its own, which escapes."""
    found = []
    for path in sorted(Path(app.__module__.replace(".", "/")).parent.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\bConsole\(|(?<![._\w])print\(", line) and "json.dumps" not in line:
                found.append(f"{path}:{number}")
    allowed = {"gradualdiff/cli/output.py"}
    assert {place.split(":")[0] for place in found} <= allowed, found
