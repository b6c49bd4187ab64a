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
        return self.reduce(values.astype(self.word))

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
        packed = np.empty(self.packed_bytes(words.size), np.uint8)
        at = 0
        for byte, width in self._planes:
            plane = _pack_plane(_bytes_of(words, byte), width)
            packed[at : at + plane.size] = plane
            at += plane.size
        return packed

    def unpack(self, data: NDArray[np.uint8], count: int) -> NDArray[Any]:
        """``count`` words; bits after the last are left alone. Raises DecodeError for a length."""
        if data.size != self.packed_bytes(count):
            raise DecodeError(
                f"packed ring of {self.bits} bits: expected {self.packed_bytes(count)} bytes for "
                f"{count} numbers, got {data.size}"
            )
        words = np.zeros(count, self.word)
        at = 0
        for byte, width in self._planes:
            size = Ring(width).packed_bytes(count)
            _bytes_of(words, byte)[:] = _unpack_plane(data[at : at + size], width, count)
            at += size
        return words

    @property
    def _planes(self) -> list[tuple[int, int]]:
        """Which byte of a word, from the lowest, and how many bits of it."""
        whole, rest = divmod(self.bits, _PLANE)
        return [(byte, _PLANE) for byte in range(whole)] + ([(whole, rest)] if rest else [])


def ring_for(cohort: int, levels: int, most_weight: int = 1) -> Ring:
    """The smallest ring that holds every sum of ``cohort`` numbers of -levels to levels.

    Each counts up to ``most_weight`` times: ``2 cohort most_weight levels + 1 <= 2**bits``.
    Raises ConfigError where that is more than a word.
    """
    return Ring((2 * cohort * most_weight * levels).bit_length())


def _bytes_of(words: NDArray[Any], byte: int) -> NDArray[np.uint8]:
    return words.view(np.uint8)[byte :: words.itemsize]


def _pack_plane(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Each number's lowest ``width`` bits: fields of a group of 8, in one word, moved together."""
    if width == _PLANE:
        return values
    groups = np.zeros(-(-values.size // _PLANE), "<u8")
    groups.view(np.uint8)[: values.size] = values
    for slot in (8, 16, 32):
        field = width * slot // _PLANE
        low = _fields(field, 2 * slot)
        upper = groups >> np.uint64(slot - field)
        upper &= low << np.uint64(field)
        groups &= low
        groups |= upper
    packed: NDArray[np.uint8] = np.empty((groups.size, width), np.uint8)
    for byte, column in enumerate(packed.T):
        column[:] = groups.view(np.uint8)[byte::_PLANE]
    return packed.reshape(-1)


def _unpack_plane(data: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    if width == _PLANE:
        return data
    groups = np.zeros(data.size // width, "<u8")
    for byte in range(width):
        groups.view(np.uint8)[byte::_PLANE] = data[byte::width]
    for slot in (32, 16, 8):
        field = width * slot // _PLANE
        low = _fields(field, 2 * slot)
        upper = groups << np.uint64(slot - field)
        upper &= low << np.uint64(slot)
        groups &= low
        groups |= upper
    return groups.view(np.uint8)[:count]


def _fields(width: int, every: int) -> np.uint64:
    """A word with ``width`` ones from each bit on that is a multiple of ``every``."""
    return np.uint64(sum(((1 << width) - 1) << at for at in range(0, 64, every)))
