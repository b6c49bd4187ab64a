"""``gradualdiff tune-codec``: a short local run for each codec, and what it keeps of the gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import JsonOption, SetOption, at_least, print_json, print_table, say
from gradualdiff.units import octets
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    from gradualdiff.tuning.comparing import Compared


def tune_codec(
    federation: Annotated[
        Path, typer.Argument(help="The run's federation.toml, with its sites' files.")
    ],
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds of each arm.", callback=at_least(1))
    ] = 5,
    arms: Annotated[
        str,
        typer.Option(
            "--arms", help="Some of fp32, int8, int4, sign, topk, core, ia3, with commas between."
        ),
    ] = "",
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Draw loss against bytes: a .png, .pdf or .svg file."),
    ] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a little with each codec, and say what a round costs and what it keeps of the gain.

    Everything happens in this process, on the files that simulation.sites names; nothing is
    written to a store. An arm's gain is set against that of fp32 with the same seed. Few rounds
    show which codec is too coarse, and no differences of a percent.
    """
    from gradualdiff.cli.simulate import stop_on_signal
    from gradualdiff.figures.held_out import check_picture
    from gradualdiff.tuning.arms import chosen
    from gradualdiff.tuning.comparing import compare_arms
    from shared.log import configure

    configure(level="warning")
    names = [name.strip() for name in arms.split(",") if name.strip()]
    wanted = chosen(names)
    if picture is not None:
        check_picture(picture, "--picture")

    def report(arm: str, done: int) -> None:
        if done == rounds and not as_json:
            say(f"{arm}: done", stderr=True)

    try:
        with stop_on_signal() as should_stop:
            found = compare_arms(
                federation, wanted, rounds, sets or (), report=report, should_stop=should_stop
            )
    except InterruptedRunError:
        raise InterruptedRunError(
            "tune-codec was stopped; it keeps nothing, and begins anew at its next start"
        ) from None
    if picture is not None:
        from gradualdiff.figures.frontier import write_frontier
        from gradualdiff.tuning.outcomes import frontier

        write_frontier(found.arms, frontier(found.arms), found.base, picture)
    if as_json:
        print_json(found)
        return
    _print(found)
    if picture is not None:
        say(f"wrote {picture}")


def _print(found: Compared) -> None:
    from gradualdiff.tuning.outcomes import frontier

    best = {outcome.arm for outcome in frontier(found.arms)}
    print_table(
        f"Run {found.run}: {found.rounds} rounds of {found.sites} sites; "
        f"held-out loss of the base model {found.base:.4f}",
        (
            "arm",
            "up",
            "down",
            "values",
            "rate",
            "loss",
            "of the gain",
            "best for its bytes",
            "what",
        ),
        [
            (
                one.arm,
                octets(one.up),
                octets(one.down),
                f"{one.values:,}",
                f"{one.rate:.3g}",
                "diverged" if one.loss is None else one.loss,
                None if one.share is None else f"{one.share:.1%}",
                "yes" if one.arm in best else "",
                one.says,
            )
            for one in found.arms
        ],
    )
    say("bytes: of one site in one round, mean; nothing of messages")
    if all(one.share is None for one in found.arms):
        say(
            "fp32 gained nothing, so there are no shares of it: give more --rounds, or another rate"
        )
