"""All that is wrong with a TOML file, at once and in plain words: field, expected, got.

pydantic says which settings are wrong one by one; its words for that are translated here. Where it
found some, it never asks whether the others go together: that is asked here, of what could be read.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import typing
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, TypeAdapter

from shared.config.values import NAME_PATTERN, SHA256_PATTERN
from shared.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Path = tuple[str, ...]

PATTERNS: Final = {
    NAME_PATTERN: "a-z, 0-9 and dashes, 1 to 40",
    SHA256_PATTERN: "64 hex digits",
}
# What pydantic calls it -> what is expected. In braces: what it tells about this case.
_EXPECTED: Final = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le}",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list with at least one entry",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "literal_error": "{expected}",
}
# How it names the branch of a setting that may be of several types.
_BRANCHES: Final = ("constrained-float", "constrained-str", "float", "str")


def mistakes(
    kind: type[BaseModel], values: Mapping[str, Any], details: Sequence[ErrorDetails]
) -> list[str]:
    """Every mistake in ``values`` for ``kind``, a line each; ``details``: pydantic's, if any.

    Settings that do not go together are told too, as far as all that the rule reads is known.
    """
    lines: dict[Path, list[str]] = {}
    unreadable = set[Path]()
    for place, value in _not_finite(values):
        path, rest = _split(kind, place)
        lines.setdefault(path, []).append(f"{_entry(rest)}expected a finite number, got {value}")
        unreadable.add(path)
    together: list[str] = []
    by_field: dict[Path, list[tuple[Path, ErrorDetails]]] = {}
    for detail in details:
        path, rest = _split(kind, tuple(map(str, detail["loc"])))
        if detail["type"] == "misfit":
            together += _named(path, detail["ctx"]["found"])
        elif path not in unreadable:
            by_field.setdefault(path, []).append((rest, detail))
    for path, found in by_field.items():
        lines.setdefault(path, []).extend(_describe(kind, path, found))
        unreadable.add(path)
        unreadable.update(_meant(kind, path, found))
    if lines or together:
        together += _misfits(_readable(kind, values, unreadable), unreadable)
    return [f"{'.'.join(path)}: {text}" for path, texts in lines.items() for text in texts] + [
        *dict.fromkeys(together)
    ]


# One setting -------------------------------------------------------------------------------------


def _not_finite(values: object, path: Path = ()) -> Iterator[tuple[Path, float]]:
    """Every number that is none, wherever it stands: a setting of any type may hold one."""
    if isinstance(values, float) and not math.isfinite(values):
        yield path, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _not_finite(value, (*path, str(name)))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _not_finite(value, (*path, str(number)))


def _split(kind: type[BaseModel], place: Path) -> tuple[Path, Path]:
    """A place in the file as the setting and what is within it: an entry, a branch of its type."""
    here: type[BaseModel] | None = kind
    for depth, name in enumerate(place):
        field = here.model_fields.get(name) if here is not None else None
        here = None if field is None else section_of(field.annotation)
        if here is None:
            return place[: depth + 1], place[depth + 1 :]
    return place, ()


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The table that a field is, also where the whole table may be left out; None for a setting."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _describe(
    kind: type[BaseModel], path: Path, found: Sequence[tuple[Path, ErrorDetails]]
) -> Iterator[str]:
    """A line for each entry that is wrong; the branches of a type that has several as one."""
    first = found[0][1]
    if first["type"] == "missing":
        yield _missing(path, _table_of(kind, path).model_fields[path[-1]])
        return
    if first["type"] == "extra_forbidden":
        yield f"expected a known setting, got an unknown name{_hint(kind, path)}"
        return
    if first["type"] == "value_error":
        yield first["msg"].removeprefix("Value error, ")
        return
    deepest = max(len(rest) for rest, _ in found)
    by_place: dict[str, list[ErrorDetails]] = {}
    for rest, detail in found:
        if len(rest) == deepest:
            branch = rest and ("[" in rest[0] or rest[0] in _BRANCHES)
            by_place.setdefault(_entry(rest[1:] if branch else rest), []).append(detail)
    for place, details in by_place.items():
        expected = " or ".join(dict.fromkeys(map(_expected, details)))
        got = details[0]["input"]
        known = [word for detail in details for word in _choices(detail)]
        yield f"{place}expected {expected}, got {_short(got)}{did_you_mean(got, known)}"


def _missing(path: Path, field: FieldInfo) -> str:
    """What to write: of a table the settings that it cannot be without."""
    section = section_of(field.annotation)
    if section is None:
        return f"expected a value, got nothing; add {_least(path[-1], field)}"
    needed = [_least(*item) for item in section.model_fields.items() if item[1].is_required()]
    return f"expected a table, got nothing; add [{'.'.join(path)}] with {', '.join(needed)}"


def _least(name: str, field: FieldInfo) -> str:
    kind = typing.get_origin(field.annotation) or field.annotation
    shape = '"..."' if kind is str else "[...]" if kind is tuple else "..."
    return f"{name} = {shape}"


def _entry(rest: Path) -> str:
    """Which entry of a list, by its number from 1, or of a table; nothing for the whole."""
    words = [f"entry {int(part) + 1}" if part.isdigit() else part for part in rest]
    return "".join(f"{word}: " for word in words if word != "[key]")


def _expected(detail: ErrorDetails) -> str:
    told = detail.get("ctx", {})
    if detail["type"] == "string_pattern_mismatch":
        pattern = str(told.get("pattern"))
        return PATTERNS.get(pattern, f"text matching {pattern}")
    words = _EXPECTED.get(detail["type"])
    return detail["msg"] if words is None else words.format(**told)


def _choices(detail: ErrorDetails) -> list[str]:
    if detail["type"] != "literal_error":
        return []
    return re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected")))


def _hint(kind: type[BaseModel], path: Path) -> str:
    """What was perhaps meant by an unknown name: one beside it, or the same in another table."""
    table, name = _table_of(kind, path), path[-1]
    close = did_you_mean(name, table.model_fields)
    if close:
        return close
    for other, field in kind.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and name in section.model_fields:
            close = f"; did you mean {other}.{name}?"
            break
    where = f"[{path[-2]}]" if len(path) > 1 else "the file"
    return f"{close or ';'} {where} takes {', '.join(table.model_fields)}"


def _meant(
    kind: type[BaseModel], path: Path, found: Sequence[tuple[Path, ErrorDetails]]
) -> Iterator[Path]:
    """The setting that an unknown name stands for: it was given, so its default says nothing."""
    if found[0][1]["type"] == "extra_forbidden":
        known = _table_of(kind, path).model_fields
        yield from ((*path[:-1], name) for name in difflib.get_close_matches(path[-1], known, 1))


def _table_of(kind: type[BaseModel], path: Path) -> type[BaseModel]:
    for name in path[:-1]:
        kind = section_of(kind.model_fields[name].annotation) or kind
    return kind


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Settings together -------------------------------------------------------------------------------


def _readable(
    kind: type[BaseModel], values: Mapping[str, Any], unreadable: set[Path], path: Path = ()
) -> BaseModel:
    """``values`` as far as they can be read: reading another setting is an AttributeError."""
    known: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        section = section_of(field.annotation)
        if (*path, name) in unreadable or name not in values:
            continue
        if section is not None:
            known[name] = _readable(section, values[name], unreadable, (*path, name))
        else:
            whole: Any = Annotated[field.annotation, field]
            known[name] = TypeAdapter(whole).validate_python(values[name])
    made = kind.model_construct(**known)
    for name in kind.model_fields:
        if (*path, name) in unreadable:
            made.__dict__.pop(name, None)
    return made


def _misfits(section: BaseModel, unreadable: set[Path], path: Path = ()) -> list[str]:
    """What does not go together in those tables of which pydantic never asked it."""
    found: list[str] = []
    for name, value in section.__dict__.items():
        inner = (*path, name)
        if isinstance(value, BaseModel) and any(p[: len(inner)] == inner for p in unreadable):
            found += _misfits(value, unreadable, inner)
    for rule in getattr(section, "rules", tuple)():
        # AttributeError: it reads a setting that is told as wrong already.
        with contextlib.suppress(AttributeError):
            for problem in rule():
                found += _named(path, [problem])
    return found


def _named(path: Path, problems: Sequence[str]) -> list[str]:
    return [f"{'.'.join(path)}: {problem}" if path else problem for problem in problems]
