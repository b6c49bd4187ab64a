"""What each field means: the docstring below it in its class, read from the source.

Only the generator asks, so a process that reads settings or events never pays for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def meanings(model: type[BaseModel], elsewhere: Mapping[str, str]) -> dict[str, str]:
    """The meaning of every field; ``elsewhere``: by name, for fields that say none themselves.

    Raises KeyError for a field without one.
    """
    known = {**elsewhere, **_stated(model)}
    for name in model.model_fields:
        if name not in known:
            raise KeyError(
                f"{model.__name__}.{name}: expected what it means, got nothing; "
                "write it as a docstring below the field"
            )
    return {name: known[name] for name in model.model_fields}


def by_name(models: Iterable[type[BaseModel]]) -> dict[str, str]:
    """One name means one thing everywhere: what the first model that says it says."""
    found: dict[str, str] = {}
    for model in models:
        found = {**_stated(model), **found}
    return found


def _stated(model: type[BaseModel]) -> dict[str, str]:
    """What a class and those it inherits from say of their fields."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _own(kind)
    return found


def _own(kind: type[BaseModel]) -> dict[str, str]:
    file = inspect.getsourcefile(kind)
    if file is None:
        raise TypeError(f"{kind.__name__}: expected a class that stands in a file")
    [body] = [node.body for node in _classes(Path(file)) if node.name == kind.__name__]
    return {
        field.target.id: " ".join(text.value.value.split()).replace("``", "`")
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@functools.cache
def _classes(file: Path) -> list[ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]
