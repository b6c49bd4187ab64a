"""The strict reader and the streaming writer of safetensors files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from shared.errors import DecodeError
from shared.tensors.packed_header import MARK, pack
from shared.tensors.stopwatch import Stopwatch
from shared.tensors.tensor_file import (
    MAX_HEADER_BYTES,
    TensorFile,
    TensorLayout,
    TensorWriter,
    write_tensors,
)

if TYPE_CHECKING:
    from pathlib import Path

LAYOUTS = (
    TensorLayout("a", "F32", (2, 3)),
    TensorLayout("b", "BF16", (4,)),
    TensorLayout("c", "I8", (3,)),
    TensorLayout("d", "F32", ()),
    TensorLayout("e", "F32", (0, 5)),
)
VALUES = (
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array([1, -2, 0.5, 3], ml_dtypes.bfloat16),
    np.array([-127, 0, 127], np.int8),
    np.array(7.5, np.float32),
    np.zeros((0, 5), np.float32),
)
# By hand: the length, the JSON padded with spaces to a multiple of 8, two little-endian floats.
GOLDEN_HEADER = b'{"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
GOLDEN = b"\x50" + b"\0" * 7 + GOLDEN_HEADER + b" " + b"\0\0\x80\x3f\0\0\0\xc0"


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: bytes | dict[str, Any], data: bytes = b"\0" * 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def opened(folder: Path, data: bytes) -> TensorFile:
    path = folder / "file.safetensors"
    path.write_bytes(data)
    return TensorFile(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "file.safetensors"
    write_tensors(path, LAYOUTS, VALUES, {"k": "v"})
    return path.read_bytes()


def test_written_tensors_are_read_back(tmp_path: Path) -> None:
    """Names, dtypes, shapes, values and metadata survive, also scalars and empty tensors."""
    path = tmp_path / "file.safetensors"
    write_tensors(path, LAYOUTS, VALUES, {"k": "v"})
    with TensorFile(path) as file:
        assert tuple(file.layouts.values()) == LAYOUTS
        assert file.metadata == {"k": "v"}
        for layout, values in zip(LAYOUTS, VALUES, strict=True):
            got = file.read(layout.name)
            assert (got.dtype, got.shape) == (values.dtype, values.shape)
            np.testing.assert_array_equal(got, values)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    """The reader of safetensors agrees on every value and on the metadata."""
    path = tmp_path / "file.safetensors"
    write_tensors(path, LAYOUTS, VALUES, {"k": "v"})
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"k": "v"}
        for layout, values in zip(LAYOUTS, VALUES, strict=True):
            np.testing.assert_array_equal(file.get_tensor(layout.name), values)


def test_the_bytes_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    """A golden file, and the digest says what was written."""
    path = tmp_path / "file.safetensors"
    values = [np.array([1, -2], np.float32)]
    digest = write_tensors(path, [TensorLayout("w", "F32", (2,))], values, {"k": "v"})
    assert path.read_bytes() == GOLDEN
    assert (digest.sha256, digest.size) == (hashlib.sha256(GOLDEN).hexdigest(), len(GOLDEN))


def test_an_array_is_done_with_before_the_next_is_asked_for(tmp_path: Path) -> None:
    """One buffer may be filled again for every tensor."""
    buffer = np.empty(2, np.float32)

    def refilled() -> Any:
        for value in (1, 2):
            buffer[:] = value
            yield buffer

    path = tmp_path / "file.safetensors"
    write_tensors(path, [TensorLayout(name, "F32", (2,)) for name in "ab"], refilled())
    with TensorFile(path) as file:
        assert file.read("a").tolist() == [1, 1]
        assert file.read("b").tolist() == [2, 2]


def test_arrays_that_are_not_contiguous_are_written_in_row_order(tmp_path: Path) -> None:
    """A transposed view comes back as it looks, not as it lies in memory."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    path = tmp_path / "file.safetensors"
    write_tensors(path, [TensorLayout("a", "F32", (3, 2))], [values])
    with TensorFile(path) as file:
        np.testing.assert_array_equal(file.read("a"), values)


