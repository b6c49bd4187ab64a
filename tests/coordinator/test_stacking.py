"""flora's stack: by hand, against dense products over several rounds, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from coordinator.aggregation.closing import Method, aggregate
from shared.adapters.lora import KIND
from shared.config import AggregationSection
from shared.errors import LedgerError
from shared.methods.averaging import get_averaging
from shared.methods.averaging.flora import MODE
from shared.protocol.manifest import Manifest, TensorSpec
from shared.protocol.records import ClosingRecord, Input
from shared.tensors.tensor_file import TensorFile
from tests.coordinator.test_exactness import adapter_of, drawn, layer, sourced, written
from tests.federations import config

FLORA = Method(AggregationSection(averaging="flora"))
A, B = "q.lora_A.weight", "q.lora_B.weight"


def read(path):
    with TensorFile(path) as file:
        return {name: file.read(name).copy() for name in file.layouts}


def begin(manifest, seed=0):
    """A as if drawn, B zero."""
    (values,) = drawn(manifest, 1, seed)
    return {n: np.zeros_like(v) if n.endswith(B[1:]) else v for n, v in values.items()}


def small(folder, name, manifest, rank, weight, seed):
    """One site's delta of a rank of its own, under its name."""
    own = KIND.of_rank(manifest, rank)
    values = drawn(own, 1, seed)
    folder = folder / f"{name}-{seed}"
    folder.mkdir()
    (delta,) = written(folder, own, values, [weight])
    return delta.__class__(name, delta.path, weight, 1.0, own), values[0]


def test_the_stack_worked_out_by_hand(tmp_path):
    """Two sites of rank 1; every value small enough to be added up in the head."""
    manifest = adapter_of(layer(2, 2, 1))
    source = {A: [[1, 2]], B: [[0], [0]]}
    deltas = [
        {A: np.float32([[1, 0]]), B: np.float32([[4], [0]])},
        {A: np.float32([[0, -2]]), B: np.float32([[0], [4]])},
    ]
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, manifest, deltas, [0.25, 0.75]),
        manifest,
        tmp_path / "next",
        method=FLORA,
    )
    found = read(tmp_path / "next")
    assert found[A].tolist() == [[1, 2], [2, 2], [1, 0]]
    assert found[B].tolist() == [[0, 1, 0], [0, 0, 3]]
    assert (found[B] @ found[A]).tolist() == [[2, 2], [3, 0]]
    # The mean delta is A: (1/4, -3/2), B: (1, 3).
    assert result.mean_norm == pytest.approx(math.sqrt(1 / 16 + 9 / 4 + 1 + 9))
    assert result.delta_norms["site-0"] == pytest.approx(math.sqrt(1 + 16))
    assert result.cosines["site-0"] == pytest.approx(
        (1 / 4 + 4) / (math.sqrt(17) * result.mean_norm)
    )
    assert result.exactness_gap == 0.0
    assert result.left_out == {}
    again = aggregate(
        tmp_path / "next",
        written(tmp_path, manifest, deltas[:1], [1.0]),
        manifest,
        tmp_path / "after",
        method=FLORA,
    )
    found = read(tmp_path / "after")
    assert found[A].tolist() == [[1, 2], [2, 2], [1, 0], [2, 2]]
    assert found[B].tolist() == [[0, 1, 0, 4], [0, 0, 3, 0]]
    assert again.digest.size > result.digest.size


def test_the_product_is_the_sum_of_all_rounds_products(tmp_path):
    """Sites of ranks 4, 2 and 1, one of them missing in round 2; to the rounding of fp32."""
    manifest = adapter_of(layer(7, 5, 4), layer(5, 9, 4, "v"))
    source = begin(manifest)
    path = sourced(tmp_path, manifest, source)
    present = [
        {"a": (4, 0.5), "b": (2, 0.3), "c": (1, 0.2)},
        {"a": (4, 0.6), "c": (1, 0.4)},
        {"a": (4, 0.1), "b": (2, 0.8), "c": (1, 0.1)},
    ]
    total = {layer.left.name: 0.0 for layer in KIND.layers(manifest)}
    rank = 4
    for number, sites in enumerate(present, start=1):
        deltas = []
        for name, (own, weight) in sites.items():
            delta, values = small(tmp_path, name, manifest, own, weight, seed=10 * number + own)
            deltas.append(delta)
            for _, b, a in KIND.layers(manifest):
                left = np.float64(values[b.name])
                right = np.float64(source[a.name][:own]) + values[a.name]
                total[b.name] = total[b.name] + weight * left @ right
        target = tmp_path / f"round-{number}"
        result = aggregate(path, deltas, manifest, target, method=FLORA)
        assert result.exactness_gap == 0.0
        path, found, rank = target, read(target), rank + sum(own for own, _ in sites.values())
        for _, b, a in KIND.layers(manifest):
            assert found[a.name].shape[0] == found[b.name].shape[1] == rank
            got = np.float64(found[b.name]) @ found[a.name]
            assert np.abs(got - total[b.name]).max() < 1e-5
            # The next round trains what the first one began with.
            assert found[a.name][:4].tobytes() == source[a.name].tobytes()
            assert not found[b.name][:, :4].any()


