"""The coordinator's part: seeds from answers, and the sum without its masks.

Every seed is compared with the commitment that came with the vector: what comes out is the sum of
what was sent, or nothing comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import ProtocolError
from shared.secure_sum import shamir
from shared.secure_sum.masks import Keystream
from shared.secure_sum.said import SEED_BYTES, commitment, holders, share_of, waits_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shared.secure_sum.cohort import Survivors
    from shared.secure_sum.ring import Ring
    from shared.secure_sum.said import Answer, Offer


def check_answer(
    survivors: Survivors, site: str, told: Answer, offers: Mapping[str, Offer]
) -> None:
    """That a survivor revealed what it committed to. Raises ProtocolError.

    Whether shares are right is seen when they are joined.
    """
    if site not in survivors.shas:
        raise ProtocolError(f"answer: expected one of the survivors, got {site}")
    gone = survivors.gone(site)
    mine = offers[site]
    if (
        commitment(told.own) != mine.own
        or {*told.keys} != {*gone}
        or any(commitment(told.keys[other]) != mine.pairs[other] for other in gone)
    ):
        raise ProtocolError(
            f"answer of {site}: expected the seeds that it committed to with vector "
            f"{mine.sha[:12]}, got others"
        )
    for other, shares in told.shares.items():
        known = other in survivors.shas and site in survivors.cohort.neighbours(other)
        if not known or len(shares) != SEED_BYTES * (1 + len(survivors.gone(other))):
            raise ProtocolError(f"answer of {site}: expected no such shares of {other[:64]}")


def check_offers(survivors: Survivors, offers: Mapping[str, Offer]) -> None:
    """That every two survivors mean the same pair key. Raises ProtocolError that names them."""
    for site in survivors.shas:
        for other in survivors.cohort.neighbours(site):
            if other in survivors.shas and offers[site].pairs[other] != offers[other].pairs[site]:
                raise ProtocolError(
                    f"masks of {site} and {other}: expected one pair key, got two; one of them "
                    "uses another exchange key than its cohort was told"
                )


@dataclass(frozen=True)
class Opened:
    """The seeds of all that is left of masks in the sum: those to be subtracted, those to be added.

    Pair masks between survivors cancel out and are never known.
    """

    minus: tuple[bytes, ...]
    plus: tuple[bytes, ...]

    def streams(self) -> Unmasking:
        """From the vector's beginning."""
        return Unmasking(self)


def open_masks(
    survivors: Survivors, answers: Mapping[str, Answer], offers: Mapping[str, Offer]
) -> Opened:
    """The seeds, from checked answers. Raises ProtocolError where :func:`waits_for` names sites.

    Also for shares that do not fit the commitment: some neighbour told a false one.
    """
    waiting = waits_for(survivors, answers)
    if waiting:
        raise ProtocolError(
            f"sum of round {survivors.cohort.attempt.round}: expected the answers of "
            f"{', '.join(waiting)} or of two thirds of their neighbours, got fewer"
        )
    minus: list[bytes] = []
    plus: list[bytes] = []
    for site in sorted(survivors.shas):
        gone = survivors.gone(site)
        told = answers.get(site)
        if told is not None:
            own, keys = told.own, told.keys
        else:
            own, keys = _joined(survivors, site, answers, offers[site])
        minus.append(own)
        for other in gone:
            (plus if other < site else minus).append(keys[other])
    return Opened(tuple(minus), tuple(plus))


class Unmasking:
    """What is left of masks, taken away part by part, in the order of the vector's parts."""

    def __init__(self, opened: Opened) -> None:
        self._minus = [Keystream(seed) for seed in opened.minus]
        self._plus = [Keystream(seed) for seed in opened.plus]

    def unmask(self, total: NDArray[Any], ring: Ring) -> NDArray[Any]:
        """The next part of the sum of vectors, flat words that may have wrapped around; in place.

        What comes out are words of the ring; ``Ring.recentre`` makes them whole numbers.
        """
        for stream in self._minus:
            stream.add_to(total, minus=True)
        for stream in self._plus:
            stream.add_to(total)
        return ring.reduce(total)


def _joined(
    survivors: Survivors, site: str, answers: Mapping[str, Answer], offer: Offer
) -> tuple[bytes, dict[str, bytes]]:
    held = holders(survivors, site, answers)
    needed = dict(list(held.items())[: survivors.cohort.threshold(site)])
    secrets = shamir.join(needed)
    gone = survivors.gone(site)
    own = share_of(secrets, 0)
    keys = {other: share_of(secrets, at) for at, other in enumerate(gone, start=1)}
    if commitment(own) != offer.own or any(
        commitment(keys[other]) != offer.pairs[other] for other in gone
    ):
        raise ProtocolError(
            f"shares of {site}: expected ones that make up what it committed to, got others; a "
            "neighbour told a false one, or this site dealt false ones"
        )
    return own, keys
