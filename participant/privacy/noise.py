"""Random numbers that only the site can repeat: ChaCha20 under a secret key.

Whoever knew them could take the noise off a delta again. So nothing here comes from the run's seed,
and a key is never printed, logged or sent. The same key and parts give the same numbers, so that a
training that was killed goes on with the noise that it began with.

Noise is computed in double precision and used in single; that finite precision is not hardened
against an attacker who knows a sum to its last bits (Mironov 2012).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from shared.config import canonical_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BYTES = 32


class Secret:
    """A key of 32 bytes, and the keys and streams that are made from it."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"secret: expected {KEY_BYTES} bytes, got {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "Secret(...)"

    def derive(self, *parts: str | int) -> Secret:
        """The key for these parts: HMAC-SHA256 of their canonical JSON."""
        return Secret(hmac.digest(self._key, canonical_json(list(parts)), "sha256"))

    @property
    def seed(self) -> int:
        """63 bits of the key, for a generator that is not cryptographic."""
        return int.from_bytes(self._key[:8], "big") & (2**63 - 1)

    @property
    def fingerprint(self) -> str:
        """A digest that tells one key from another and says nothing of either."""
        return hashlib.sha256(b"gradualdiff privacy seed\0" + self._key).hexdigest()

    def stream(self) -> SecretStream:
        """The key's numbers, from the first on. A key is for one stream."""
        return SecretStream(self._key)


class SecretStream:
    """The keystream of one key as numbers, each used once."""

    def __init__(self, key: bytes) -> None:
        self._keystream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Independent words of 64 bits: uint64 [count]."""
        return np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Independent numbers in (0, 1], multiples of 2^-53: float64 [count]."""
        words = self.words(count)
        return np.asarray(((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53, np.float64)

    def normal(self, count: int) -> NDArray[Any]:
        """Independent standard normal numbers, float64 [count] (Box and Muller 1958)."""
        pairs = -(-count // 2)
        radius = np.sqrt(-2.0 * np.log(self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def chosen(self, count: int, rate: float) -> list[int]:
        """Poisson sampling: each of ``count`` indices by itself with probability ``rate``."""
        found: list[int] = np.flatnonzero(self.uniform(count) <= rate).tolist()
        return found
