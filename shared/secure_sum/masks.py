"""Masks: what a 256-bit seed expands to, uniform over the whole ring.

The keystream of ChaCha20 (RFC 8439) with the seed as its key, nonce and counter 0, read as
little-endian words of the ring. A seed is used for one vector and never again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from shared.secure_sum.said import SEED_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE: Final = 1 << 17  # bytes: what a core's cache holds
_ZEROS: Final = bytes(_PIECE)


class Keystream:
    """One seed's mask, taken from its beginning on, as far as a vector goes."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"seed: expected {SEED_BYTES} bytes, got {len(seed)}")
        # 16 bytes: counter and nonce.
        self._cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
        self._piece = bytearray(_PIECE)

    def add_to(self, words: NDArray[Any], *, minus: bool = False) -> None:
        """Add the next words of the mask to flat ``words``, in place, or subtract them.

        Not reduced: they wrap around as words do.
        """
        step = _PIECE // words.itemsize
        take = np.subtract if minus else np.add
        mask = np.frombuffer(self._piece, words.dtype)
        for begin in range(0, words.size, step):
            part = words[begin : begin + step]
            size = part.size * words.itemsize
            self._cipher.update_into(memoryview(_ZEROS)[:size], self._piece)
            take(part, mask[: part.size], out=part)
