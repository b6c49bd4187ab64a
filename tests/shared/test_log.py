"""Log lines: one format, bound context, and never a signed URL."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from structlog.contextvars import bound_contextvars

from shared.errors import ConfigError
from shared.log import configure, get_logger
from shared.stores.directory import DirectoryStore

S3_URL = "https://s3.example/bucket/k?X-Amz-Credential=AKIA%2Fx&X-Amz-Signature=feedbeef"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream():
    """A configured stream; structlog is as before afterwards."""
    stream = io.StringIO()
    configure(stream)
    yield stream
    structlog.reset_defaults()


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_when_not_on_a_terminal(stream):
    """Event, level, UTC time and the fields as given."""
    get_logger().info("round.opened", round=3, sites=("a", "b"), loss=0.5, late=None, name="ä")
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "round.opened",
        "level": "info",
        "round": 3,
        "sites": ["a", "b"],
        "loss": 0.5,
        "late": None,
        "name": "ä",
    }


def test_a_terminal_gets_text():
    """Readable, with the same fields; ``json`` overrules either way."""
    stream = Terminal()
    try:
        configure(stream)
        get_logger().info("round.opened", number=3)
        assert "round.opened" in stream.getvalue()
        assert not stream.getvalue().startswith("{")
        configure(stream, json=True)
        get_logger().info("round.closed")
        assert stream.getvalue().splitlines()[-1].startswith("{")
    finally:
        structlog.reset_defaults()


def test_bound_context_is_in_every_line(stream):
    """Run, round and participant, while they are bound and not longer."""
    with bound_contextvars(run="r1", round=2, participant="a"):
        get_logger().info("delta.accepted")
    get_logger().info("coordinator.idle")
    inside, outside = lines(stream)
    assert (inside["run"], inside["round"], inside["participant"]) == ("r1", 2, "a")
    assert not {"run", "round", "participant"} & set(outside)


def test_lines_below_the_level_are_not_written(stream):
    """Loggers already handed out follow a new configuration."""
    logger = get_logger()
    logger.debug("message.handled")
    assert stream.getvalue() == ""
    configure(stream, level="debug")
    logger.debug("message.handled")
    assert len(lines(stream)) == 1


def test_an_unknown_level_is_a_config_error():
    """Named, with the ones there are."""
    with pytest.raises(ConfigError, match=r"debug, info.*'loud'"):
        configure(io.StringIO(), level="loud")


@dataclass
class Carrier:
    """An object whose repr shows what it carries."""

    address: str


@pytest.fixture
def directory_url(tmp_path):
    return DirectoryStore(tmp_path / "store").sign_get("k", 2e9)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        lambda url: {"get_url": url},
        lambda url: {"urls": {0: url, 1: url}},
        lambda url: {"urls": [url]},
        lambda url: {"address": url},
        lambda url: {"reason": f"could not read {url} in time"},
        lambda url: {"deep": [{"a": ({"b": url},)}]},
        lambda url: {"carrier": Carrier(url)},
        lambda url: {"carriers": {Carrier: [Carrier(url)]}},
        lambda url: {"error": ValueError(url)},
        lambda url: {"raw": url.encode()},
        lambda url: {"path": Path(url)},
        lambda url: {"event_dict": {"GET_URL": "short form"}, "address": url.upper()},
    ],
)
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_no_signed_url_leaves_through_a_field(directory_url, fields, kind, as_json):
    """Whatever it hides in: the line says ``redacted`` and holds no part of the signature."""
    url = directory_url if kind == "directory" else S3_URL
    stream = io.StringIO()
    try:
        configure(stream, json=as_json)
        get_logger().info("round.opened", **fields(url))
    finally:
        structlog.reset_defaults()
    text = stream.getvalue()
    assert "redacted" in text
    assert "ignature=" not in text
    assert url.rpartition("=")[2].lower() not in text.lower()
    assert "short form" not in text


def fail(local: str) -> None:
    raise ValueError(f"no answer from {local} today")


@pytest.mark.parametrize("as_json", [True, False])
def test_no_signed_url_leaves_through_a_traceback(directory_url, as_json):
    """The traceback stays readable, its values of local variables are not printed."""
    stream = io.StringIO()
    try:
        configure(stream, json=as_json)
        try:
            fail(directory_url)
        except ValueError:
            get_logger().exception("handler.crashed")
    finally:
        structlog.reset_defaults()
    text = stream.getvalue()
    assert "no answer from redacted today" in text
    assert "Traceback" in text
    assert "ignature=" not in text


def test_the_words_around_a_url_stay(stream, directory_url):
    """Only the URL goes; plain text that speaks of signatures is left alone."""
    get_logger().info("a.b", reason=f"before {directory_url} after", other="the signature is bad")
    (line,) = lines(stream)
    assert line["reason"] == "before redacted after"
    assert line["other"] == "the signature is bad"


def test_importing_the_log_module_does_not_import_structlog():
    """``--help`` does not pay for what it does not write."""
    code = "import sys, shared.log; sys.exit('structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_configuration_nothing_is_printed():
    """In a script that only imports; what it configures later is followed."""
    program = (
        "from shared.log import configure, get_logger\n"
        "get_logger().error('site.lost', site='a')\n"
        "configure()\n"
        "get_logger().error('site.found', site='a')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["site.found"]
