"""Delta files: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import modes
from shared.errors import ConfigError, DeltaRefusedError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import (
    HEADER_KEY,
    DeltaFile,
    DeltaHeader,
    check_delta,
    header_limit,
    write_delta,
)
from shared.tensors.packed_header import MARK, pack
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

# Parts sort across tensors here: "a", "a.b", "a:scale", not tensor by tensor.
SPECS = tuple(
    TensorSpec(name=name, shape=shape, init="zeros")
    for name, shape in [("a", (300,)), ("a.b", (2, 3)), ("c", (1,))]
)
MANIFEST = Manifest(tensors=SPECS, target_modules=("a",))
HEADER = DeltaHeader(
    run="r", round=3, site="north", source_sha="0" * 64, codec="fp32", codec_version=1
)
CODEC = {"codec", "codec_version"}
VALUES = {spec.name: np.full(spec.shape, 2, np.float32) for spec in SPECS}


def values_of(spec: TensorSpec) -> Any:
    return VALUES[spec.name]


def header_of(codec: str) -> DeltaHeader:
    return HEADER.model_copy(update={"codec": codec, "codec_version": get_codec(codec).version})


def forged(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """A file as somebody else's program might write it."""
    words = {"float32": "F32", "float64": "F64", "int8": "I8", "bfloat16": "BF16"}
    ordered = dict(sorted(tensors.items()))
    layouts = [TensorLayout(n, words[str(v.dtype)], v.shape) for n, v in ordered.items()]
    if metadata is None:
        metadata = {HEADER_KEY: HEADER.model_dump_json()}
    write_tensors(path, layouts, ordered.values(), metadata)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "delta.safetensors"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", modes.names("codecs"))
def test_a_delta_is_read_back(path: Path, codec: str, packed: bool) -> None:
    """Header and decoded values survive every codec; all twos are nearly exact where sent."""
    write_delta(path, MANIFEST, codec, header_of(codec), values_of, 1, packed=packed)
    with DeltaFile(path, MANIFEST) as delta:
        assert delta.header == header_of(codec)
        for spec in SPECS:
            values, sent = delta.read(spec), VALUES[spec.name].copy()
            if codec == "topk":
                sent.reshape(-1)[-(-sent.size // 64) :] = 0
            np.testing.assert_allclose(values, sent, rtol=2**-6)


@pytest.mark.parametrize("codec", modes.names("codecs"))
def test_deltas_that_are_laid_out_alike_hold_that_once(tmp_path: Path, codec: str) -> None:
    """Also where their headers are of other lengths; each still reads its own values."""
    other = HEADER.model_copy(update={"site": "north-by-north-west-and-a-bit-further"})
    headers = [
        header_of(codec),
        other.model_copy(update=header_of(codec).model_dump(include=CODEC)),
    ]
    values = [values_of, lambda spec: 3 * values_of(spec)]
    files = []
    for number, header in enumerate(headers):
        write_delta(tmp_path / str(number), MANIFEST, codec, header, values[number], 1)
        files.append(DeltaFile(tmp_path / str(number), MANIFEST))
    alone = [files[1].read(spec).copy() for spec in SPECS]
    files[1].share(files[0])
    first, second = (file._file for file in files)
    assert second.layouts is first.layouts
    for spec, expected in zip(SPECS, alone, strict=True):
        np.testing.assert_array_equal(files[1].read(spec), expected)
        files[1].release(spec)
        assert not np.array_equal(files[0].read(spec), expected)


def test_a_file_that_is_laid_out_otherwise_is_read_as_it_is(tmp_path: Path) -> None:
    """The same tensors at other places, as of a codec whose parts vary in length."""
    files = []
    for number, lengths in enumerate([(3, 1), (1, 3)]):
        layouts = [
            TensorLayout(name, "U8", (size,)) for name, size in zip("ab", lengths, strict=True)
        ]
        tensors = [np.arange(size, dtype=np.uint8) for size in lengths]
        write_tensors(tmp_path / str(number), layouts, tensors)
        files.append(TensorFile(tmp_path / str(number)))
    files[1].share(files[0])
    assert files[1].layouts is not files[0].layouts
    assert files[1].read("b").tolist() == [0, 1, 2]


def test_a_delta_passes_its_check_with_its_norm(path: Path) -> None:
    """307 values of 2: the norm is 2 * sqrt(307), to nine digits."""
    write_delta(path, MANIFEST, "fp32", HEADER, values_of, 1)
    assert check_delta(path, MANIFEST, HEADER, max_norm=36).norm == 35.0428309


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", modes.names("codecs"))
def test_the_same_delta_is_the_same_bytes(tmp_path: Path, codec: str, packed: bool) -> None:
    """A site that announces again announces the same sha."""
    digests = {
        write_delta(tmp_path / name, MANIFEST, codec, header_of(codec), values_of, 1, packed=packed)
        for name in "xy"
    }
    assert len(digests) == 1


def test_the_header_is_one_metadata_key_of_canonical_json(path: Path) -> None:
    """Several keys would come in random order from other programs."""
    write_delta(path, MANIFEST, "fp32", HEADER, values_of, 1)
    with TensorFile(path) as file:
        assert file.metadata == {
            HEADER_KEY: '{"codec":"fp32","codec_version":1,"round":3,"run":"r","site":"north",'
            '"source_sha":"' + "0" * 64 + '"}'
        }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_training_writes_no_delta(path: Path, bad: float) -> None:
    """What the coordinator would refuse is not sent."""
    values = {**VALUES, "c": np.array([bad], np.float32)}
    with pytest.raises(DeltaRefusedError, match="'c': expected finite values"):
        write_delta(path, MANIFEST, "fp32", HEADER, lambda spec: values[spec.name], 1)
    assert not path.exists()


def test_a_wrong_call_is_the_callers_mistake(path: Path) -> None:
    """Unknown codec, another codec in the header, another dtype or shape."""
    with pytest.raises(ConfigError, match="nope"):
        write_delta(path, MANIFEST, "nope", HEADER, values_of, 1)
    with pytest.raises(ValueError, match="expected codec bf16 version 1, got fp32 version 1"):
        write_delta(path, MANIFEST, "bf16", HEADER, values_of, 1)
    with pytest.raises(ValueError, match="a: expected float32"):
        write_delta(path, MANIFEST, "fp32", HEADER, lambda spec: np.zeros(spec.shape), 1)
    with pytest.raises(ValueError, match="expected float32"):
        write_delta(path, MANIFEST, "fp32", HEADER, lambda _: np.zeros(7, np.float32), 1)


FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"a": VALUES["a"], "c": VALUES["c"]}, "tensor 'a.b': expected it"),
    "extra": ({**VALUES, "z": VALUES["c"]}, "tensor 'z': expected 3 tensors without it, got 4"),
    "shape": (
        {**VALUES, "a.b": np.zeros((3, 2), np.float32)},
        r"tensor 'a.b': expected shape \(2, 3\), got \(3, 2\)",
    ),
    "dtype": ({**VALUES, "c": np.zeros(1, np.float64)}, "'c': expected dtype F32, got F64"),
    "NaN": (
        {**VALUES, "c": np.array([np.nan], np.float32)},
        "'c': expected finite values, got nan at flat index 0",
    ),
    "infinite": (
        {**VALUES, "a.b": np.array([[0, 0, 0], [0, -np.inf, 0]], np.float32)},
        "'a.b': expected finite values, got -inf at flat index 4",
    ),
    "norm": (
        {**VALUES, "c": np.array([1000], np.float32)},
        r"norm: expected at most 36 \(aggregation.max_delta_norm\), got 1000.6",
    ),
}