@pytest.mark.parametrize(
    ("layouts", "values", "metadata"),
    [
        ([TensorLayout("b", "I8", (3,)), TensorLayout("a", "I8", (3,))], [VALUES[2]] * 2, None),
        ([TensorLayout("a", "I8", (3,))] * 2, [VALUES[2]] * 2, None),
        ([TensorLayout("a", "I8", (3,))], [VALUES[2]], {"x": "1", "y": "2"}),
        ([TensorLayout("a", "I8", (4,))], [VALUES[2]], None),
        ([TensorLayout("a", "F32", (3,))], [VALUES[2]], None),
        ([TensorLayout("a", "I8", (3,))], [], None),
        ([TensorLayout("a", "I8", (3,))], [VALUES[2]] * 2, None),
        ([TensorLayout("__metadata__", "I8", (3,))], [VALUES[2]], None),
        ([TensorLayout("a" * MAX_HEADER_BYTES, "I8", (3,))], [VALUES[2]], None),
    ],
    ids=[
        "unsorted",
        "twice",
        "two keys",
        "shape",
        "dtype",
        "too few",
        "too many",
        "reserved",
        "oversize",
    ],
)
def test_a_wrong_call_leaves_no_file(
    tmp_path: Path, layouts: Any, values: Any, metadata: Any
) -> None:
    """What could not be read again is refused, and neither file nor half a file stays."""
    with pytest.raises(ValueError, match=r"expected|argument|no name"):
        write_tensors(tmp_path / "file.safetensors", layouts, values, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """The rename comes last: an error halfway changes nothing."""
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"old")

    def failing() -> Any:
        yield VALUES[2]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_tensors(path, [TensorLayout(name, "I8", (3,)) for name in "ab"], failing())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_what_was_read_is_read_only_and_outlives_the_file_object(tmp_path: Path) -> None:
    """A view of the page cache cannot be written to, and closing does not pull it away."""
    with opened(tmp_path, GOLDEN) as file:
        values = file.read("w")
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 5
    assert values.tolist() == [1, -2]
    with pytest.raises(ValueError, match="closed"):
        file.read("w")


def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    """Asking for an unknown tensor is the caller's mistake, not the file's."""
    with opened(tmp_path, GOLDEN) as file, pytest.raises(KeyError):
        file.read("x")


