"""A site's one answer: what may be known once it is settled whose vectors are summed.

Of a survivor the neighbours reveal shares of its own seed, of one that is gone the pair keys, and
never both. That holds because a site is bound (:class:`Bond`): to the newest attempt at a round
that it masked for, to one set of survivors in it, and to no further attempt once it answered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.errors import ProtocolError
from shared.secure_sum.said import SEED_BYTES, Answer, share_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.secure_sum.cohort import Attempt, Survivors
    from shared.secure_sum.exchange import Pair


@dataclass(frozen=True)
class Bond:
    """What a site is bound to in one round; it is kept before anything that follows is said.

    ``attempt``: the newest it masked for; ``survivors``: digest of the set that it signed or
    answered for, if any; ``answered``: whether it revealed anything.
    """

    attempt: int
    survivors: str = ""
    answered: bool = False

    def to_attempt(self, attempt: Attempt) -> Bond:
        """Bound to a further attempt. Raises ProtocolError for an earlier one, or after an answer.

        After an answer: two sums over sets that differ by one site give that one's part away.
        """
        if attempt.number < self.attempt:
            raise ProtocolError(
                f"attempt: expected {self.attempt} or later of round {attempt.round}, got "
                f"{attempt.number}; this site is bound to the newest"
            )
        if self.answered:
            raise ProtocolError(
                f"attempt {attempt.number} of round {attempt.round}: expected none after this site "
                f"answered for attempt {self.attempt}; two sums of one round would give single "
                "sites' parts away"
            )
        return self if attempt.number == self.attempt else Bond(attempt.number)

    def to_survivors(self, survivors: Survivors, *, answered: bool = False) -> Bond:
        """Bound to a set. Raises ProtocolError where it is bound to another, or another attempt."""
        attempt = survivors.cohort.attempt
        if attempt.number != self.attempt:
            raise ProtocolError(
                f"attempt: expected {self.attempt} of round {attempt.round}, which this site "
                f"masked for last, got {attempt.number}"
            )
        if self.survivors not in {"", survivors.digest}:
            raise ProtocolError(
                f"survivors of round {attempt.round}, attempt {attempt.number}: expected the set "
                f"{self.survivors[:12]} that this site stands by, got {survivors.digest[:12]}; the "
                "coordinator named two sets: tell its operator, and the other sites"
            )
        return replace(self, survivors=survivors.digest, answered=self.answered or answered)


def answer(
    survivors: Survivors,
    site: str,
    pairs: Mapping[str, Pair],
    seed: bytes,
    sha: str,
    sealed: Mapping[str, bytes],
) -> Answer:
    """What this site reveals. The caller is bound to ``survivors`` and has kept that.

    ``pairs``: its own, see ``pairs_of``. ``seed``, ``sha``: of its own vector; ``sealed``: what its
    surviving neighbours sealed for it.
    A neighbour whose shares do not come, or come altered, is left out: others stand in for it.
    Raises ProtocolError where this site's vector is not the one that it sent.
    """
    if survivors.shas.get(site) != sha:
        raise ProtocolError(
            f"survivors: expected this site with its vector {sha[:12]}, got "
            f"{survivors.shas.get(site, 'none')[:12]}; nothing is revealed for another"
        )
    cohort = survivors.cohort
    keys = {other: pairs[other].mask_key(cohort.attempt) for other in survivors.gone(site)}
    shares = {}
    for other, pair in pairs.items():
        if other not in survivors.shas or other not in sealed:
            continue
        try:
            bundle = pair.unseal(sealed[other], cohort.attempt, other, site, survivors.shas[other])
        except ProtocolError:
            continue
        theirs = cohort.neighbours(other)
        if len(bundle) == SEED_BYTES * (1 + len(theirs)):
            places = [0, *(1 + theirs.index(one) for one in survivors.gone(other))]
            shares[other] = b"".join(share_of(bundle, place) for place in places)
    return Answer(seed, keys, shares)
