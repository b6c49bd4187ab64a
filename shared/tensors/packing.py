"""What codecs have in common: blocks, scales in bfloat16, and frames of an entropy coder.

A tensor is flattened row by row and cut into blocks of 256; the last may be shorter. Values are
worked on in pieces that a core's cache holds.

The entropy coder is zstd at level 1: one frame with its content's size, no checksum. On values
that do not repeat, what it gains is its Huffman code's. Frames of any release of zstd are read; the
bytes that are written are those of the release in constraints.txt, so pyproject.toml allows no
other series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import zstandard

from shared.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BLOCK: Final = 256
PIECE: Final = 2**16  # values: with one more array of its size, 512 KB
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_LARGEST: Final = 2.0**127 * (2 - 2**-7)  # the largest bfloat16
_LEVEL: Final = 1


def count_blocks(elements: int) -> int:
    """Blocks of a tensor."""
    return -(-elements // BLOCK)


def pieces(flat: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Where each piece lies in ``flat``, and its values as rows of BLOCK.

    The last row of the last piece is filled up with zeros.
    """
    for begin in range(0, flat.size, PIECE):
        values = flat[begin : begin + PIECE]
        place = slice(begin, begin + values.size)
        if values.size % BLOCK:
            values = np.pad(values, (0, -values.size % BLOCK))
        yield place, values.reshape(-1, BLOCK)


def blocks_of(place: slice) -> slice:
    """The blocks that lie in a piece."""
    return slice(place.start // BLOCK, count_blocks(place.stop))


def quotients(
    flat: NDArray[np.float32], levels: int, scales: NDArray[Any]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """By pieces: the place, and each value by its block's scale, flat, filled up with zeros.

    A scale is the largest magnitude by ``levels``, rounded up to bfloat16, and put into ``scales``.
    The array that is yielded is used again. A quotient is taken in fp32, and yet rounds to the same
    whole number as the true one: a scale has 8 bits and a half q + 1/2 at most 8, so scale times
    half is a number of fp32. A value that is not that number is at least one unit of its last
    place away from it, and its true quotient more than half a unit from the half.
    """
    buffer = np.empty(min(PIECE, flat.size + -flat.size % BLOCK), np.float32)
    for place, rows in pieces(flat):
        work = buffer[: rows.size].reshape(rows.shape)
        largest = np.abs(rows, out=work).max(axis=1)
        here = blocks_of(place)
        scales[here] = rounded_up(largest.astype(np.float64) / levels)
        divisors = scales[here].astype(np.float32)
        divisors[divisors == 0] = 1
        yield place, np.divide(rows, divisors[:, np.newaxis], out=work).reshape(-1)


def rounded_up(values: NDArray[np.float64]) -> NDArray[Any]:
    """The smallest bfloat16 not below each of ``values`` (all >= 0, far from overflow)."""
    near = values.astype(ml_dtypes.bfloat16)
    # The next larger of a float that is not negative is its bit pattern plus one.
    bits = near.view(np.uint16) + (near.astype(np.float64) < values)
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)


def rounded(values: NDArray[np.float64]) -> NDArray[Any]:
    """The nearest bfloat16 that is finite (all >= 0)."""
    return np.minimum(values, _LARGEST).astype(ml_dtypes.bfloat16)


def sum_by_halves(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of each row in fp64, in an order that is the same everywhere.

    ``rows``: (n, a power of two). The second half is added to the first until one is left.
    """
    width = rows.shape[1] // 2
    sums: NDArray[np.float64] = np.add(rows[:, :width], rows[:, width:], dtype=np.float64)
    while width > 1:
        width //= 2
        np.add(sums[:, :width], sums[:, width : 2 * width], out=sums[:, :width])
    return sums[:, 0]


def times_scales(values: NDArray[np.float32], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Flat ``values``, each times its block's scale, in place; a scale may be anything."""
    wide = scales.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, values.size, PIECE):
            piece = values[begin : begin + PIECE]
            whole, first = piece.size // BLOCK, begin // BLOCK
            rows = piece[: whole * BLOCK].reshape(-1, BLOCK)
            rows *= wide[first : first + whole, np.newaxis]
            piece[whole * BLOCK :] *= wide[first + whole : first + whole + 1]
    return values


def to_bfloat16(data: NDArray[np.uint8]) -> NDArray[Any]:
    """Bytes as bfloat16. A copy: inside a file they may lie at an odd address."""
    return data.copy().view(BFLOAT16)


def frame_bound(size: int) -> int:
    """The most bytes that a frame of ``size`` bytes comes to (zstd.h: ZSTD_COMPRESSBOUND)."""
    return size + (size >> 8) + (((128 << 10) - size) >> 11 if size < 128 << 10 else 0)


def to_frame(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One zstd frame."""
    coder = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)
    return np.frombuffer(coder.compress(data.data), np.uint8)


def from_frame(frame: NDArray[np.uint8], least: int, most: int) -> NDArray[np.uint8]:
    """What is in a frame: ``least`` to ``most`` bytes, which it says before memory is taken.

    Raises DecodeError for what is no such frame, whole and with nothing after it.
    """
    wanted = f"{least}" if least == most else f"{least} to {most}"
    try:
        size = zstandard.get_frame_parameters(frame.data).content_size
        if not least <= size <= most:
            raise DecodeError(f"zstd frame: expected {wanted} bytes in it, got {size}")
        data = zstandard.ZstdDecompressor().decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DecodeError(f"zstd frame: expected a whole one, got {str(error)[:100]}") from None
    if len(data) != size:
        raise DecodeError(f"zstd frame: expected {size} bytes in it, got {len(data)}")
    return np.frombuffer(data, np.uint8)


def split(part: NDArray[np.uint8], *sizes: int) -> list[NDArray[np.uint8]]:
    """Cut off pieces of these sizes; the last of the list is what is left.

    Raises DecodeError for a part that is too short.
    """
    if part.size < sum(sizes):
        raise DecodeError(f"expected at least {sum(sizes)} bytes, got {part.size}")
    return np.split(part, np.cumsum(sizes))