MALFORMED = {
    "empty": b"",
    "no length": b"\0" * 7,
    "header past the end": (100).to_bytes(8, "little") + b"{}",
    "oversize header": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": raw(b"{garbage"),
    "not an object": raw(b"[]"),
    "not UTF-8": raw(b'{"\xff":1}'),
    "UTF-16": raw('{"a":1}'.encode("utf-16")),
    "lone surrogate": raw(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "nested too deep": raw(b'{"a":' + b"[" * 100_000),
    "huge number": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "a name twice": raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'),
    "entry no object": raw({"a": 1}),
    "entry lacks a key": raw({"a": {"dtype": "F32", "shape": [1]}}),
    "entry with another key": raw({"a": {**entry(), "x": 1}}),
    "unknown dtype": raw({"a": entry(dtype="F4")}),
    "dtype a list": raw({"a": entry(dtype=["F32"])}),
    "negative length": raw({"a": entry(shape=[-1])}),
    "length true": raw({"a": entry(shape=[True])}),
    "length 1.0": raw({"a": entry(shape=[1.0])}),
    "length infinite": raw(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'),
    "zero times 2**62 twice": raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b""),
    "too many dimensions": raw({"a": entry(shape=[1] * 65)}),
    "offsets too few": raw({"a": entry(offsets=[0])}),
    "offsets swapped": raw({"a": entry(offsets=[4, 0])}),
    "size unlike shape": raw({"a": entry(shape=[2])}),
    "truncated": raw({"a": entry()}, b"\0" * 3),
    "trailing bytes": raw({"a": entry()}, b"\0" * 5),
    "overlap": raw({"a": entry(), "b": entry()}),
    "gap": raw({"a": entry(), "b": entry(offsets=[8, 12])}, b"\0" * 12),
    "metadata no object": raw({"__metadata__": [], "a": entry()}),
    "metadata value a number": raw({"__metadata__": {"k": 1}, "a": entry()}),
}


def read_all(data: bytes, folder: Path) -> None:
    try:
        with opened(folder, data) as file:
            for name, layout in file.layouts.items():
                assert file.read(name).shape == layout.shape
    except DecodeError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_a_decode_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """No other exception, whatever the bytes."""
    read_all(data, tmp_path_factory.getbasetemp())
    read_all(raw(data, b""), tmp_path_factory.getbasetemp())


@settings(deadline=None)
@given(st.data())
def test_flipped_and_cut_bytes_are_read_or_a_decode_error(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    """Damage anywhere, in the header above all, gives a readable file or DecodeError."""
    damaged = bytearray(whole)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    read_all(bytes(damaged), tmp_path_factory.getbasetemp())
    read_all(whole[: data.draw(st.integers(0, len(whole) - 1))], tmp_path_factory.getbasetemp())


def test_every_truncation_is_a_decode_error(tmp_path: Path, whole: bytes) -> None:
    """A file cut at any byte at all never opens."""
    for size in range(len(whole)):
        with pytest.raises(DecodeError):
            opened(tmp_path, whole[:size])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "file"
    write_tensors(path, LAYOUTS, VALUES, {"k": "v"}, packed=True)
    return path.read_bytes()


def test_a_packed_file_is_read_back(tmp_path: Path, packed: bytes) -> None:
    """As a plain one, from bytes that stand first as they are, the header's JSON behind them."""
    with opened(tmp_path, packed) as file:
        assert tuple(file.layouts.values()) == LAYOUTS
        assert file.metadata == {"k": "v"}
        for layout, values in zip(LAYOUTS, VALUES, strict=True):
            assert file.read(layout.name).tobytes() == values.tobytes()
    data = b"".join(values.tobytes() for values in VALUES)
    assert packed.startswith(b"tensors\x01" + data)
    frame = packed[len(MARK) + len(data) : -4]
    assert len(frame) == int.from_bytes(packed[-4:], "little")
    text = zstandard.decompress(frame)
    assert text.startswith(b'{"__metadata__":{"k":"v"},"a":["F32",[2,3]],"b":["BF16",[4]],')


def test_a_packed_file_of_parts_as_long_as_they_come_has_their_lengths(tmp_path: Path) -> None:
    """And its digest is that of its bytes, which are written once."""
    layout = TensorLayout("x", "U8", (100,), varies=True)
    written = write_tensors(tmp_path / "x", [layout], [np.ones(7, np.uint8)], packed=True)
    data = (tmp_path / "x").read_bytes()
    assert (written.sha256, written.size) == (hashlib.sha256(data).hexdigest(), len(data))
    with TensorFile(tmp_path / "x") as file:
        assert file.layouts["x"].shape == (7,)


def test_every_truncation_of_a_packed_file_is_a_decode_error(tmp_path: Path, packed: bytes) -> None:
    """A file cut at any byte at all never opens."""
    for size in range(len(packed)):
        with pytest.raises(DecodeError):
            opened(tmp_path, packed[:size])


BAD_PACKED = {
    "another version": b"tensors\x02" + pack(b"{}"),
    "no header": MARK + bytes(4),
    "header past the beginning": MARK + b"x" * 9 + (10).to_bytes(4, "little"),
    "no frame": MARK + b"x" * 9 + (9).to_bytes(4, "little"),
    "not JSON": MARK + pack(b"{garbage"),
    "empty": MARK + pack(b""),
    "entry an object": MARK + bytes(4) + pack(b'{"a":{"dtype":"F32","shape":[1]}}'),
    "entry too long": MARK + bytes(4) + pack(b'{"a":["F32",[1],[0,4]]}'),
    "unknown dtype": MARK + bytes(4) + pack(b'{"a":["F4",[1]]}'),
    "dtype a list": MARK + bytes(4) + pack(b'{"a":[[],[1]]}'),
    "negative length": MARK + bytes(4) + pack(b'{"a":["F32",[-1]]}'),
    "a name twice": MARK + bytes(8) + pack(b'{"a":["F32",[1]],"a":["F32",[1]]}'),
    "more than there is": MARK + bytes(4) + pack(b'{"a":["F32",[2]]}'),
    "less than there is": MARK + bytes(8) + pack(b'{"a":["F32",[1]]}'),
    "lone surrogate": MARK + bytes(4) + pack(b'{"\\ud800":["F32",[1]]}'),
}


@pytest.mark.parametrize(
    "data",
    [*MALFORMED.values(), *BAD_PACKED.values()],
    ids=[*MALFORMED, *(f"packed, {name}" for name in BAD_PACKED)],
)
def test_a_malformed_file_is_a_decode_error(tmp_path: Path, data: bytes) -> None:
    """Each way to be wrong ends in DecodeError, with a message of bounded length and no path."""
    with pytest.raises(DecodeError) as refused:
        opened(tmp_path, data)
    assert len(str(refused.value)) < 400
    assert str(tmp_path) not in str(refused.value)


def test_a_reader_of_safetensors_refuses_a_packed_file(tmp_path: Path, packed: bytes) -> None:
    """So does an older release: the mark is a header's length beyond any limit."""
    assert int.from_bytes(MARK, "little") > MAX_HEADER_BYTES
    (tmp_path / "file").write_bytes(packed)
    with pytest.raises(SafetensorError), safe_open(tmp_path / "file", "numpy"):
        pass


def test_tensors_in_another_order_are_read(tmp_path: Path) -> None:
    """Other writers sort by dtype: the header's order does not matter, the offsets do."""
    data = raw({"b": entry(offsets=[4, 8]), "a": entry()}, np.array([1, 2], "<f4").tobytes())
    with opened(tmp_path, data) as file:
        assert (file.read("a").item(), file.read("b").item()) == (1, 2)


def test_the_stopwatch_adds_up_by_phase() -> None:
    """Two blocks of one phase are one sum."""
    watch = Stopwatch()
    with watch.phase("a"):
        pass
    first = watch.seconds["a"]
    with watch.phase("a"):
        pass
    assert watch.seconds["a"] >= first
    assert list(watch.seconds) == ["a"]


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

layouts = [TensorLayout(f"{i:03}", "F32", (250_000,)) for i in range(100)]
before = anonymous()
write_tensors(Path(sys.argv[1]), layouts, (np.ones(250_000, np.float32) for _ in layouts))
with TensorFile(Path(sys.argv[1])) as file:
    held = [file.read(layout.name) for layout in layouts]
    assert sum(float(values.sum()) for values in held) == 25_000_000
    print(anonymous() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' /proc")  # noqa: PTH110
def test_anonymous_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Writing and holding 100 MB of tensors costs a few of their size, not all."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "file.safetensors")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 20_000


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    """One tensor short, one too many, or just left: no file, and no part of one."""
    path = tmp_path / "file.safetensors"
    with TensorWriter(path, LAYOUTS[:2]) as writer:
        writer.add(VALUES[0])
        with pytest.raises(ValueError, match="b: expected a tensor for every layout"):
            writer.finish()
    with TensorWriter(path, LAYOUTS[:1]) as writer:
        writer.add(VALUES[0])
        with pytest.raises(ValueError, match="no more tensors than layouts"):
            writer.add(VALUES[1])
    assert list(tmp_path.iterdir()) == []
    with TensorWriter(path, LAYOUTS[:1]) as writer:
        writer.add(VALUES[0])
        digest = writer.finish()
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Its length is known when it is written; the room of the longest header stays, filled with spaces.
VARIED = (TensorLayout("a", "U8", (1000,), varies=True), TensorLayout("b", "F32", (2,)))


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_a_tensor_may_be_as_long_as_it_comes(tmp_path: Path, length: int) -> None:
    """Up to what its layout says: header, offsets and digest are those of the bytes written."""
    path, part, rest = tmp_path / "file", np.arange(length).astype(np.uint8), np.float32([1, -2])
    digest = write_tensors(path, VARIED, [part, rest], {"k": "v"})
    data = path.read_bytes()
    assert digest.size == len(data)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    with TensorFile(path) as file, safe_open(path, "numpy") as library:
        assert file.layouts["a"] == TensorLayout("a", "U8", (length,))
        assert file.read("a").tobytes() == part.tobytes() == library.get_tensor("a").tobytes()
        assert file.read("b").tolist() == [1, -2] == library.get_tensor("b").tolist()


@pytest.mark.parametrize("part", [np.zeros(1001, np.uint8), np.zeros((1, 5), np.uint8)])
def test_a_tensor_longer_than_its_bound_is_the_callers_mistake(tmp_path: Path, part: Any) -> None:
    """Nothing stays of the file."""
    with pytest.raises(ValueError, match=r"a: expected U8 up to \(1000,\), got uint8 \(1"):
        write_tensors(tmp_path / "file", VARIED, [part, np.zeros(2, np.float32)])
    assert list(tmp_path.iterdir()) == []
