"""A secure round: on which terms it is masked, and whose answers its sum still waits for. Pure.

The decision that is on record (``closing.json``) is the set of survivors: nothing is asked before,
and no other set is ever asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from shared.config.privacy_rules import fewest_deltas
from shared.config.secure import fewest_survivors, levels_of
from shared.methods.averaging import delta_manifest
from shared.protocol.secure import MOST_LEVELS, SecureTerms, survivors_of
from shared.secure_sum.said import waits_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shared.config import FederationConfig
    from shared.protocol.manifest import Manifest
    from shared.protocol.records import (
        ClosedRecord,
        ClosingRecord,
        MemberRecord,
        OpenedRecord,
        UnmaskedRecord,
    )
    from shared.protocol.secure import Exchange
    from shared.secure_sum.cohort import Survivors

STEPS_OF_NOISE: Final = 16  # of rounding, times the root of how many numbers: to one clip


def terms_for(
    config: FederationConfig,
    manifest: Manifest,
    members: Mapping[str, MemberRecord],
    selected: tuple[str, ...],
    number: int,
    before: ClosedRecord | None,
    attempt: int = 1,
) -> SecureTerms | None:
    """How the deltas of round ``number`` are masked; None where the run has no secure sum.

    ``manifest``: the run's; ``before``: the result of the round before, None for the first.
    """
    if not config.aggregation.secure:
        return None
    trained = delta_manifest(manifest, config, selected[0], number)
    roster = {site: one for site in selected if (one := members[site].exchange) is not None}
    if config.privacy is not None and config.privacy.of_sites:
        return _terms_of_noise(roster, trained, config.privacy.clip, attempt)
    names = sorted(spec.name for spec in manifest.tensors)
    known = before.reaches if before is not None else None
    reaches = dict(zip(names, known, strict=True)) if known is not None else {}
    first = config.aggregation.secure_reach
    return SecureTerms(
        number=attempt,
        roster=roster,
        levels=levels_of(config),
        reaches=tuple(
            reaches.get(name, first) for name in sorted(spec.name for spec in trained.tensors)
        ),
    )


def must_reopen(
    opened: OpenedRecord,
    there: Collection[str],
    keys: Mapping[str, Exchange | None],
    waiting: Collection[str],
) -> bool:
    """Whether a round that is not decided needs another attempt.

    ``there``: the sites of it that were not taken out. Where they are too few, no site would reveal
    anything for them. ``keys``: the sites' exchange keys now; ``waiting``: who sent nothing yet. Of
    these one that lost its key can send nothing. Nobody was asked to reveal anything yet: that
    comes after a decision.
    """
    if opened.secure is None:
        return False
    roster = opened.secure.roster
    renewed = any(keys.get(site, roster[site]) != roster[site] for site in waiting)
    return renewed or len(there) < fewest_survivors(len(roster))


def _terms_of_noise(
    roster: dict[str, Exchange], trained: Manifest, clip: float, attempt: int
) -> SecureTerms:
    """A scale on which sites' noise is added: fine enough that rounding costs 3 % of ``clip``.

    One number may be all of a delta, and is cut off nowhere: the ring holds twice that of each.
    """
    numbers = sum(spec.elements for spec in trained.tensors)
    levels = min(2 * STEPS_OF_NOISE * math.ceil(math.sqrt(numbers)), MOST_LEVELS)
    reaches = (2 * clip,) * len(trained.tensors)
    return SecureTerms(number=attempt, roster=roster, levels=levels, reaches=reaches)


def lacks_survivors(config: FederationConfig, opened: OpenedRecord, count: int) -> str | None:
    """Why a decision that counts ``count`` deltas would never be unmasked; None if it would.

    Nor is one made with fewer deltas than sites' noise is made for.
    """
    if config.privacy is not None and config.privacy.of_sites and count < fewest_deltas(config):
        return (
            f"expected {fewest_deltas(config)} deltas or more, got {count}: fewer have less noise "
            'together than the run promises (privacy.unit = "site")'
        )
    if opened.secure is None:
        return None
    wanted = fewest_survivors(len(opened.secure.roster))
    if count >= wanted:
        return None
    return (
        f"expected {wanted} masked deltas of {len(opened.secure.roster)} or more, got {count}: "
        "sites reveal nothing for fewer (aggregation.secure)"
    )


def survivors_in(
    run: str, opened: OpenedRecord | None, closing: ClosingRecord | None
) -> Survivors | None:
    """The survivors of a decision; None without one, and where nothing is masked."""
    if opened is None or opened.secure is None or closing is None:
        return None
    shas = {item.site: item.sha for item in closing.inputs}
    return survivors_of(opened.secure, run, opened.round, shas)


def is_enough(survivors: Survivors, answers: Mapping[str, UnmaskedRecord]) -> bool:
    """Whether these answers open the sum."""
    return not waits_for(survivors, {s: record.revealed.answer for s, record in answers.items()})
