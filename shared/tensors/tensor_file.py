"""Named tensors in a safetensors file: a strict reader over a memory map and a streaming writer.

Both also know the packed form (``packed_header.py``), which deltas have. Must not know what the
tensors mean. Invariants:

- The reader trusts nothing: whatever is not a whole, gapless file of either form is a DecodeError.
- The writer's bytes are a function of its arguments alone. The safetensors library is not used
  for writing because it orders several metadata keys at random and wants every tensor at once.
- Neither side holds more than one tensor in anonymous memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeGuard

import ml_dtypes
import numpy as np

from shared.errors import DecodeError
from shared.tensors.packed_header import MARK, is_packed, pack, unpack
from shared.tensors.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MAX_HEADER_BYTES: Final = 16 * 1024 * 1024
METADATA_KEY: Final = "__metadata__"
# What PEFT writes into an adapter; several loaders refuse a file without it.
ADAPTER_METADATA: Final[dict[str, str]] = {"format": "pt"}

_ENTRY_KEYS: Final = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSIONS: Final = 32
_MAX_ELEMENTS: Final = 2**60
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorLayout:
    """One tensor's form. ``dtype`` is safetensors' word for it: ``F32``, ``BF16``, ``I8``.

    ``varies``: how long it is follows from its values; ``shape`` is one number, the most.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    varies: bool = False

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The same dtype for numpy. Raises KeyError for a word that safetensors does not have."""
        return _DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the values; where their number varies, the most."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def form(self) -> str:
        """The shape in words for a message."""
        return f"{'up to ' * self.varies}{self.shape}"

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        return shape == self.shape or (self.varies and len(shape) == 1 and shape <= self.shape)


# A tensor's first byte and end, counted from the first tensor's.
Span: TypeAlias = tuple[TensorLayout, int, int]


@dataclass(frozen=True)
class FileDigest:
    """What a written file is. ``sha256``: hex digest of all its bytes, ``size`` of them."""

    sha256: str
    size: int


class TensorFile:
    """A safetensors or packed file, checked whole at opening and read tensor by tensor.

    ``layouts``: by name, in the order of their bytes. ``metadata``: the text that came along.
    ``most``: bytes of the header's JSON. The file must not shrink while it is open. Raises
    DecodeError for bytes that are no such file (the messages name no path: they may travel to
    whoever sent the bytes) and OSError where the file itself cannot be opened.
    """

    def __init__(self, path: Path, most: int = MAX_HEADER_BYTES) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise DecodeError(f"expected at least 8 bytes of safetensors, got {size}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        packed = is_packed(mapped)
        text, start, end = _find_packed(mapped, most) if packed else _find_plain(mapped, most)
        entries = _decode_json(text)
        self.metadata: dict[str, str] = _decode_metadata(entries.pop(METADATA_KEY, {}))
        spans = _decode_packed(entries) if packed else _decode_plain(entries)
        _check_gapless(spans, end - start)
        self.layouts: dict[str, TensorLayout] = {layout.name: layout for layout, _, _ in spans}
        self._begins = {layout.name: begin for layout, begin, _ in spans}
        self._start = start
        self._mapped: mmap.mmap | None = mapped
        mapped.madvise(mmap.MADV_DONTNEED)  # a header is read once: see release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; arrays that were read keep it mapped until they are gone."""
        self._mapped = None

    def share(self, other: TensorFile) -> None:
        """Hold what both files say of their tensors once: of thousands it would fill the memory."""
        if (self.layouts, self._begins) == (other.layouts, other._begins):
            self.layouts, self._begins = other.layouts, other._begins

    def release(self, name: str) -> None:
        """Give back the pages of a tensor that was read; it may be read again.

        They stay in the kernel's cache, and count no more as this process's memory.
        """
        if self._mapped is not None:
            begin = self._start + self._begins[name]
            start = begin - begin % mmap.PAGESIZE
            length = begin + self.layouts[name].size_bytes - start
            if length:
                self._mapped.madvise(mmap.MADV_DONTNEED, start, length)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the file's pages, in its own dtype and shape.

        Raises KeyError for a name that is not in ``layouts``, ValueError after ``close``.
        """
        layout = self.layouts[name]
        if self._mapped is None:
            raise ValueError(f"{name}: the file is closed")
        start = self._start + self._begins[name]
        flat: NDArray[Any] = np.frombuffer(
            self._mapped, layout.numpy_dtype, math.prod(layout.shape), start
        )
        return flat.reshape(layout.shape)


class TensorWriter:
    """A safetensors file written tensor by tensor: ``add`` each in the order of ``layouts``.

    The file appears at ``path`` whole and synced to disk with ``finish``, or not at all: left
    without it, as a context, nothing stays. Each array is done with when ``add`` returns, so a
    buffer may be filled again and again. ``watch`` gets ``hash`` and ``write``. Raises ValueError
    if names are not sorted or come twice, for more than one metadata key, and for an array of
    another shape, dtype or number than its layout.

    The header stands first and the lengths of tensors that vary are known last: it gets the room
    that the longest would need, is written again at the end and filled up with spaces. ``packed``:
    it stands at the end.
    """

    def __init__(
        self,
        path: Path,
        layouts: Sequence[TensorLayout],
        metadata: Mapping[str, str] | None = None,
        watch: Stopwatch | None = None,
        *,
        packed: bool = False,
    ) -> None:
        header = _encode_header(layouts, metadata)
        self._packed = packed
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._waiting, self._metadata = iter(layouts), metadata
        self._written: list[TensorLayout] = []
        self._header_waits = not packed and any(layout.varies for layout in layouts)
        self._header_bytes = len(header) - 8
        self._watch = watch or Stopwatch()
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._file = self._part.open("w+b")
        try:
            self._append(memoryview(MARK if packed else header))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; without ``finish`` it is gone."""
        with contextlib.suppress(OSError):  # a full disk was said by the write itself
            self._file.close()
        self._part.unlink(missing_ok=True)

    def add(self, tensor: NDArray[Any]) -> None:
        """Write the next tensor."""
        layout = next(self._waiting, None)
        if layout is None:
            raise ValueError("expected no more tensors than layouts, got one more")
        if not layout.holds(tensor.shape) or tensor.dtype != layout.numpy_dtype:
            got = f"{tensor.dtype} {tensor.shape}"
            raise ValueError(f"{layout.name}: expected {layout.dtype} {layout.form}, got {got}")
        self._written.append(TensorLayout(layout.name, layout.dtype, tensor.shape))
        # Seen as bytes: ml_dtypes' types have no buffer of their own.
        self._append(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def finish(self) -> FileDigest:
        """Give the file its name; what was written."""
        missing = next(self._waiting, None)
        if missing is not None:
            raise ValueError(f"{missing.name}: expected a tensor for every layout, got none")
        if self._packed:
            self._append(memoryview(pack(_packed_text(self._written, self._metadata))))
        if self._header_waits:
            self._put_header()
        with self._watch.phase("write"):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        _sync_directory(self._path.parent)
        return FileDigest(self._sha256.hexdigest(), self._size)

    def _put_header(self) -> None:
        """Write it with the lengths there came to be, and hash the file from its first byte."""
        with self._watch.phase("write"):
            self._file.seek(0)
            self._file.write(_encode_header(self._written, self._metadata, self._header_bytes))
            self._file.seek(0)
        with self._watch.phase("hash"):
            self._sha256 = hashlib.file_digest(self._file, "sha256")

    def _append(self, data: memoryview) -> None:
        if not self._header_waits:
            with self._watch.phase("hash"):
                self._sha256.update(data)
        with self._watch.phase("write"):
            self._file.write(data)
        self._size += len(data)


def write_tensors(
    path: Path,
    layouts: Sequence[TensorLayout],
    values: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
    watch: Stopwatch | None = None,
    *,
    packed: bool = False,
) -> FileDigest:
    """Write ``values``, one for each of ``layouts`` in that order, and say what was written.

    As ``TensorWriter`` does; each array is done with before the next is asked for.
    """
    with TensorWriter(path, layouts, metadata, watch, packed=packed) as writer:
        for tensor in values:
            writer.add(tensor)
        return writer.finish()


def _encode_header(
    layouts: Sequence[TensorLayout], metadata: Mapping[str, str] | None, room: int = 0
) -> bytes:
    for before, after in pairwise(layout.name for layout in layouts):
        if before >= after:
            raise ValueError(f"expected names sorted, each once, got {before!r} then {after!r}")
    if metadata is not None and len(metadata) > 1:
        raise ValueError(f"expected at most one metadata key, got {sorted(metadata)}")
    entries = _first_entry(metadata)
    offset = 0
    for layout in layouts:
        if layout.name == METADATA_KEY:
            raise ValueError(f"{METADATA_KEY} is no name for a tensor")
        end = offset + layout.size_bytes
        entries[layout.name] = {
            "dtype": layout.dtype,
            "shape": list(layout.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = _to_json(entries)
    text = text.ljust(max(room, len(text) + -len(text) % 8))
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header: expected at most {MAX_HEADER_BYTES} bytes, got {len(text)}")
    return len(text).to_bytes(8, "little") + text


def _packed_text(layouts: Iterable[TensorLayout], metadata: Mapping[str, str] | None) -> bytes:
    """The JSON of a packed header: as safetensors has it, but where a tensor lies is not said."""
    rows = {layout.name: [layout.dtype, layout.shape] for layout in layouts}
    return _to_json({**_first_entry(metadata), **rows})


def _first_entry(metadata: Mapping[str, str] | None) -> dict[str, object]:
    return {METADATA_KEY: dict(metadata)} if metadata else {}


def _to_json(entries: Mapping[str, object]) -> bytes:
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def header_bytes(
    layouts: Sequence[TensorLayout], metadata: Mapping[str, str], *, packed: bool
) -> int:
    """Bytes of a file with these tensors that are none of theirs."""
    if packed:
        return len(MARK) + len(pack(_packed_text(layouts, metadata)))
    return len(_encode_header(layouts, metadata))


def _find_plain(mapped: mmap.mmap, most: int) -> tuple[bytes, int, int]:
    """The header's JSON, and where the tensors begin and end."""
    length = int.from_bytes(mapped[:8], "little")
    if length > most:
        raise DecodeError(f"header: expected at most {most} bytes, got {length}")
    start = 8 + length
    if start > len(mapped):
        raise DecodeError(
            f"header: expected {length} bytes, got {len(mapped) - 8}; the file is truncated"
        )
    return mapped[8:start], start, len(mapped)


def _find_packed(mapped: mmap.mmap, most: int) -> tuple[bytes, int, int]:
    text, end = unpack(mapped, most)
    return text, len(MARK), end


def _decode_json(data: bytes) -> dict[str, Any]:
    """The header's JSON object. Names come out as text that can be encoded again."""
    if not data.startswith(b"{"):
        raise DecodeError(f"header: expected a JSON object, got {data[:16]!r}")
    try:
        entries: dict[str, Any] = json.loads(data.decode(), object_pairs_hook=_unique)
        for name in entries:
            name.encode()  # a lone surrogate passes JSON and would fail wherever it is printed
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"header: expected JSON in UTF-8, got {str(error)[:200]}") from None
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name that stands twice")
    return entries


def _decode_metadata(values: object) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise DecodeError(f"{METADATA_KEY}: expected an object of texts")
    return values


def _decode_plain(entries: Mapping[str, object]) -> list[Span]:
    spans = [_decode_entry(name, entry) for name, entry in entries.items()]
    return sorted(spans, key=lambda span: span[1:])


def _decode_packed(entries: Mapping[str, object]) -> list[Span]:
    spans: list[Span] = []
    end = 0
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 2:
            raise DecodeError(f"tensor {name[:100]!r}: expected exactly dtype and shape")
        layout = _decode_layout(name, *entry)
        begin, end = end, end + layout.size_bytes
        spans.append((layout, begin, end))
    return spans


def _decode_entry(name: str, entry: object) -> Span:
    field_name = f"tensor {name[:100]!r}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise DecodeError(f"{field_name}: expected exactly dtype, shape and data_offsets")
    layout, offsets = _decode_layout(name, entry["dtype"], entry["shape"]), entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise DecodeError(f"{field_name}: expected two data_offsets")
    return layout, offsets[0], offsets[1]


def _decode_layout(name: str, dtype: object, shape: object) -> TensorLayout:
    field_name = f"tensor {name[:100]!r}"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        got = repr(dtype[:20]) if isinstance(dtype, str) else type(dtype).__name__
        raise DecodeError(f"{field_name}: expected a dtype such as F32, got {got}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise DecodeError(f"{field_name}: expected a shape of at most {_MAX_DIMENSIONS} lengths")
    # Zeros count as one: numpy cannot shape (0, 2**70) either.
    if math.prod(max(length, 1) for length in shape) > _MAX_ELEMENTS:
        raise DecodeError(f"{field_name}: expected at most {_MAX_ELEMENTS} values")
    return TensorLayout(name, dtype, tuple(shape))


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers, 0 to 2**63 - 1 (JSON's true is an int too)."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_gapless(spans: list[Span], data_bytes: int) -> None:
    """Tensors must cover the data exactly: no overlap, no gap, nothing after the last."""
    offset = 0
    for layout, begin, end in spans:
        if begin != offset:
            raise DecodeError(
                f"tensor {layout.name[:100]!r}: expected to begin at byte {offset}, got {begin}"
            )
        if end - begin != layout.size_bytes:
            raise DecodeError(
                f"tensor {layout.name[:100]!r}: expected {layout.size_bytes} bytes for "
                f"{layout.dtype} {layout.shape}, got {end - begin}"
            )
        offset = end
    if offset != data_bytes:
        raise DecodeError(f"expected {offset} bytes of data, got {data_bytes}")


def _sync_directory(path: Path) -> None:
    """Make a rename in this directory survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
