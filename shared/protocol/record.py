"""What every record of the ledger has, and the bounds on what one may say."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, SerializerFunctionWrapHandler, Strict, model_serializer

from shared.config import Name
from shared.protocol.manifest import Schema
from shared.protocol.said import Said

# Numbers that are counted up to have an end: a record may say any, and somebody counts.
MOST = 1_000_000
RoundNumber = Annotated[int, Field(ge=0, le=MOST)]
ControlNumber = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[int, Field(ge=1, le=2**64)]
HEAD_FORM: Final = r"^[1-9][0-9]{0,6}:[0-9a-f]{64}$"
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

    def folded(self) -> Self:
        """What of it is kept in memory: all but what only an auditor reads."""
        return self

    def key(self, run: str) -> str:
        """Where it lies in the store."""
        raise NotImplementedError(f"{type(self).__name__} has no key")


class StampedRecord(Record):
    """A record that says who wrote it and when (seconds since the epoch)."""

    writer: str = ""
    time: float = 0.0
    """When it was written, seconds since the epoch."""


class SaidRecord(StampedRecord):
    """A record that the coordinator made of what a site said.

    Every class of it names ``said`` in ``newer``: the bytes of a run without signatures stay.
    """

    newer: ClassVar[tuple[str, ...]] = ("said",)
    said: Said | None = None
    """The site's word as it signed it. Not there where the coordinator demands no signatures."""

    def folded(self) -> Self:
        """Without the site's word, which is as long as all the rest."""
        return self if self.said is None else self.model_copy(update={"said": None})


def delta_label(site: str, from_round: int, round_number: int) -> str:
    """A delta's name among those that a round counts; no site's name holds an ``@``."""
    return site if from_round == round_number else f"{site}@{from_round}"
