"""What a site said, kept as it signed it: so that it can be checked with its public key alone."""

from __future__ import annotations

import base64
from typing import Annotated, Self

from pydantic import Field

from shared.errors import SignatureError
from shared.protocol.manifest import Schema
from shared.trust.keys import PublicText
from shared.trust.seal import Seal


class Said(Schema):
    """A signed message on record."""

    event: Annotated[str, Field(max_length=2**21)]
    """The bytes that were signed, in base64."""
    to: str
    """To whom it was said: ``run:NAME``."""
    by: PublicText
    """The public key that signed it."""
    signature: Annotated[str, Field(max_length=100)]
    """64 bytes in base64."""
    head: str | None = None
    """The newest record of the run that the site knew of, as it signed it; none if it told none."""

    @classmethod
    def of(cls, seal: Seal) -> Self:
        """A checked seal, to be kept."""
        event, signature = (base64.b64encode(b).decode() for b in (seal.data, seal.signature))
        return cls(event=event, to=seal.to, by=seal.by, signature=signature, head=seal.head)

    def seal(self) -> Seal:
        """As it came. Raises SignatureError for what is no base64."""
        try:
            event, signature = (
                base64.b64decode(text, validate=True) for text in (self.event, self.signature)
            )
        except ValueError as error:  # binascii.Error, and what is not ASCII
            raise SignatureError(f"said: expected base64, got: {error}") from None
        return Seal(event, self.to, self.by, signature, self.head)
