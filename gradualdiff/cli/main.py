"""The ``gradualdiff`` command. Commands import what they need when they run, not before."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gradualdiff.cli import (
    audit,
    chat,
    check,
    config,
    dashboard,
    demo,
    doctor,
    init,
    queues,
    reproduce,
    rounds,
    runs,
    serve,
    setup,
    simulate,
    site,
    sites,
    tune_codec,
)
from gradualdiff.cli.output import complain
from shared.errors import GradualDiffError, StoreError

app = typer.Typer(
    name="gradualdiff",
    help="Fine-tune one language model at many sites that share no text (GradualDiff-Fed).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("reproduce")(reproduce.reproduce)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("simulate")(simulate.simulate)
app.command("tune-codec")(tune_codec.tune_codec)
app.command("setup")(setup.setup)
app.command("dashboard")(dashboard.dashboard)
app.command("coordinator")(serve.coordinator)
app.command("participant")(serve.participant)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(site.app, name="site")
app.add_typer(sites.app, name="sites")
app.add_typer(runs.app, name="runs")
app.add_typer(rounds.app, name="rounds")
app.add_typer(queues.app, name="queues")
app.add_typer(audit.app, name="audit")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gradualdiff-fed {version('gradualdiff-fed')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fine-tune one language model at many sites that share no text (GradualDiff-Fed)."""


def main() -> None:
    """The console script: errors of our tree become one line and their exit code."""
    try:
        app(prog_name="gradualdiff")
    except GradualDiffError as error:
        sys.exit(complain(error))
    except OSError as error:
        where = error.filename or "a file"
        sys.exit(complain(StoreError(f"{where}: {error.strerror or error}; fix that path")))


if __name__ == "__main__":
    main()
