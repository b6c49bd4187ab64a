"""The exactness gap against the dense matrices that the code never makes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coordinator.aggregation import exactness
from coordinator.aggregation.closing import Method, aggregate
from coordinator.aggregation.exactness import DIRECTIONS, squared_gap
from shared.adapters import Layer
from shared.config import AggregationSection
from shared.methods.averaging import get_averaging
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors


def layer(outputs, inputs, rank, name="q"):
    return Layer(
        name,
        left=TensorSpec(name=f"{name}.lora_B.weight", shape=(outputs, rank), init="zeros"),
        right=TensorSpec(name=f"{name}.lora_A.weight", shape=(rank, inputs), init="zeros"),
    )


def adapter_of(*layers):
    tensors = tuple(sorted((s for _, *factors in layers for s in factors), key=lambda s: s.name))
    return Manifest(tensors=tensors, target_modules=("q",))


def drawn(manifest, count, seed=0):
    """Deltas with normal values, by tensor's name."""
    generator = np.random.default_rng(seed)
    return [
        {s.name: generator.standard_normal(s.shape).astype(np.float32) for s in manifest.tensors}
        for _ in range(count)
    ]


def written(folder, manifest, tensors, weights, scales=None):
    """The deltas as files."""
    codec, deltas = get_codec("fp32"), []
    for index, (values, weight) in enumerate(zip(tensors, weights, strict=True)):
        header = DeltaHeader(
            run="r", round=1, site=f"site-{index}", source_sha="0" * 64,
            codec=codec.name, codec_version=codec.version,
        )  # fmt: skip
        path = folder / f"site-{index}.safetensors"
        write_delta(path, manifest, "fp32", header, lambda s, v=values: v[s.name], 1)
        scale = scales[index] if scales else 1.0
        deltas.append(WeightedDelta(f"site-{index}", path, weight, scale, manifest))
    return deltas


def sourced(folder, manifest, values):
    layouts = [TensorLayout(s.name, "F32", s.shape) for s in manifest.tensors]
    path = folder / "source.safetensors"
    write_tensors(path, layouts, [np.asarray(values[s.name], np.float32) for s in manifest.tensors])
    return path


def dense_gap(layers, source, tensors, weights):
    """Norm of mean(BA) - mean(B) mean(A), with every matrix made."""
    square = 0.0
    for _, b, a in layers:
        sites = [{n: source[n] + np.float64(t[n]) for n in (a.name, b.name)} for t in tensors]
        both = list(zip(weights, sites, strict=True))
        product = sum(w * s[b.name] @ s[a.name] for w, s in both)
        apart = sum(w * s[b.name] for w, s in both) @ sum(w * s[a.name] for w, s in both)
        square += np.linalg.norm(product - apart) ** 2
    return math.sqrt(square)


def reads(tensors):
    return [lambda spec, values=values: values[spec.name] for values in tensors]


def test_the_gap_worked_out_by_hand(tmp_path):
    """Mean(BA) is I / 2 and mean(B) mean(A) is 1/4 everywhere: apart by 1/4, in four places."""
    pair = layer(2, 2, 1)
    manifest = adapter_of(pair)
    deltas = [
        {pair.right.name: np.float32([[1, 0]]), pair.left.name: np.float32([[1], [0]])},
        {pair.right.name: np.float32([[0, 1]]), pair.left.name: np.float32([[0], [1]])},
    ]
    source = {s.name: np.zeros(s.shape) for s in manifest.tensors}
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, manifest, deltas, [0.5, 0.5]),
        manifest,
        tmp_path / "target",
    )
    assert result.exactness_gap == 0.5
    with TensorFile(tmp_path / "target") as file:
        assert file.read(pair.right.name).tolist() == [[0.5, 0.5]]
        assert file.read(pair.left.name).tolist() == [[0.5], [0.5]]


def test_the_gap_is_that_of_the_dense_matrices(tmp_path):
    """Two layers, three sites of unequal weight, one scaled down, a source that is not zero."""
    one, two = layer(6, 5, 2, "q"), layer(4, DIRECTIONS, 3, "v")
    manifest = adapter_of(one, two)
    tensors, (source,) = drawn(manifest, 3), drawn(manifest, 1, seed=9)
    weights, scales = [0.5, 0.3, 0.2], [1.0, 0.25, 1.0]
    scaled = [{n: s * v for n, v in t.items()} for s, t in zip(scales, tensors, strict=True)]
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, manifest, tensors, weights, scales),
        manifest,
        tmp_path / "target",
    )
    assert result.exactness_gap == pytest.approx(
        dense_gap((one, two), source, scaled, weights), rel=6e-4
    )


