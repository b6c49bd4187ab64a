"""``gradualdiff init``: the smallest federation of one's own, as files to read and change."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import toml_value
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shared.config import FederationConfig, SiteConfig

KEY_FILE = "coordinator.key"
# Written from a template, not by tomli-w: the comments are what the file is for.
_FEDERATION = """\
# Every setting: gradualdiff's docs/reference/config.md. Those behind a # show their default.

[run]
name = {name}                 # names the run in the store; another run, another name
# rounds = {rounds}
participants = {sites}

[base]
model = {model}
# quantisation = "{quantisation}"        # how the frozen base is held; or "int8", "none"

[training]
# local_epochs = 1            # passes over a site's text in each round; or local_steps
# batch_size = {batch_size}
# learning_rate = {learning_rate:g}

[store]
# directory = "{directory}"         # everything about the run is kept here

[trust]                       # who said what is signed, and checked: docs/how-to/sign-a-run.md
key_file = {key_file}    # the coordinator's; each site has its own

[simulation]                  # the sites' own files, for gradualdiff simulate
sites = {files}
"""
_SITE = """\
[site]
name = {name}

[data]
path = {path}
{columns}
# group = "COLUMN"            # rows of one group are never split between training and held-out
# held_out_fraction = {held_out_fraction}     # never trained on: the loss is measured on it
"""


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are written.")],
    model: Annotated[str, typer.Option(help="The base model: a folder or a hub id.")],
    data: Annotated[
        list[Path], typer.Option(help="A site's text; once for each site, which is named after it.")
    ],
    columns: Annotated[
        str | None,
        typer.Option(help="Which columns hold the text: prompt=COLUMN,answer=COLUMN or so."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name (default: DIR-1).")] = None,
) -> None:
    """Write a minimal federation.toml and one file for each site. Overwrites nothing."""
    from gradualdiff.demo.data import columns_for
    from shared.base_model import located
    from shared.config import FederationConfig, SiteConfig, parse
    from shared.trust.keys import SigningKey

    sites = _site_names(data)
    run = name or f"{_word(folder.resolve().name) or 'run'}-1"
    mappings = [columns_for(path, columns) for path in data]
    base = _relative(Path(located(model, Path.cwd())), folder, model)
    tables = {
        "run": {"name": run, "participants": sites},
        "base": {"model": base},
        "trust": {"key_file": KEY_FILE},
        "simulation": {"sites": [f"{site}.toml" for site in sites]},
    }
    config = parse(FederationConfig, tables, "options")
    texts = {folder / "federation.toml": _federation(config)}
    for site, path, mapping in zip(sites, data, mappings, strict=True):
        section = {"path": _relative(path, folder, str(path)), **mapping}
        own = parse(SiteConfig, {"site": {"name": site}, "data": section}, f"--data {path}")
        texts[folder / f"{site}.toml"] = _site(own, mapping)
    _write(texts)
    key = SigningKey.kept(folder / KEY_FILE, "trust.key_file").public
    for path in texts:
        typer.echo(f"wrote {path}")
    typer.echo(f"wrote {folder / KEY_FILE}, fingerprint {key.fingerprint}")
    typer.echo(f"next: gradualdiff check {folder / 'federation.toml'}")
    typer.echo(f"      gradualdiff simulate {folder / 'federation.toml'}")


def _site_names(data: Sequence[Path]) -> list[str]:
    names = [_word(path.stem) for path in data]
    for path, name in zip(data, names, strict=True):
        if not name or names.count(name) > 1:
            raise ConfigError(
                f"--data {path}: expected a file whose name makes a site's name of its own, got "
                f"{name or 'nothing'!r}; rename the file"
            )
    return names


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:38].strip("-")


def _relative(path: Path, folder: Path, given: str) -> str:
    """Relative to ``folder``, as paths in its files are; what is no path here as it was given."""
    return os.path.relpath(path.resolve(), folder.resolve()) if path.exists() else given


def _federation(config: FederationConfig) -> str:
    return _FEDERATION.format(
        name=toml_value(config.run.name),
        rounds=config.run.rounds,
        sites=toml_value(list(config.run.participants)),
        model=toml_value(config.base.model),
        quantisation=config.base.quantisation,
        batch_size=config.training.batch_size,
        learning_rate=config.training.learning_rate,
        directory=config.store.directory,
        key_file=toml_value(config.trust.key_file if config.trust else ""),
        files=toml_value(list(config.simulation.sites)),
    )


def _site(config: SiteConfig, mapping: Mapping[str, str]) -> str:
    return _SITE.format(
        name=toml_value(config.site.name),
        path=toml_value(config.data.path),
        columns="\n".join(
            f"{setting} = {toml_value(column)}" for setting, column in mapping.items()
        ),
        held_out_fraction=config.data.held_out_fraction,
    )


def _write(texts: Mapping[Path, str]) -> None:
    there = [str(path) for path in texts if path.exists()]
    if there:
        raise ConfigError(f"{', '.join(there)}: already exists; name another DIR, or remove it")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
