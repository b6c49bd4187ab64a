"""What travels and is recorded of a secure sum: its terms, what goes with a masked delta, answers.

Bytes stand as hex digits, in messages and records alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, Strict, StringConstraints

from shared.config import Name, Sha256, canonical_json
from shared.errors import SignatureError
from shared.protocol.bounds import Figure, Most, Within
from shared.protocol.manifest import Schema
from shared.secure_sum.cohort import Attempt, Cohort, Survivors
from shared.secure_sum.exchange import ExchangeText
from shared.secure_sum.said import Answer, Offer
from shared.trust.keys import PublicKey, PublicText

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.trust.keys import SigningKey

MOST_COHORT = 1_000
MOST_LEVELS = 32_767
_MOST_NEIGHBOURS = 64  # of one site: 40 at most in a complete graph, 3 log2 of a larger cohort
_MOST_SHARES = 8_192  # hex digits
Secret = Sha256  # 32 bytes as well
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
SignatureBySite = Annotated[dict[Name, Signature], Most(MOST_COHORT)]
Shares = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})*$"), Most(_MOST_SHARES)]
SharesBySite = Annotated[dict[Name, Shares], Most(_MOST_NEIGHBOURS)]
SecretsBySite = Annotated[dict[Name, Secret], Most(_MOST_NEIGHBOURS)]
ShaBySite = Annotated[dict[Name, Sha256], Most(MOST_COHORT)]


class Exchange(Schema):
    """By what a site shares masks with others, and whose that is."""

    key: ExchangeText
    """Public half of its exchange key."""
    identity: PublicText | None = None
    """The key that the site signs with; none where nobody signs."""
    signature: Signature | None = None
    """With it: the site's signature of its name and its exchange key."""

    @classmethod
    def of(cls, site: str, key: str, signer: SigningKey | None) -> Self:
        """Of a site; signed if it has what to sign with."""
        if signer is None:
            return cls(key=key)
        signature = signer.sign("exchange", _vouched(site, key)).hex()
        return cls(key=key, identity=signer.public.text, signature=signature)

    def check(self, site: str) -> None:
        """That the identity that is named signed this. Raises SignatureError."""
        if self.identity is None or self.signature is None:
            raise SignatureError(
                f"exchange key of {site}: expected one that the site signed, got one without"
            )
        signature = bytes.fromhex(self.signature)
        PublicKey(self.identity).verify("exchange", signature, _vouched(site, self.key))

    def renews(self, before: Exchange | None) -> bool:
        """Whether the site that ``before`` is of may have lost that key and made this one.

        The same identity stands behind both; that it signed this one says ``check``.
        """
        return before is not None and None is not self.identity == before.identity


class SecureTerms(Schema):
    """How a round's deltas are masked and summed: the same at every site of its cohort."""

    number: Annotated[int, Field(ge=1), Within(1, 1_000)] = 1
    """Which attempt at the round it is, from 1."""
    roster: Annotated[dict[Name, Exchange], Most(MOST_COHORT)]
    """The cohort: by what each site shares masks."""
    levels: Annotated[int, Field(ge=1), Within(1, MOST_LEVELS)]
    """Whole numbers to either side of zero."""
    reaches: Annotated[
        tuple[Annotated[float, Field(gt=0), Figure], ...], Strict(False), Most(100_000)
    ]
    """By tensor of the delta, in the order of their names: the largest value that passes uncut."""

    def cohort(self, run: str, round_number: int) -> Cohort:
        """Raises ProtocolError for one that protects nobody."""
        keys = {site: exchange.key for site, exchange in self.roster.items()}
        return Cohort(Attempt(run, round_number, self.number), keys)

    @property
    def identities(self) -> dict[str, PublicKey]:
        """What each site signs with; of none where not all do."""
        named = {site: exchange.identity for site, exchange in self.roster.items()}
        if None in named.values():
            return {}
        return {site: PublicKey(text) for site, text in named.items() if text is not None}


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


def _vouched(site: str, key: str) -> bytes:
    return canonical_json([site, key])


def _hex(values: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}


def _bytes(values: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in values.items()}
