"""Reading a TOML file: every mistake in it at once."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from shared.config.mistakes import mistakes
from shared.config.section import Section
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

AnyConfig = TypeVar("AnyConfig", bound=Section)


def parse(kind: type[AnyConfig], values: dict[str, Any], source: str) -> AnyConfig:
    """Check plain values against ``kind``. ``source`` is named in the error.

    Raises ConfigError with all that is wrong, a line each.
    """
    try:
        made, details = kind.model_validate(values), []
    except ValidationError as error:
        made, details = None, error.errors(include_url=False)
    lines = mistakes(kind, values, details)
    if made is not None and not lines:
        return made
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


def load(path: Path, kind: type[AnyConfig]) -> AnyConfig:
    """Read a TOML file as ``kind``. Raises ConfigError naming every mistake in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; give the path of a TOML file"
        ) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}; fix that line") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: is not TOML: brackets are nested too deep; close each one that is open"
        ) from None
    return parse(kind, values, str(path))
