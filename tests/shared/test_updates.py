"""An update: c = Q(x - w), and w' = w + c to the same bytes for everybody who holds w."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DecodeError, LedgerError
from shared.methods.averaging import get_averaging
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaFile
from shared.tensors.tensor_file import (
    ADAPTER_METADATA,
    TensorFile,
    TensorLayout,
    TensorWriter,
    write_tensors,
)
from shared.tensors.updates import apply_update, update_header, write_update
from tests.numpy_learner import manifest_of

MANIFEST = manifest_of(300)
SHA = "a" * 64


def adapter(path, seed, scale=1.0):
    """An adapter of the manifest's tensors."""
    generator = np.random.default_rng(seed)
    values = [
        generator.standard_normal(spec.shape, dtype=np.float32) * np.float32(scale)
        for spec in MANIFEST.tensors
    ]
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in MANIFEST.tensors]
    write_tensors(path, layouts, values, ADAPTER_METADATA)
    return path


def read(path):
    with TensorFile(path) as file:
        return {name: np.array(file.read(name)) for name in file.layouts}


def made(folder, codec, exact, source, manifest=MANIFEST):
    """An update's path and the header that is expected of it."""
    header = update_header("run", 3, SHA, codec)
    write_update(folder / "update", exact, source, manifest, header, 7)
    return folder / "update", header


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "sign", "topk", "uniform4"])
def test_what_is_added_is_what_the_codec_makes_of_the_difference(tmp_path, codec):
    """W' = w + Q(x - w), value by value in fp32; and every application gives the same bytes."""
    exact, source = adapter(tmp_path / "x", 1), adapter(tmp_path / "w", 2)
    update, header = made(tmp_path, codec, exact, source)
    ends = [apply_update(source, update, tmp_path / name, header) for name in ("one", "two")]
    assert ends[0] == ends[1]
    x, w, after = read(exact), read(source), read(tmp_path / "one")
    with DeltaFile(update, MANIFEST) as file:
        sent = {spec.name: np.array(file.read(spec)) for spec in MANIFEST.tensors}
    for name, values in after.items():
        assert np.array_equal(values, w[name] + sent[name])
        assert np.linalg.norm(x[name] - values) < np.linalg.norm(x[name] - w[name])
        if get_codec(codec).exact:
            assert np.array_equal(sent[name], x[name] - w[name])


@pytest.mark.parametrize("codec", ["int4", "sign", "topk"])
def test_what_is_left_out_travels_later(tmp_path, codec):
    """Round after round towards an exact adapter that stays, w comes nearer."""
    exact, source = adapter(tmp_path / "x", 1), adapter(tmp_path / "w", 2)
    wanted, gaps = read(exact), []
    for turn in range(60):
        update, header = made(tmp_path, codec, exact, source)
        apply_update(source, update, tmp_path / f"w-{turn}", header)
        source = tmp_path / f"w-{turn}"
        gaps.append(sum(np.square(wanted[n] - v).sum() for n, v in read(source).items()))
    assert gaps[-1] < 0.1 * gaps[0]


def test_a_tensor_that_was_not_trained_stays_as_it_is(tmp_path):
    """With ``ffa`` an update holds no A, and w' has w's."""
    exact, source = adapter(tmp_path / "x", 1), adapter(tmp_path / "w", 2)
    trained = get_averaging("ffa").trained_in(MANIFEST, 1)
    update, header = made(tmp_path, "int4", exact, source, trained)
    apply_update(source, update, tmp_path / "after", header)
    w, after = read(source), read(tmp_path / "after")
    same = {name: np.array_equal(w[name], after[name]) for name in w}
    assert same == {"layer.lora_A.weight": True, "layer.lora_B.weight": False}


def test_a_difference_beyond_fp32_is_said(tmp_path):
    """Nothing is written then."""
    exact, source = adapter(tmp_path / "x", 1, 3e38 / 5), adapter(tmp_path / "w", 1, -3e38 / 5)
    huge = read(exact)
    for path, sign in ((exact, 1), (source, -1)):
        layouts = [TensorLayout(n, "F32", v.shape) for n, v in sorted(huge.items())]
        values = [np.full(v.shape, sign * 3e38, np.float32) for _, v in sorted(huge.items())]
        write_tensors(path, layouts, values, ADAPTER_METADATA)
    with pytest.raises(LedgerError, match=r"round 3.*max_delta_norm"):
        made(tmp_path, "int4", exact, source)
    assert not (tmp_path / "update").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"round": 4}, "header round: expected 4, got 3"),
        ({"source_sha": "b" * 64}, "header source_sha"),
        ({"run": "other"}, "header run"),
        ({"codec": "int8"}, "header codec"),
    ],
)
def test_another_update_is_refused(tmp_path, change, reason):
    """It says which it is; nothing is left at the target."""
    exact, source = adapter(tmp_path / "x", 1), adapter(tmp_path / "w", 2)
    update, header = made(tmp_path, "int4", exact, source)
    with pytest.raises(DecodeError, match=reason):
        apply_update(source, update, tmp_path / "after", header.model_copy(update=change))
    assert not (tmp_path / "after").exists()


def test_an_update_of_no_tensor_that_is_held_is_refused(tmp_path):
    """Nor one that holds a tensor too many, or gives a value that is not finite."""
    exact, source = adapter(tmp_path / "x", 1), adapter(tmp_path / "w", 2)
    update, header = made(tmp_path, "fp32", exact, source)
    with TensorFile(update) as file:
        metadata, layouts = file.metadata, [file.layouts[n] for n in sorted(file.layouts)]
        values = [np.array(file.read(layout.name)) for layout in layouts]

    def written(names, tensors):
        shaped = [TensorLayout(n, "F32", v.shape) for n, v in zip(names, tensors, strict=True)]
        with TensorWriter(update, shaped, metadata) as writer:
            for tensor in tensors:
                writer.add(tensor)
            writer.finish()

    names = [layout.name for layout in layouts]
    cases = [
        (["other"], values[:1], "at least one tensor"),
        ([*names, "other"], [*values, values[0]], "without it"),
        (names, [values[0], np.full_like(values[1], np.nan)], "finite"),
        (names, [values[0], values[1][:4]], "shape"),
    ]
    for which, tensors, reason in cases:
        written(which, tensors)
        with pytest.raises(DecodeError, match=reason):
            apply_update(source, update, tmp_path / "after", header)
        assert not (tmp_path / "after").exists()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_lead_elsewhere(tmp_path_factory, data):
    """Whatever became of the file: a DecodeError, or finite values of w's shapes."""
    folder = tmp_path_factory.mktemp("damage")
    exact, source = adapter(folder / "x", 1), adapter(folder / "w", 2)
    codec = data.draw(st.sampled_from(["int8", "int4", "sign", "topk"]))
    update, header = made(folder, codec, exact, source)
    raw = bytearray(update.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    update.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        apply_update(source, update, folder / "after", header)
    except DecodeError:
        assert not (folder / "after").exists()
        return
    w, after = read(source), read(folder / "after")
    assert {n: v.shape for n, v in w.items()} == {n: v.shape for n, v in after.items()}
    assert all(np.isfinite(values).all() for values in after.values())
