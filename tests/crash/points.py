"""The points that the code has: found by reading it, so that none is left out of the table."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from coordinator.deltas import Deltas
from coordinator.handlers import Coordinator
from participant.handlers import Participant
from shared.protocol import records
from shared.protocol.events import CoordinatorTick, Event, MessageRefused
from tests.crash.table import ACKNOWLEDGED, PUBLISHED, RECORDED

ROOT = Path(__file__).parents[2]
_BASES = ("StampedRecord", "SaidRecord")  # of records, and none themselves
FOLDERS = ("coordinator", "participant", "shared")


@dataclass(frozen=True)
class Call:
    """One ``failpoint(...)`` in the code. ``stage``: None where it is no literal."""

    place: str
    stage: str | None
    roles: frozenset[str]


def calls() -> list[Call]:
    """Every call in the product."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [call for file in files for call in calls_in(file.read_text(), file.relative_to(ROOT))]


def calls_in(source: str, path: Path) -> list[Call]:
    """The calls in one file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name != "failpoint":
            continue
        first = node.args[0] if node.args else None
        literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
        stage = str(first.value) if literal else None
        found.append(Call(f"{path}:{node.lineno}", stage, _roles(path)))
    return found


def _roles(path: Path) -> frozenset[str]:
    folder = path.parts[0]
    if folder != "shared":
        return frozenset({folder})
    # Only the coordinator writes records; all else of `shared` is both roles'.
    both = {"coordinator", "participant"}
    return frozenset({"coordinator"} if path.name == "ledger.py" else both)


def subjects() -> set[tuple[str, str]]:
    """(role, whole point) for every kind of record, and every event that a role says or hears."""
    kinds = [kind for kind in _subclasses(records.Record) if kind.__name__ not in _BASES]
    words = [kind.__name__.removesuffix("Record").lower() for kind in kinds]
    heard = {"coordinator": _heard(Coordinator, Deltas), "participant": _heard(Participant)}
    # A refusal is published by whoever could not use a message; a tick is the coordinator's own.
    said = {
        "coordinator": heard["participant"] | {CoordinatorTick, MessageRefused},
        "participant": heard["coordinator"] - {CoordinatorTick},
    }
    found = {("coordinator", f"{stage}:{word}") for word in words for stage in RECORDED}
    for stages, events in ((PUBLISHED, said), (ACKNOWLEDGED, heard)):
        found |= {
            (role, f"{stage}:{event.__name__}")
            for role, kinds_of_events in events.items()
            for event in kinds_of_events
            for stage in stages
        }
    return found


def _heard(*classes: type) -> set[type[Event]]:
    """The events that a role has a handler for, from its ``on_`` methods' annotations."""
    by_name = {kind.__name__: kind for kind in _subclasses(Event)}
    named = (item for one in classes for item in vars(one).items())
    methods = [method for name, method in named if name.startswith("on_")]
    return {by_name[method.__annotations__["event"]] for method in methods}


def _subclasses(kind: type) -> list[type]:
    return [found for one in kind.__subclasses__() for found in (one, *_subclasses(one))]