@pytest.mark.parametrize(("tensors", "reason"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_delta_of_another_form_is_refused(
    path: Path, tensors: dict[str, Any], reason: str
) -> None:
    """The reason names the tensor, what was expected and what came."""
    forged(path, tensors)
    with pytest.raises(DeltaRefusedError, match=reason):
        check_delta(path, MANIFEST, HEADER, max_norm=36)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "other"),
        ("round", 4),
        ("site", "south"),
        ("source_sha", "1" * 64),
    ],
)
def test_a_delta_of_another_header_is_refused(path: Path, field: str, value: Any) -> None:
    """Another run's, round's, site's or adapter's delta may be whole and still not be counted."""
    write_delta(path, MANIFEST, "fp32", HEADER.model_copy(update={field: value}), values_of, 1)
    wanted = getattr(HEADER, field)
    with pytest.raises(DeltaRefusedError, match=rf"header {field}: expected {wanted}, got {value}"):
        check_delta(path, MANIFEST, HEADER, max_norm=None)


def test_a_delta_in_another_codec_is_refused(path: Path) -> None:
    """The run has one codec; a site cannot choose a coarser one."""
    write_delta(path, MANIFEST, "bf16", header_of("bf16"), values_of, 1)
    with pytest.raises(DeltaRefusedError, match="header codec: expected fp32, got bf16"):
        check_delta(path, MANIFEST, HEADER, max_norm=None)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "expected the one metadata key 'gradualdiff', got none"),
        ({"format": "pt"}, "got 'format'"),
        ({HEADER_KEY: "{"}, "header JSON"),
        ({HEADER_KEY: "[]"}, "header JSON"),
        ({HEADER_KEY: json.dumps({**HEADER.model_dump(), "round": "3"})}, "header round"),
        ({HEADER_KEY: json.dumps({**HEADER.model_dump(), "site": "../x"})}, "header site"),
        ({HEADER_KEY: json.dumps({**HEADER.model_dump(), "codec": "os"})}, "got os version 1"),
        ({HEADER_KEY: json.dumps({**HEADER.model_dump(), "codec_version": 9})}, "version 9"),
    ],
)
def test_a_header_of_another_form_is_refused(
    path: Path, metadata: dict[str, str], reason: str
) -> None:
    """Nothing in it is believed, least of all the name of a codec to load."""
    forged(path, VALUES, metadata)
    with pytest.raises(DeltaRefusedError, match=reason):
        check_delta(path, MANIFEST, HEADER, max_norm=None)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(path: Path, scale: float) -> None:
    """int8 zeros times NaN are NaN: a poisoned scale cannot hide behind small numbers."""
    tensors: dict[str, Any] = {}
    for spec in SPECS:
        blocks = -(-spec.elements // 256)
        tensors[spec.name] = np.zeros(spec.shape, np.int8)
        tensors[f"{spec.name}:scale"] = np.ones(blocks, ml_dtypes.bfloat16)
    tensors["a:scale"][1] = scale
    header = header_of("int8")
    forged(path, tensors, {HEADER_KEY: header.model_dump_json()})
    with pytest.raises(
        DeltaRefusedError, match=r"'a': expected finite values, got nan at flat .* 2"
    ):
        check_delta(path, MANIFEST, header, max_norm=None)


@settings(deadline=None)
@given(st.data())
def test_damaged_deltas_are_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut anywhere or changed in the header: accepted or DeltaRefusedError, without the path."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    packed = data.draw(st.booleans())
    write_delta(path, MANIFEST, "fp32", HEADER, values_of, 1, packed=packed)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        at = data.draw(st.integers(0, 500))
        whole[-1 - at if packed else at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        check_delta(path, MANIFEST, HEADER, max_norm=1e6)
    except DeltaRefusedError as refused:
        assert str(path) not in str(refused)  # noqa: PT017 - it need not be refused


@pytest.mark.parametrize("codec", ["int4", "topk"])
def test_parts_that_no_codec_wrote_are_refused_by_name(path: Path, codec: str) -> None:
    """Too short, longer than any values come to, and a frame that is none."""
    write_delta(path, MANIFEST, codec, header_of(codec), values_of, 1)
    with TensorFile(path) as file:
        whole = {name: file.read(name).copy() for name in file.layouts}
    for part, said in (
        (np.zeros(1, np.uint8), r"tensor 'a': expected at least \d+ bytes, got 1"),
        (np.zeros(9999, np.uint8), r"tensor 'a': expected shape up to \(\d+,\), got \(9999,\)"),
        (np.zeros(30, np.uint8), r"tensor 'a': zstd frame: expected"),
    ):
        layouts = [TensorLayout(n, "U8", v.shape) for n, v in {**whole, "a": part}.items()]
        header = {HEADER_KEY: header_of(codec).model_dump_json()}
        write_tensors(path, layouts, {**whole, "a": part}.values(), header)
        with pytest.raises(DeltaRefusedError, match=said):
            check_delta(path, MANIFEST, header_of(codec), max_norm=None)


def test_what_a_small_file_says_to_hold_is_bounded_by_the_run(path: Path) -> None:
    """A frame of some hundred bytes that holds megabytes of JSON is refused before it is opened."""
    text = b"{" + b" " * header_limit(VALUES) + b"}"
    bomb = MARK + pack(text)
    assert len(bomb) < 200
    path.write_bytes(bomb)
    with pytest.raises(DeltaRefusedError, match=rf"expected 0 to \d+ bytes in it, got {len(text)}"):
        check_delta(path, MANIFEST, HEADER, max_norm=None)


def test_a_packed_header_is_a_few_bytes_a_tensor(path: Path) -> None:
    """Of 210 layers, whose names take 120 each in a safetensors header."""
    names = [f"model.layers.{i}.mlp.{m}_proj.lora_R.weight" for i in range(70) for m in "abc"]
    specs = [TensorSpec(name=name, shape=(2, 3), init="zeros") for name in sorted(names)]
    manifest = Manifest(tensors=tuple(specs), target_modules=("a",))

    def values(spec: TensorSpec) -> Any:
        return np.ones(spec.shape, np.float32)

    sizes = [
        write_delta(path, manifest, "fp32", HEADER, values, 1, packed=packed).size - 4 * 6 * 210
        for packed in (False, True)
    ]
    assert sizes[0] > 100 * 210
    assert sizes[1] < 5 * 210
    assert check_delta(path, manifest, HEADER, max_norm=None).norm == 35.4964787
