"""``topk``: of every 4,096 values the 64 largest, in two bits each. About 0.02 bytes a value.

The tensor is flattened row by row and cut into chunks of 4,096. Of a chunk of n values the
ceil(n / 64) of largest magnitude are sent, of equal ones the first; the others come back as zero.
What is sent of a value is its sign, and whether its magnitude is above the mean of those sent: it
comes back as the mean of the magnitudes on its side, rounded to the nearest bfloat16. Positions
travel as the number of values between two that are sent, entropy coded: some 7.5 bits each.

So SparseLoCo (arXiv:2508.15706) sends an update; its two bits are bins of a normal distribution.

Error: the whole value where it is not sent, and its distance to a mean where it is: on normal
values 93 % of their rms. It is of use only with ``codec.feedback`` and over many rounds, in which
small values gather until they are sent. The settings are refused without, and with a rule by
coordinate (``median``, ``trimmed-mean``): sites send different values, and the middle of mostly
zeros is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared import modes
from shared.errors import DecodeError
from shared.tensors.codecs import feedback_is_missing
from shared.tensors.packing import (
    PIECE,
    frame_bound,
    from_frame,
    rounded,
    split,
    sum_by_halves,
    to_bfloat16,
    to_frame,
)
from shared.tensors.tensor_file import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.codecs import Codec

_CHUNK: Final = 4096
_SENT: Final = 64  # of a chunk
_SHIFTS: Final = np.array([0, 2, 4, 6], np.uint8)  # of a byte's two-bit codes
_SKIP: Final = 255  # a byte of this value: so many more values between, and no position yet


@dataclass(frozen=True)
class TopK:
    """``X``: two bfloat16 for each chunk, two bits for each value sent, a zstd frame of gaps.

    The two numbers are the mean magnitude below and above. Of two bits the lower one says minus,
    the upper one above; the first value of a byte is in its lowest bits, and what is left of the
    last byte is zero. A gap of g is g // 255 bytes of 255 and one of g % 255.
    """

    name: str = "topk"
    version: int = 1
    exact: bool = False

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """Settings without feedback, and a rule that takes the middle of each value."""
        yield from feedback_is_missing(self.name, config)
        rule = modes.get("rules", config.aggregation.rule)
        if rule.by_coordinate:
            yield (
                f'aggregation.rule = "{config.aggregation.rule}" judges each value by those of the '
                f'other sites, but with codec.name = "{self.name}" most of them are zero, being '
                "not sent; use another rule or another codec"
            )

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """One part, as long as the frame comes out."""
        levels, values, _, gaps = _sizes(spec.elements)
        return (TensorLayout(spec.name, "U8", (levels + values + frame_bound(gaps),), varies=True),)

    def encode(
        self, _spec: TensorSpec, values: NDArray[np.float32], _seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """Levels, two bits a value, frame."""
        flat = values.reshape(-1)
        places = _largest(flat)
        chosen = flat[places]
        sizes = np.abs(chosen)
        levels, above = _two_levels(sizes)
        codes = (chosen < 0) | above.astype(np.uint8) << 1
        packed = np.pad(codes, (0, -codes.size % 4)).reshape(-1, 4) << _SHIFTS
        parts = (
            levels.reshape(-1).view(np.uint8),
            np.bitwise_or.reduce(packed, axis=1, dtype=np.uint8),
            to_frame(_to_gaps(places)),
        )
        return (np.concatenate(parts),)

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """Zero everywhere but at the positions sent.

        Raises DecodeError for levels that are not finite and for positions that are not those of a
        tensor of this size.
        """
        size, packed_size, sent, most = _sizes(spec.elements)
        levels, packed, frame = split(parts[0], size, packed_size)
        places = _from_gaps(from_frame(frame, sent, most), spec.elements, sent)
        numbers = to_bfloat16(levels).astype(np.float32)
        if not np.isfinite(numbers).all():
            raise DecodeError("levels: expected finite ones, got one that is not")
        codes = (packed[:, np.newaxis] >> _SHIFTS & 3).reshape(-1)[:sent]
        chosen = numbers[places // _CHUNK * 2 + (codes >> 1)]
        np.negative(chosen, out=chosen, where=codes & 1 == 1)
        values = np.zeros(spec.elements, np.float32)
        values[places] = chosen
        return values.reshape(spec.shape)


def _sizes(elements: int) -> tuple[int, int, int, int]:
    """Bytes of levels, bytes of two-bit codes, values that are sent, most bytes of gaps."""
    whole, rest = divmod(elements, _CHUNK)
    sent = whole * _SENT + _sent_of(rest)
    return 4 * (whole + (rest > 0)), -(-sent // 4), sent, sent + elements // _SKIP


def _sent_of(values: int) -> int:
    """How many are sent of a chunk of so many values."""
    return -(-values * _SENT // _CHUNK)


def _largest(flat: NDArray[np.float32]) -> NDArray[np.int64]:
    """Flat indices of what is sent, ascending."""
    found = [np.empty(0, np.int64)]
    whole = flat.size - flat.size % _CHUNK
    for begin in range(0, whole, PIECE):
        rows = flat[begin : min(begin + PIECE, whole)].reshape(-1, _CHUNK)
        found.append(_largest_of_rows(rows, _SENT) + begin)
    if whole < flat.size:
        row = flat[np.newaxis, whole:]
        found.append(_largest_of_rows(row, _sent_of(row.size)) + whole)
    return np.concatenate(found)


def _largest_of_rows(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Flat indices of each row's ``count`` largest magnitudes, of equal ones the first."""
    sizes = np.abs(rows)
    if sizes.all():
        least = np.partition(sizes, -count, axis=1)[:, -count]
    else:  # among many zeros a partition takes long, and is not needed where the least is one
        least = np.zeros(len(rows), np.float32)
        full = np.count_nonzero(sizes, axis=1) > count
        least[full] = np.partition(sizes[full], -count, axis=1)[:, -count]
    chosen = sizes >= least[:, np.newaxis]
    surplus = np.count_nonzero(chosen, axis=1) - count
    for row in np.flatnonzero(surplus):
        equal = np.flatnonzero(sizes[row] == least[row])
        chosen[row, equal[-surplus[row] :]] = False
    return np.flatnonzero(chosen)


