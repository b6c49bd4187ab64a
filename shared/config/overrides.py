"""Settings that are given beside a file: ``section.key=value`` each, as ``--set`` takes them."""

from __future__ import annotations

import contextlib
import tomllib
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError

from shared.config.mistakes import section_of
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def overridden(
    kind: type[BaseModel], values: Mapping[str, Any], settings: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """``values`` with each of ``settings`` in its place, the last one counts; and their names.

    A name that is unknown and a value that does not fit are put in too: :func:`parse` tells them.
    Raises ConfigError for one that is not ``section.key=value``.
    """
    changed, names = dict(values), []
    for setting in settings:
        name, equals, text = setting.partition("=")
        path = [part.strip() for part in name.split(".")]
        if not equals or not all(path):
            raise ConfigError(
                f"--set: expected SECTION.KEY=VALUE, got {setting!r}; for instance lora.rank=8"
            )
        changed = _put(changed, path, _typed(_field(kind, path), text.strip()))
        names.append(".".join(path[:2]))
    return changed, names


def _typed(field: FieldInfo | None, text: str) -> Any:
    """The TOML value, if the setting takes it; else the text as it is, where it takes text."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        read = {}
    value = read["value"] if len(read) == 1 else text
    if field is None or value is text:
        return value
    whole: Any = Annotated[field.annotation, field]
    for candidate in (value, text):
        with contextlib.suppress(ValidationError):
            made = TypeAdapter(whole).validate_python(candidate)
            if candidate is value or isinstance(made, str):
                return candidate
    return value


def _field(kind: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    """The setting that a name stands for; None for an unknown one and for what is within one."""
    table = kind.model_fields.get(path[0])
    section = section_of(table.annotation) if table is not None else None
    return section.model_fields.get(path[1]) if section is not None and len(path) == 2 else None


def _put(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Where the file has no table at that place, nothing: what it has there is told as wrong."""
    first, *rest = path
    if not rest:
        return {**values, first: value}
    inner = values.get(first, {})
    return {**values, first: _put(inner, rest, value)} if isinstance(inner, dict) else dict(values)
