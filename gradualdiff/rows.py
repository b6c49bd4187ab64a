"""Rows of one kind, such as the rounds of a run; as a pandas table where pandas is there."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from shared.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import DataclassInstance

Row_co = TypeVar("Row_co", bound="DataclassInstance", covariant=True)


class Rows(tuple[Row_co, ...]):  # noqa: SLOT001 - a tuple of any length can have no slots
    """A tuple of dataclasses of one kind."""

    kind: type[DataclassInstance]

    def __new__(cls, kind: type[Row_co], rows: Iterable[Row_co]) -> Self:
        """``kind``: also of no rows at all."""
        made = super().__new__(cls, rows)
        made.kind = kind
        return made

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame``, a column for each field. Raises MissingPackageError."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise MissingPackageError("to_frame needs pandas; run: pip install pandas") from None
        names = [field.name for field in fields(self.kind)]
        return DataFrame([[getattr(row, name) for name in names] for row in self], columns=names)
