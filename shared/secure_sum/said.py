"""What is said in a secure sum, and whose word it still waits for. Values only, without numpy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.secure_sum.cohort import Survivors

SEED_BYTES: Final = 32


@dataclass(frozen=True)
class Offer:
    """What goes with a masked vector. Nothing in it opens anything before two thirds answer.

    ``sha``: of the vector; ``own``: commitment to the own seed; ``pairs``: to the pair keys, by
    neighbour; ``sealed``: the shares, by the neighbour that alone can read them.
    """

    sha: str
    own: str
    pairs: Mapping[str, str]
    sealed: Mapping[str, bytes]


@dataclass(frozen=True)
class Answer:
    """What a survivor reveals, and never anything else of this attempt.

    ``own``: its own seed. ``keys``: the pair key with each neighbour that is gone. ``shares``: for
    each neighbour that survives, a share of its own seed, then of its pair keys with those of its
    neighbours that are gone, in order; 32 bytes each.
    """

    own: bytes
    keys: Mapping[str, bytes]
    shares: Mapping[str, bytes]


def commitment(seed: bytes) -> str:
    """What a site says of a seed before anybody may know it: sha256, so it cannot be exchanged."""
    return hashlib.sha256(b"gradualdiff/1/secure-sum/seed\0" + seed).hexdigest()


def share_of(bundle: bytes, place: int) -> bytes:
    """Of a holder's shares, that of secret number ``place``: 0 the own seed, then pair keys."""
    return bundle[place * SEED_BYTES : (place + 1) * SEED_BYTES]


def holders(survivors: Survivors, site: str, answers: Mapping[str, Answer]) -> dict[int, bytes]:
    """The shares of a site's secrets that were revealed, by holder: its neighbours, from 1."""
    return {
        place: answers[other].shares[site]
        for place, other in enumerate(survivors.cohort.neighbours(site), start=1)
        if other in answers and site in answers[other].shares
    }


def waits_for(survivors: Survivors, answers: Mapping[str, Answer]) -> tuple[str, ...]:
    """Those whose masks cannot be taken away yet: they are silent, and too many neighbours too."""
    return tuple(
        site
        for site in sorted(survivors.shas)
        if site not in answers
        and len(holders(survivors, site, answers)) < survivors.cohort.threshold(site)
    )
