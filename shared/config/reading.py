"""Reading a TOML file: every mistake in it at once."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from shared.config.mistakes import mistakes
from shared.config.overrides import overridden
from shared.config.section import Section
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

AnyConfig = TypeVar("AnyConfig", bound=Section)


def parse(
    kind: type[AnyConfig], values: dict[str, Any], source: str, given: Collection[str] = ()
) -> AnyConfig:
    """Check plain values against ``kind``. ``source`` is named in the error.

    ``given``: settings that come from ``--set``, named so. Raises ConfigError with all that is
    wrong, a line each.
    """
    try:
        made, details = kind.model_validate(values), []
    except ValidationError as error:
        made, details = None, error.errors(include_url=False)
    lines = mistakes(kind, values, details)
    if made is not None and not lines:
        return made
    lines = [f"--set {line}" if line.split(":")[0] in given else line for line in lines]
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


def load(path: Path, kind: type[AnyConfig], overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a TOML file as ``kind``; ``overrides``: ``section.key=value`` each, instead of its own.

    Raises ConfigError naming every mistake in both.
    """
    values, given = overridden(kind, read_tables(path), overrides)
    try:
        return parse(kind, values, f"{path} with --set" if given else str(path), given)
    except RecursionError:
        raise ConfigError(
            f"{path}: expected settings in tables, got names nested too deep; see config show"
        ) from None


def read_tables(path: Path) -> dict[str, Any]:
    """What a TOML file says, unchecked. Raises ConfigError for a file that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; give the path of a TOML file"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}; fix that line") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: is not TOML: brackets are nested too deep; close each one that is open"
        ) from None
