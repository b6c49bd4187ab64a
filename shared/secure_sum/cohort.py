"""Who sums with whom: an attempt at a round, its cohort, and the set of those who are still there.

All sites compute the same from the same roster. With more than 40 sites each is masked towards
some of the others only: a ring of the sites in an order drawn from the roster, each with its
nearest on both sides (the random Harary graph of Bell et al., CCS 2020, eprint 2020/704).
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Final

from shared.config.secure import SMALLEST_COHORT, fewest_survivors, two_thirds
from shared.config.values import canonical_json
from shared.errors import ProtocolError, SignatureError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.trust.keys import PublicKey, SigningKey

COMPLETE_UP_TO: Final = 40
_FEWEST_NEIGHBOURS: Final = 20


@dataclass(frozen=True)
class Attempt:
    """One try, from 1, of one round of one run."""

    run: str
    round: int
    number: int


@dataclass(frozen=True)
class Cohort:
    """The sites of an attempt. ``roster``: each one's exchange key, as text."""

    attempt: Attempt
    roster: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises ProtocolError for too few sites, or two that have one key."""
        if len(self.roster) < SMALLEST_COHORT or len({*self.roster.values()}) < len(self.roster):
            raise ProtocolError(
                f"cohort of round {self.attempt.round}: expected {SMALLEST_COHORT} sites or more, "
                f"each with a key of its own, got {len(self.roster)} sites with "
                f"{len({*self.roster.values()})} keys; fewer would give a site's part away"
            )

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """In order."""
        return tuple(sorted(self.roster))

    @property
    def fewest(self) -> int:
        """So many must be there at the end, or nobody reveals anything."""
        return fewest_survivors(len(self.roster))

    @cached_property
    def digest(self) -> str:
        """sha256 of run, round, attempt and roster."""
        about = [self.attempt.run, self.attempt.round, self.attempt.number, dict(self.roster)]
        return hashlib.sha256(canonical_json(about)).hexdigest()

    def neighbours(self, site: str) -> tuple[str, ...]:
        """Those that a site shares masks with, in order."""
        return _graph(self.digest, self.sites)[site]

    def threshold(self, site: str) -> int:
        """So many of a site's neighbours can open what it shared among them."""
        return two_thirds(len(self.neighbours(site)))


@lru_cache(maxsize=8)
def _graph(digest: str, sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Each site's neighbours, in order; drawn from the cohort's digest.

    Kept: a coordinator asks with each delta and each answer of an attempt, and gets it built once.
    """
    count = len(sites)
    if count <= COMPLETE_UP_TO:
        return {site: tuple(o for o in sites if o != site) for site in sites}
    reach = max(_FEWEST_NEIGHBOURS, math.ceil(3 * math.log2(count))) // 2
    circle = sorted(sites, key=partial(_place, digest))
    return {
        site: tuple(
            sorted(circle[(at + step) % count] for step in range(-reach, reach + 1) if step)
        )
        for at, site in enumerate(circle)
    }


def _place(digest: str, site: str) -> str:
    return hashlib.sha256(canonical_json([digest, site])).hexdigest()


@dataclass(frozen=True)
class Survivors:
    """Those whose vectors are summed. ``shas``: sha256 of each one's masked vector."""

    cohort: Cohort
    shas: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises ProtocolError for strangers, for what is no sha256, and for too few."""
        strangers = self.shas.keys() - self.cohort.roster.keys()
        if strangers:
            raise ProtocolError(
                f"survivors: expected sites of the cohort, got {', '.join(sorted(strangers)[:5])}"
            )
        wrong = [s for s, sha in self.shas.items() if not re.fullmatch("[0-9a-f]{64}", sha)]
        if wrong or len({*self.shas.values()}) < len(self.shas):
            raise ProtocolError("survivors: expected the sha256 of each one's vector, got others")
        if len(self.shas) < self.cohort.fewest:
            raise ProtocolError(
                f"survivors: expected {self.cohort.fewest} or more of the cohort's "
                f"{len(self.cohort.roster)} sites, got {len(self.shas)}; a sum of fewer says too "
                "much of each"
            )

    @cached_property
    def signed(self) -> bytes:
        """What sites sign: cohort and set."""
        return canonical_json([self.cohort.digest, dict(self.shas)])

    @property
    def digest(self) -> str:
        """sha256 of it."""
        return hashlib.sha256(self.signed).hexdigest()

    def gone(self, site: str) -> tuple[str, ...]:
        """A site's neighbours that are no survivors, in order."""
        return tuple(n for n in self.cohort.neighbours(site) if n not in self.shas)

    def sign(self, key: SigningKey) -> bytes:
        """A site's signature of the set."""
        return key.sign("survivors", self.signed)

    def check_signatures(
        self, signatures: Mapping[str, bytes], identities: Mapping[str, PublicKey]
    ) -> None:
        """That two thirds of the whole cohort signed this very set. Raises ProtocolError.

        Two sets that both pass have a third of the cohort in common, which signed twice.
        """
        valid = [
            site
            for site in signatures.keys() & self.cohort.roster.keys() & identities.keys()
            if _is_signed(identities[site], signatures[site], self.signed)
        ]
        wanted = two_thirds(len(self.cohort.roster))
        if len(valid) < wanted:
            raise ProtocolError(
                f"survivors: expected the signatures of {wanted} of the cohort's "
                f"{len(self.cohort.roster)} sites on this set, got {len(valid)} that are valid; "
                "the coordinator may have shown others another set"
            )


def _is_signed(identity: PublicKey, signature: bytes, data: bytes) -> bool:
    try:
        identity.verify("survivors", signature, data)
    except SignatureError:
        return False
    return True
