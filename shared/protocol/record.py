"""What every record of the ledger has, and the bounds on what one may say."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, Strict, model_serializer

from shared.config import Name
from shared.protocol.manifest import Schema

# Numbers that are counted up to have an end: a record may say any, and somebody counts.
MOST = 1_000_000
RoundNumber = Annotated[int, Field(ge=0, le=MOST)]
ControlNumber = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[int, Field(ge=1, le=2**64)]
Names = Annotated[tuple[Name, ...], Strict(False)]


class Record(Schema):
    """Base of all records.

    ``decides``: only one coordinator may write it; meeting another writer's means to be fenced.
    ``newer``: fields that came later, left out where they say what was so before there were any:
    so records keep their bytes.
    """

    decides: ClassVar[bool] = False
    newer: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name in self.newer:
            if getattr(self, name) == type(self).model_fields[name].default:
                values.pop(name, None)
        return values

    def key(self, run: str) -> str:
        """Where it lies in the store."""
        raise NotImplementedError(f"{type(self).__name__} has no key")


class StampedRecord(Record):
    """A record that says who wrote it and when (seconds since the epoch)."""

    writer: str = ""
    time: float = 0.0
    """When it was written, seconds since the epoch."""


def delta_label(site: str, from_round: int, round_number: int) -> str:
    """A delta's name among those that a round counts; no site's name holds an ``@``."""
    return site if from_round == round_number else f"{site}@{from_round}"