def test_order_and_threads_do_not_change_a_byte(tmp_path):
    """However the deltas are listed, and however many threads there are."""
    manifest = adapter_of(layer(33, 17, 4), layer(17, 33, 4, "v"))
    path = sourced(tmp_path, manifest, begin(manifest))
    deltas = written(tmp_path, manifest, drawn(manifest, 3, seed=3), [0.5, 0.25, 0.25])
    first = aggregate(path, deltas, manifest, tmp_path / "one", threads=1, method=FLORA)
    for threads in (1, 3):
        with threadpool_limits(threads, "blas"):
            again = aggregate(
                path, deltas[::-1], manifest, tmp_path / "two", threads=threads, method=FLORA
            )
        assert again == first


def test_a_clipped_delta_moves_both_factors_by_its_scale(tmp_path):
    """As with svd; its norm is recorded as it was sent."""
    manifest = adapter_of(layer(4, 3, 2))
    source = begin(manifest)
    (values,) = drawn(manifest, 1, seed=2)
    result = aggregate(
        sourced(tmp_path, manifest, source),
        written(tmp_path, manifest, [values], [1.0], [0.5]),
        manifest,
        tmp_path / "next",
        method=FLORA,
    )
    found = read(tmp_path / "next")
    wanted = (0.5 * np.float64(values[B])) @ (np.float64(source[A]) + 0.5 * values[A])
    assert np.abs(np.float64(found[B]) @ found[A] - wanted).max() < 1e-6
    norm = math.sqrt(sum(float(np.sum(np.float64(v) ** 2)) for v in values.values()))
    assert result.delta_norms["site-0"] == pytest.approx(norm)
    assert result.mean_norm == pytest.approx(norm / 2)


def test_what_peft_needs_follows_from_the_file_and_from_the_records(tmp_path):
    """The file's rank, with the alpha that keeps alpha / r; other runs keep their settings."""
    base = {"model": "none", "quantisation": "none"}
    lora = {"rank": 4, "alpha": 8.0, "ranks": {"c": 1}}
    flora = config(lora=lora, base=base, aggregation={"averaging": "flora"})
    inputs = tuple(Input(site=site, sha="0" * 64, from_round=1, weight=1 / 3) for site in "abc")
    closing = ClosingRecord(round=1, source_sha="0" * 64, inputs=inputs)
    manifest = adapter_of(layer(2, 3, 13))
    path = sourced(tmp_path, manifest, begin(manifest))
    found = MODE.settings_in(path, flora.lora)
    assert (found.rank, found.alpha) == (13, 26.0)
    assert MODE.settings_after([closing], flora.lora) == found
    assert MODE.settings_after([], flora.lora).rank == 4
    plain = config(aggregation={"averaging": "svd"})
    assert get_averaging("fedavg").settings_in(path, plain.lora) is plain.lora


def test_an_adapter_of_other_tensors_is_refused(tmp_path):
    """An error and no half of an adapter: no factors, or another layer's."""
    plain = Manifest(
        tensors=(TensorSpec(name="w", shape=(2, 2), init="zeros"),), target_modules=("w",)
    )
    one, other = adapter_of(layer(2, 3, 2)), adapter_of(layer(2, 4, 2))
    for manifest, held in ((plain, plain), (one, other)):
        path = sourced(tmp_path, held, drawn(held, 1)[0])
        deltas = written(tmp_path, manifest, drawn(manifest, 1), [1.0])
        with pytest.raises(LedgerError, match=r"flora|lora_A.*expected shape \(2, 3\)"):
            aggregate(path, deltas, manifest, tmp_path / "next", method=FLORA)
        assert not (tmp_path / "next").exists()


def test_a_factor_beyond_fp32_names_the_tensor(tmp_path):
    """As a sum beyond it does."""
    manifest = adapter_of(layer(2, 1, 1))
    huge = {s.name: np.full(s.shape, 3e38, np.float32) for s in manifest.tensors}
    path = sourced(tmp_path, manifest, huge)
    deltas = written(tmp_path, manifest, [huge], [1.0])
    with pytest.raises(LedgerError, match=r"lora_A.*max_delta_norm"):
        aggregate(path, deltas, manifest, tmp_path / "next", method=FLORA)
