"""What travels and is recorded of a secure sum: its terms, what goes with a masked delta, answers.

Bytes stand as hex digits, in messages and records alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, Strict, StringConstraints

from shared.config import Name, Sha256
from shared.protocol.bounds import Figure, Most, Within
from shared.protocol.manifest import Schema
from shared.secure_sum.cohort import Attempt, Cohort, Survivors
from shared.secure_sum.exchange import ExchangeText
from shared.secure_sum.said import Answer, Offer

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_COHORT = 1_000
_MOST_NEIGHBOURS = 64  # of one site: 40 at most in a complete graph, 3 log2 of a larger cohort
_MOST_SHARES = 8_192  # hex digits
Secret = Sha256  # 32 bytes as well
Shares = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})*$"), Most(_MOST_SHARES)]
SharesBySite = Annotated[dict[Name, Shares], Most(_MOST_NEIGHBOURS)]
SecretsBySite = Annotated[dict[Name, Secret], Most(_MOST_NEIGHBOURS)]
ShaBySite = Annotated[dict[Name, Sha256], Most(MOST_COHORT)]


class SecureTerms(Schema):
    """How a round's deltas are masked and summed: the same at every site of its cohort."""

    number: Annotated[int, Field(ge=1), Within(1, 1_000)] = 1
    """Which attempt at the round it is, from 1."""
    roster: Annotated[dict[Name, ExchangeText], Most(MOST_COHORT)]
    """The cohort: each site's exchange key."""
    levels: Annotated[int, Field(ge=1), Within(1, 32_767)]
    """Whole numbers to either side of zero."""
    reaches: Annotated[
        tuple[Annotated[float, Field(gt=0), Figure], ...], Strict(False), Most(100_000)
    ]
    """By tensor of the delta, in the order of their names: the largest value that passes uncut."""

    def cohort(self, run: str, round_number: int) -> Cohort:
        """Raises ProtocolError for one that protects nobody."""
        return Cohort(Attempt(run, round_number, self.number), self.roster)


class MaskedWith(Schema):
    """What goes with a masked delta, so that its masks can be taken from a sum."""

    own: Sha256
    """Commitment to the site's own seed."""
    pairs: SecretsBySite
    """By neighbour: commitment to the key that the two share in this round."""
    sealed: SharesBySite
    """By neighbour: shares of all these, which it alone can read."""

    @classmethod
    def of(cls, offer: Offer) -> Self:
        """As it travels."""
        sealed = {site: data.hex() for site, data in offer.sealed.items()}
        return cls(own=offer.own, pairs=dict(offer.pairs), sealed=sealed)

    def offer(self, sha: str) -> Offer:
        """Of the vector ``sha``."""
        sealed = {site: bytes.fromhex(text) for site, text in self.sealed.items()}
        return Offer(sha, self.own, self.pairs, sealed)


class Revealed(Schema):
    """A survivor's one answer."""

    own: Secret
    """The seed of the site's own mask."""
    keys: SecretsBySite
    """By neighbour that is gone: the key that the two shared in this round."""
    shares: SharesBySite
    """By neighbour that survives: shares of its seeds, to stand in for it."""

    @classmethod
    def of(cls, told: Answer) -> Self:
        """As it travels."""
        return cls(own=told.own.hex(), keys=_hex(told.keys), shares=_hex(told.shares))

    @property
    def answer(self) -> Answer:
        """As it is computed with."""
        return Answer(bytes.fromhex(self.own), _bytes(self.keys), _bytes(self.shares))


def survivors_of(
    terms: SecureTerms, run: str, round_number: int, shas: Mapping[str, str]
) -> Survivors:
    """The set that a decision names. Raises ProtocolError for one that nobody reveals for."""
    return Survivors(terms.cohort(run, round_number), dict(shas))


def _hex(values: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}


def _bytes(values: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in values.items()}
