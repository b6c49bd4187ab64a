"""Signed URLs of the directory store: one method, one key, one length, until one moment.

The secret is random and lives in memory only: a URL dies with the process that signed it, and a
site asks for a new one, as it does for an expired one. No error repeats a URL or its signature.
"""

from __future__ import annotations

import hmac
import re
import secrets
from typing import TYPE_CHECKING, Literal

from shared.errors import GrantError

if TYPE_CHECKING:
    from collections.abc import Callable

Method = Literal["GET", "PUT", "CREATE"]

_URL = re.compile(
    r"gradualdiff-dir:///(?P<key>[A-Za-z0-9._/-]+)"
    r"\?method=(?P<method>GET|PUT|CREATE)&length=(?P<length>[0-9]+)&expires=(?P<expires>-?[0-9]+\.[0-9]{3})"
    r"&signature=[0-9a-f]{64}"
)


class Grants:
    """Signs and checks. ``clock``: seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    def sign(self, key: str, method: Method, expires_at: float, length: int = 0) -> str:
        """A URL good for ``method`` on ``key`` before ``expires_at``, to the millisecond.

        ``length``: of what is written, in bytes; 0 for reading.
        """
        return self._url(key, method, str(length), f"{expires_at:.3f}")

    def key_of(self, url: str, method: Method, length: int = 0) -> str:
        """The key that ``url`` is good for. Raises GrantError."""
        match = _URL.fullmatch(url)
        # The whole URL is made anew and compared: there is one spelling, and no part is unsigned.
        if match is None or not hmac.compare_digest(
            self._url(*match.group("key", "method", "length", "expires")), url
        ):
            raise GrantError("signed URL: altered, or from another store; ask for a new one")
        if match["method"] != method:
            raise GrantError(
                f"signed URL: expected one for {method}, got one for {match['method']}; "
                "use each for what it was signed for"
            )
        if int(match["length"]) != length:
            raise GrantError(
                f"signed URL: expected {match['length']} bytes, got {length}; send the size that "
                "was announced"
            )
        late = self._clock() - float(match["expires"])
        if late >= 0:
            raise GrantError(f"signed URL: expired {late:.0f} s ago; ask for a new one")
        return match["key"]

    @staticmethod
    def creates(url: str) -> bool:
        """Whether ``url`` says that it is one to create with; whether it is good says key_of."""
        return "?method=CREATE&" in url

    def _url(self, key: str, method: str, length: str, expires: str) -> str:
        what = f"{key}?method={method}&length={length}&expires={expires}"
        signature = hmac.digest(self._secret, what.encode(), "sha256").hex()
        return f"gradualdiff-dir:///{what}&signature={signature}"