@pytest.mark.parametrize("inputs", [5, 2 * DIRECTIONS])
def test_the_gap_of_many_deltas_keeps_none_of_them_and_is_the_same_to_the_bit(monkeypatch, inputs):
    """Of a few, what they make of the directions is kept; of more it is computed again."""
    pair = layer(6, inputs, 2)
    tensors = drawn(adapter_of(pair), 3)
    given = (pair, reads(tensors), [0.5, 0.3, 0.2], [1.0, 0.25, 1.0])
    kept = squared_gap(*given)
    asked = []
    monkeypatch.setattr(exactness, "MOST_KEPT", 2)
    noted = [lambda spec, read=read: asked.append(spec.name) or read(spec) for read in given[1]]
    assert squared_gap(pair, noted, *given[2:]) == kept
    assert asked.count(pair.right.name) > 2 * len(tensors) - 1


def test_a_wide_layer_is_estimated_within_the_error_that_is_stated():
    """Twenty layers: each within six standard errors, the sum within half of one; repeatably."""
    weights, found, true = [0.25] * 4, 0.0, 0.0
    for index in range(20):
        pair = layer(40, 100, 3, f"layer-{index}")
        tensors = drawn(adapter_of(pair), 4, seed=index)
        source = {s.name: np.zeros(s.shape) for s in pair[1:]}
        square = squared_gap(pair, reads(tensors), weights, [1.0] * 4)
        assert square == squared_gap(pair, reads(tensors), weights, [1.0] * 4)
        dense = dense_gap((pair,), source, tensors, weights) ** 2
        assert square != pytest.approx(dense, rel=1e-9)
        assert square == pytest.approx(dense, rel=6 * math.sqrt(2 / DIRECTIONS))
        found, true = found + square, true + dense
    assert found == pytest.approx(true, rel=math.sqrt(2 / DIRECTIONS) / 2)


@pytest.mark.parametrize("inputs", [3, 100])
def test_where_the_factors_agree_the_gap_is_zero_and_no_rounding(inputs):
    """Equal deltas, equal A or equal B: exactly 0, whatever a third times three is."""
    pair = layer(5, inputs, 2)
    one, two, three = drawn(adapter_of(pair), 3)
    third = [1 / 3] * 3
    assert squared_gap(pair, reads([one] * 3), third, [1.0] * 3) == 0
    for name in (pair.right.name, pair.left.name):
        same = [{**other, name: one[name]} for other in (one, two, three)]
        assert squared_gap(pair, reads(same), third, [1.0] * 3) == 0
    assert squared_gap(pair, reads([one, two, three]), third, [1.0] * 3) > 0


def test_values_that_no_fp32_product_can_hold_have_a_gap_all_the_same():
    """1e25 times 1e25 is beyond fp32; the record could hold no infinity."""
    pair = layer(5, 40, 2)
    small = drawn(adapter_of(pair), 3)
    large = [{name: np.float32(1e25) * v for name, v in values.items()} for values in small]
    third = [1 / 3] * 3
    ratio = squared_gap(pair, reads(large), third, [1.0] * 3) / squared_gap(
        pair, reads(small), third, [1.0] * 3
    )
    assert ratio == pytest.approx(1e100, rel=1e-3)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("averaging", ["ffa", "rolora"])
def test_one_factor_alone_is_averaged_exactly_and_the_other_keeps_its_bytes(
    tmp_path, averaging, number
):
    """Gap 0.0, and the tensors that were not sent are the source's to the bit."""
    pair = layer(4, 3, 2)
    manifest = adapter_of(pair)
    (source,) = drawn(manifest, 1, seed=5)
    part = get_averaging(averaging).trained_in(manifest, number)
    weights = [0.5, 0.5]
    tensors = drawn(part, 2)
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, part, tensors, weights),
        manifest,
        tmp_path / "target",
        method=Method(AggregationSection(averaging=averaging)),
    )
    assert result.exactness_gap == 0.0
    sent = {spec.name for spec in part.tensors}
    assert len(sent) == 1
    with TensorFile(tmp_path / "target") as file:
        for spec in manifest.tensors:
            mean = (tensors[0][spec.name] + tensors[1][spec.name]) / 2 if spec.name in sent else 0
            expected = np.float32(source[spec.name] + mean)
            assert np.allclose(file.read(spec.name), expected, rtol=1e-6)
            if spec.name not in sent:
                assert file.read(spec.name).tobytes() == source[spec.name].tobytes()


def test_another_rule_than_the_mean_has_no_gap(tmp_path):
    """There is no mean of products that it could be apart from."""
    pair = layer(4, 3, 2)
    manifest = adapter_of(pair)
    (source,) = drawn(manifest, 1, seed=5)
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, manifest, drawn(manifest, 3), [1 / 3] * 3),
        manifest,
        tmp_path / "target",
        method=Method(AggregationSection(rule="median")),
    )
    assert result.exactness_gap is None
