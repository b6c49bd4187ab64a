"""A site's part: its vector masked, and what its neighbours get so that it can be done without.

    y = q + PRG(own seed) + sum of PRG(pair key) towards later sites - towards earlier ones

(Bonawitz et al., CCS 2017, with keys that last a run). The own seed and the pair keys are shared
among the neighbours (Shamir), so that two thirds of them can stand in for a site that went away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.secure_sum import shamir
from shared.secure_sum.masks import Keystream
from shared.secure_sum.said import Offer, commitment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shared.secure_sum.cohort import Cohort
    from shared.secure_sum.exchange import ExchangeKey, Pair
    from shared.secure_sum.ring import Ring


class Masking:
    """One site's masks for one attempt, taken in the order of the vector's parts.

    ``pairs``: its own, see :func:`pairs_of`. ``seed``: 32 random bytes, for this attempt only.
    """

    def __init__(self, cohort: Cohort, site: str, pairs: Mapping[str, Pair], seed: bytes) -> None:
        self._cohort, self._site, self._seed, self._pairs = cohort, site, seed, pairs
        self._keys = {other: pair.mask_key(cohort.attempt) for other, pair in pairs.items()}
        self._own = Keystream(seed)
        self._streams = {other: Keystream(secret) for other, secret in self._keys.items()}

    def mask(self, words: NDArray[Any], ring: Ring) -> NDArray[Any]:
        """The next part of the vector, flat words of the ring; in place, and reduced."""
        self._own.add_to(words)
        for other, stream in self._streams.items():
            stream.add_to(words, minus=other < self._site)
        return ring.reduce(words)

    def offer(self, sha: str) -> Offer:
        """What is said of the vector ``sha``."""
        cohort, site = self._cohort, self._site
        secrets = b"".join([self._seed, *self._keys.values()])
        shares = shamir.split(secrets, cohort.threshold(site), len(self._keys))
        sealed = {
            other: self._pairs[other].seal(share, cohort.attempt, site, other, sha)
            for other, share in zip(self._keys, shares, strict=True)
        }
        pairs = {other: commitment(secret) for other, secret in self._keys.items()}
        return Offer(sha, commitment(self._seed), pairs, sealed)


def pairs_of(cohort: Cohort, site: str, key: ExchangeKey) -> dict[str, Pair]:
    """What a site shares with each neighbour, in order. Raises ProtocolError for a false key."""
    return {
        other: key.pair(cohort.roster[other], cohort.attempt.run)
        for other in cohort.neighbours(site)
    }
