"""The packed form of a tensor file: its header is a zstd frame behind the tensors.

    b"tensors" and 1, the form's version    8 bytes
    the tensors, in the header's order      gapless
    a zstd frame of the header's JSON
    the frame's length                      4 bytes, little-endian

A safetensors header takes some 120 bytes a tensor, which is half of a small core's delta; packed, a
name that is like the one before takes four. Whoever reads safetensors only takes the first 8 bytes
for the length of a header beyond any limit, and refuses the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from shared.errors import DecodeError
from shared.tensors.packing import from_frame, to_frame

if TYPE_CHECKING:
    import mmap

MARK: Final = b"tensors\x01"
_LENGTH_BYTES: Final = 4


def is_packed(data: mmap.mmap) -> bool:
    """Whether the file is of this form, in whatever version."""
    return data[: len(MARK) - 1] == MARK[:-1]


def pack(text: bytes) -> bytes:
    """What stands behind the tensors: ``text`` is the header's JSON."""
    frame = to_frame(np.frombuffer(text, np.uint8)).tobytes()
    return frame + len(frame).to_bytes(_LENGTH_BYTES, "little")


def unpack(data: mmap.mmap, most: int) -> tuple[bytes, int]:
    """The header's JSON, of at most ``most`` bytes, and where the tensors end. Raises DecodeError.

    No memory is taken for what a frame says to hold before that is known to be no more.
    """
    if data[: len(MARK)] != MARK:
        raise DecodeError(
            f"packed header: expected version {MARK[-1]}, got {data[len(MARK) - 1]}; update the "
            "older of the two programs"
        )
    end = len(data) - _LENGTH_BYTES
    length, room = int.from_bytes(data[end:], "little"), min(end - len(MARK), most)
    if not 0 < length <= room:
        raise DecodeError(f"packed header: expected 1 to {max(room, 0)} bytes, got {length}")
    try:
        text = from_frame(np.frombuffer(data[end - length : end], np.uint8), 0, most)
    except DecodeError as error:
        raise DecodeError(f"packed header: {error}") from None
    return text.tobytes(), end - length
