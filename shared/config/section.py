"""One table of a TOML file: what is the same of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Section(BaseModel):
    """One table of a TOML file: frozen, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What must hold of several settings together. Each yields what does not, and what to do.

        A rule may be asked of a table with settings missing, and then only as far as it can read.
        """
        return ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        found = [problem for rule in self.rules() for problem in rule()]
        if found:
            raise PydanticCustomError(
                "misfit", "{said}", {"said": "; ".join(found), "found": found}
            )
        return self
