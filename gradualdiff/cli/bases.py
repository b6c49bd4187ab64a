"""What a run's bases hold, as ``runs show`` and ``rounds show`` print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradualdiff.cli.output import console, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.runs.captured import Captured
    from shared.protocol.records import MemberRecord

ESTIMATE = (
    "Parts of its squared norm. What the directions hold is exact; what they leave is estimated "
    "from the random directions of round 1, and rather too large."
)


def print_captured(found: Captured) -> None:
    """A row for each rank, and below it the layers of which the wanted rank holds least."""
    print_table(
        f"What the bases of round {found.round} hold of the mean gradient of {found.layers} layers",
        ("rank", "all layers", "least of a layer", "median", "most"),
        [
            (one.rank, *(f"{part:.1%}" for part in (one.whole, one.least, one.median, one.most)))
            for one in found.ranks
        ],
    )
    wanted = found.ranks[-2]
    worst = ", ".join(f"{layer} {part:.1%}" for layer, part in wanted.worst.items())
    console().print(ESTIMATE, markup=False, soft_wrap=True)
    console().print(f"least at rank {wanted.rank}: {worst}", markup=False, soft_wrap=True)


def print_bases(members: Mapping[str, MemberRecord]) -> None:
    """A row for each site's own bases of a core adapter; nothing where there are none."""
    found = {site: one.bases for site, one in sorted(members.items()) if one.bases is not None}
    if found:
        print_table(
            "Bases, and what they hold of the weights' squared norm",
            ("site", "sha256", "least of a layer", "median", "most"),
            [
                (site, b.sha[:12], *(_percent(part) for part in (b.least, b.median, b.most)))
                for site, b in found.items()
            ],
        )


def _percent(part: float | None) -> str | None:
    return None if part is None else f"{part:.1%}"