def _two_levels(sizes: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """bfloat16 (chunks, 2), and for each magnitude whether it comes back as the second."""
    rows = np.pad(sizes, (0, -sizes.size % _SENT)).reshape(-1, _SENT)
    counts = np.full(len(rows), _SENT)
    counts[-1:] -= rows.size - sizes.size
    above = rows > (sum_by_halves(rows) / counts)[:, np.newaxis]
    many = np.count_nonzero(above, axis=1)
    high = sum_by_halves(np.where(above, rows, 0)) / np.maximum(many, 1)
    low = sum_by_halves(np.where(above, 0, rows)) / np.maximum(counts - many, 1)
    return rounded(np.stack([low, high], axis=1)), above.reshape(-1)[: sizes.size]


def _to_gaps(places: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bytes for ascending indices."""
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // _SKIP + 1) - 1
    data = np.full(int(ends[-1]) + 1 if ends.size else 0, _SKIP, np.uint8)
    data[ends] = gaps % _SKIP
    return data


def _from_gaps(data: NDArray[np.uint8], elements: int, sent: int) -> NDArray[np.int64]:
    """The indices: below ``elements``, and as many in each chunk as are sent of it."""
    ends = np.flatnonzero(data != _SKIP)
    if ends.size != sent or data[-1:].tolist() == [_SKIP]:
        raise DecodeError(f"positions: expected {sent} whole ones, got {ends.size}")
    order = np.arange(sent)
    places = np.cumsum(data, dtype=np.int64)[ends] + order
    if np.any(places // _CHUNK != order // _SENT) or np.any(places[-1:] >= elements):
        raise DecodeError(
            f"positions: expected {_SENT} in every {_CHUNK} values of {elements}, got others"
        )
    return places


MODE: Final[Codec] = TopK()
