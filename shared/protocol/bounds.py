"""How much a message may say: a bound on every text, list, map and number that travels.

Bounds hold at the door, where a message is written or read (``wire.py``), and nowhere else:
a record that an earlier release wrote is read as it is. Prose, which only people read, is never a
reason to refuse a message: whoever writes or reads it makes it printable and cuts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError, core_schema

from shared.printing import cut, printable

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, ValidationInfo

AT_THE_DOOR: Final = {"at_the_door": True}
MOST_PROSE: Final = 2_000
MOST_COUNT: Final = 2**53  # what JSON and fp64 can tell from its neighbour
# Nats per token. A model that guesses among all its tokens is at 12; far above, it has diverged.
LEAST_NLL: Final = -1.0  # rounding may leave a sum of losses a little below 0
MOST_NLL: Final = 1e9


class _Bound:
    """Says what is wrong with a value; asked at the door only."""

    def problem(self, value: Any) -> str | None:
        """What was expected and what came; None if it will do."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def check(value: Any, info: ValidationInfo) -> Any:
            problem = self.problem(value) if info.context is AT_THE_DOOR else None
            if problem is not None:
                raise PydanticCustomError("bound", "{problem}", {"problem": problem})
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))


@dataclass(frozen=True)
class Most(_Bound):
    """At most so many characters (printable ones), bytes or entries."""

    count: int

    def problem(self, value: Any) -> str | None:
        """Too long, or text that a terminal would act on."""
        if value is None:
            return None
        if len(value) > self.count:
            return f"expected at most {self.count} of them, got {len(value)}"
        if isinstance(value, str) and not value.isprintable():
            return "expected printable characters, got others"
        return None


@dataclass(frozen=True)
class Within(_Bound):
    """A number from ``least`` to ``most``; no sum or product of a few such leaves fp64."""

    least: float
    most: float

    def problem(self, value: Any) -> str | None:
        """Out of range."""
        if value is None or self.least <= value <= self.most:
            return None
        return f"expected {self.least:g} to {self.most:g}, got {value:g}"


def prose(text: str) -> str:
    """What people read: printable, and cut first, so that a stranger's megabyte is no work."""
    return cut(printable(text[: MOST_PROSE + 1]), MOST_PROSE)


def _if_text(value: object) -> object:
    return prose(value) if isinstance(value, str) else value


Prose = Annotated[str, BeforeValidator(_if_text), Field(max_length=MOST_PROSE)]
Word = Annotated[str, Most(300)]
Url = Annotated[str, Most(8_192)]
Nll = Annotated[float, Within(LEAST_NLL, MOST_NLL)]
Figure = Annotated[float, Within(-1e39, 1e39)]  # fp32 ends at 3.4e38
Count = Annotated[int, Field(ge=1), Within(1, MOST_COUNT)]
Amount = Annotated[int, Field(ge=0), Within(0, MOST_COUNT)]
