"""Vectors over the integers modulo ``2**bits``: how many bits a sum needs, and how they are packed.

Sums wrap around in a machine word and are reduced once, since ``2**bits`` divides ``2**16`` and
``2**32``: exact, and the same in whatever order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.errors import ConfigError, DecodeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_BITS: Final = 32
_PLANE: Final = 8  # bits


@dataclass(frozen=True)
class Ring:
    """The integers modulo ``2**bits``, 1 <= bits <= 32. A vector of them is an array of words."""

    bits: int

    def __post_init__(self) -> None:
        """Raises ConfigError for more bits than a word has."""
        if not 1 <= self.bits <= MOST_BITS:
            raise ConfigError(
                f"secure sum: expected a ring of 1 to {MOST_BITS} bits, got {self.bits}; take a "
                "coarser codec, smaller weights or fewer sites"
            )

    @property
    def word(self) -> np.dtype[Any]:
        """What one number is kept in: 2 bytes up to 16 bits, else 4; little-endian."""
        return np.dtype("<u2" if self.bits <= 16 else "<u4")

    def encode(self, values: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Whole numbers of any sign as words."""
        return (values.astype(np.int64) & ((1 << self.bits) - 1)).astype(self.word)

    def reduce(self, words: NDArray[Any]) -> NDArray[Any]:
        """Words in which sums wrapped around, modulo ``2**bits``; in place."""
        words &= words.dtype.type((1 << self.bits) - 1)
        return words

    def recentre(self, words: NDArray[Any]) -> NDArray[np.int64]:
        """What words stand for: whole numbers, ``-2**(bits-1)`` to ``2**(bits-1) - 1``."""
        half = 1 << (self.bits - 1)
        wide = self.reduce(words.copy()).astype(np.int64)
        return (wide ^ half) - half

    def packed_bytes(self, count: int) -> int:
        """Bytes of ``count`` packed numbers."""
        whole, rest = divmod(self.bits, _PLANE)
        return whole * count + rest * -(-count // _PLANE)

    def pack(self, words: NDArray[Any]) -> NDArray[np.uint8]:
        """Flat reduced words, packed: their lowest 8 bits, the next 8, and so on.

        What is left, of fewer than 8 bits, is packed 8 numbers at a time, the first lowest.
        """
        planes = [
            _pack_plane((words >> shift).astype(np.uint8), min(_PLANE, self.bits - shift))
            for shift in range(0, self.bits, _PLANE)
        ]
        return np.concatenate(planes)

    def unpack(self, data: NDArray[np.uint8], count: int) -> NDArray[Any]:
        """``count`` words; bits after the last are left alone. Raises DecodeError for a length."""
        if data.size != self.packed_bytes(count):
            raise DecodeError(
                f"packed ring of {self.bits} bits: expected {self.packed_bytes(count)} bytes for "
                f"{count} numbers, got {data.size}"
            )
        words = np.zeros(count, self.word)
        at = 0
        for shift in range(0, self.bits, _PLANE):
            width = min(_PLANE, self.bits - shift)
            size = Ring(width).packed_bytes(count)
            plane = _unpack_plane(data[at : at + size], width, count)
            words |= plane.astype(self.word) << self.word.type(shift)
            at += size
        return words


def ring_for(cohort: int, levels: int, most_weight: int = 1) -> Ring:
    """The smallest ring that holds every sum of ``cohort`` numbers of -levels to levels.

    Each counts up to ``most_weight`` times: ``2 cohort most_weight levels + 1 <= 2**bits``.
    Raises ConfigError where that is more than a word.
    """
    return Ring((2 * cohort * most_weight * levels).bit_length())


def _pack_plane(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    if width == _PLANE:
        return values
    groups = np.zeros((-(-values.size // _PLANE), _PLANE), "<u8")
    groups.reshape(-1)[: values.size] = values & np.uint8((1 << width) - 1)
    groups <<= np.arange(_PLANE, dtype=np.uint64) * np.uint64(width)
    joined = np.bitwise_or.reduce(groups, axis=1).view(np.uint8)
    packed: NDArray[np.uint8] = joined.reshape(-1, _PLANE)[:, :width].reshape(-1)
    return packed


def _unpack_plane(data: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    if width == _PLANE:
        return data
    joined = np.zeros((data.size // width, _PLANE), np.uint8)
    joined[:, :width] = data.reshape(-1, width)
    groups = joined.view("<u8") >> (np.arange(_PLANE, dtype=np.uint64) * np.uint64(width))
    groups &= np.uint64((1 << width) - 1)
    values: NDArray[np.uint8] = groups.astype(np.uint8).reshape(-1)
    return values[:count]
