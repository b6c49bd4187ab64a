"""A whole federation in this process, and what is said out of turn while it runs.

An input is a script: each step is drawn from eight bytes of it. At a moment of the run somebody
speaks, over a connection with his own account's rights: sites a and b, which are in the run, c,
which an operator took out of it, or to one of the sites the coordinator. What he says was said in
earnest, by him or by another, before now or in another run; or it is made up; or damaged.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest import mock

import structlog

from shared import topology
from shared.brokers.embedded import EmbeddedBroker, EmbeddedConnection
from shared.brokers.port import Message
from shared.errors import AccessRefusedError, DecodeError, GradualDiffError
from shared.protocol import wire
from shared.protocol.ledger import Ledger
from tests import federations
from tests.fuzz.damage import damaged
from tests.shared.test_wire import EXAMPLES
from tests.steering import ask, store_of, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.round.state import RunState

STEP_BYTES = 8
STEPS = 6  # at most, to begin with
MOMENTS = 30  # of the undisturbed run
MOST_MOMENTS = 2000
CONFIG = federations.config(("a", "b", "c"), rounds=2, run={"min_participants": 2})
MADE_UP = [
    wire.encode(event.model_copy(update={"run": "test"}), 1.0)
    for event in EXAMPLES
    if "run" in type(event).model_fields
]
# Caught, and a message or a training is refused for it; here it is what is looked for.
CRASHES = {"handler.crashed", "preparation.crashed", "training.crashed"}


def scripts() -> list[bytes]:
    """Some to begin with."""
    return [Random(n).randbytes((n % STEPS + 1) * STEP_BYTES) for n in range(8)]


class Bus(EmbeddedBroker):
    """A broker that notes what is said in earnest: by whom, and the message."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, Message]] = []

    def connect(self, identity: str, rights: topology.Rights) -> EmbeddedConnection:
        """A connection of the federation's own."""
        connection = super().connect(identity, rights)
        publish = connection.publish

        def noted(messages: Sequence[Message]) -> None:
            self.said += [(identity, message) for message in messages]
            publish(messages)

        connection.publish = noted  # type: ignore[method-assign]
        return connection

    def speak(self, identity: str, message: Message) -> None:
        """Over a connection more of this account's."""
        rights = topology.site_rights(identity)
        if identity == topology.COORDINATOR:
            rights = topology.coordinator_rights()
        super().connect(identity, rights).publish([message])


class Disturbed:
    """A run of the federation. ``earlier``: what was said in the undisturbed one.

    ``bent``: one who is in the run said what was never his word, so that it may end otherwise.
    """

    def __init__(self, folder: Path, script: bytes, earlier: list[tuple[str, Message]]) -> None:
        self.bus = Bus()
        self.bent = False
        self.moments = 0
        self._folder = folder
        self._earlier = earlier
        self._steps: dict[int, list[Random]] = {}
        for at in range(0, len(script) - STEP_BYTES + 1, STEP_BYTES):
            draw = Random(script[at : at + STEP_BYTES])
            self._steps.setdefault(draw.randint(1, MOMENTS), []).append(draw)

    def run(self) -> RunState:
        """To its end. Raises what comes out of it."""
        Ledger(store_of(self._folder), "test", "test", lambda: 0.0).begin(CONFIG)
        ask(self._folder, "exclude", site="c")
        sites = federations.learners(CONFIG)
        del sites["c"]
        bus = mock.patch("gradualdiff.embedded.federation.EmbeddedBroker", return_value=self.bus)
        with bus, mock.patch("os.fsync"):  # nothing is killed here, and waiting for disks is long
            return federations.run(
                CONFIG, self._folder, sites, moved=self._moved, should_stop=self._moved
            )

    def _moved(self, *_: object) -> bool:
        self.moments += 1
        assert self.moments < MOST_MOMENTS
        for draw in self._steps.pop(self.moments, []):
            self._speak(draw)
        return False

    def _speak(self, draw: Random) -> None:
        who = draw.choice(("a", "b", "c", "c", topology.COORDINATOR))
        exchange, key = topology.EVENTS_EXCHANGE, f"test.{who}.word"
        said, heard = self.bus.said, self.bus.said + self._earlier
        if who == topology.COORDINATOR:
            exchange, key = topology.SITES_EXCHANGE, draw.choice("ab")
        elif not draw.randrange(10):
            key = "test.a.word"
        own = [m.body for speaker, m in said if _is_of(who, key, speaker, m)]
        body = draw.choice(draw.choice([own, own, [m.body for _, m in heard], MADE_UP]) or MADE_UP)
        if draw.randrange(2):
            body = damaged(draw, body)
        if who != "c" and body not in own and _is_event(body):
            self.bent = True
        try:
            self.bus.speak(who, Message(exchange, key, body))
        except AccessRefusedError:
            assert f".{who}." not in key


def _is_of(who: str, key: str, speaker: str, message: Message) -> bool:
    """Whether this is his own word; of the coordinator: to this site."""
    if who == topology.COORDINATOR:
        return (message.exchange, message.routing_key) == (topology.SITES_EXCHANGE, key)
    return speaker == who


def _is_event(body: bytes) -> bool:
    try:
        wire.decode(body)
    except DecodeError:
        return False
    return True


@cache
def undisturbed() -> tuple[str, list[tuple[str, Message]]]:
    """The run that nobody disturbs: its adapter's sha256, and what was said."""
    with TemporaryDirectory() as folder, structlog.testing.capture_logs():
        run = Disturbed(Path(folder), b"", [])
        state = run.run()
    assert state.adapter_sha is not None
    assert run.moments == MOMENTS
    return state.adapter_sha, run.bus.said


def disturb(folder: Path, script: bytes) -> None:
    """The run ends in the adapter of the undisturbed one, whatever is said.

    Where one who is in it said what was never his word, it may end in another, which follows from
    the records, or in an error of the tree.
    """
    sha, earlier = undisturbed()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run = Disturbed(folder, script, earlier)
    with structlog.testing.capture_logs() as logs:
        try:
            ended = run.run().adapter_sha
        except GradualDiffError as error:
            # A step that fell over a mistake of ours says it in an error of the tree.
            held = run.bent and isinstance(error.__cause__, GradualDiffError | None)
        else:
            held = not verify(folder).findings if run.bent else ended == sha
    assert held
    assert not [line for line in logs if line["event"] in CRASHES]
