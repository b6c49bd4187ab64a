"""``gradualdiff config show``: the settings of a TOML file as they will be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradualdiff.cli.output import JsonOption, SetOption, print_json, say, toml_value
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from shared.config import Section

app = typer.Typer(no_args_is_help=True, help="The settings of a federation or of a site.")


@dataclass(frozen=True)
class Setting:
    """One setting, its value (None: it has none), and where that comes from."""

    table: str
    name: str
    value: Any
    source: str


@app.callback()
def config() -> None:
    """The settings of a federation or of a site."""


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A federation.toml or a site.toml.")],
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every setting as it will be used, marked where it is a default or comes from --set.

    What is printed is TOML; a setting without a value stands behind a #. Of secrets, which lie in
    files of their own, only the paths are shown.
    """
    from shared.config import FederationConfig, SiteConfig
    from shared.config.overrides import overridden
    from shared.config.reading import load

    word, told = read_either(file)
    kind = SiteConfig if word == "site" else FederationConfig
    _, given = overridden(kind, told, sets or ())
    settings = list(_settings(load(file, kind, sets or ()), told, given))
    if as_json:
        print_json(settings)
        return
    for table in dict.fromkeys(setting.table for setting in settings):
        say(f"[{table}]")
        say("\n".join(_line(setting) for setting in settings if setting.table == table) + "\n")


def read_either(file: Path) -> tuple[str, dict[str, Any]]:
    """``site`` or ``federation``, by its tables, and those. Raises ConfigError if it is neither."""
    from shared.config.reading import read_tables

    tables = read_tables(file)
    for word, table in (("site", "site"), ("federation", "run")):
        if table in tables:
            return word, tables
    raise ConfigError(
        f"{file}: expected a federation.toml with a [run] table or a site.toml with a [site] "
        "table, got neither; give another file"
    )


def _settings(
    config: Section, told: Mapping[str, Any], given: Collection[str]
) -> Iterator[Setting]:
    for table, section in config:
        for name, value in section.model_dump(mode="json").items() if section else ():
            source = "file" if name in told.get(table, ()) else "default"
            if not {table, f"{table}.{name}"}.isdisjoint(given):
                source = "--set"
            yield Setting(table, name, value, source)


def _line(setting: Setting) -> str:
    if setting.value is None:
        return f"# {setting.name} is not set"
    line = f"{setting.name} = {toml_value(setting.value)}"
    return line if setting.source == "file" else f"{line:<40}  # {setting.source}"
