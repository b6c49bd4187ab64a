"""The fit of a mean product: by hand, against the dense SVD, and where there is nothing to fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from coordinator.aggregation.closing import Method, aggregate
from shared.config import AggregationSection
from shared.errors import LedgerError
from shared.methods.averaging.svd import distance, fit
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.tensor_file import TensorFile
from tests.coordinator.test_exactness import adapter_of, drawn, layer, sourced, written

SVD = Method(AggregationSection(averaging="svd"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_fit_worked_out_by_hand():
    """diag(4, 1) as two products: rank 1 keeps the 4, half of it in each factor, and loses 1."""
    lefts = [np.array([[2.0], [0.0]]), np.array([[0.0], [1.0]])]
    rights = [np.array([[2.0, 0.0]]), np.array([[0.0, 1.0]])]
    found = fit(lefts, rights, np.zeros((1, 2)))
    assert np.allclose(found.b, [[2], [0]])
    assert np.allclose(found.a, [[2, 0]])
    assert found.residual == pytest.approx(1)


def test_the_sign_is_the_one_that_is_stated():
    """The largest value of each column of B is positive, whatever LAPACK chose."""
    for seed in range(10):
        found = fit([random(6, 3, seed=seed)], [random(3, 5, seed=seed + 99)], np.zeros((3, 5)))
        assert (found.b[np.abs(found.b).argmax(axis=0), range(3)] > 0).all()


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 1), (9, 9, 9)])
@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (5, 7)])
def test_the_fit_is_that_of_the_dense_matrix(outputs, inputs, ranks):
    """To 1e-6, with stacks wider than the layer too; nothing of rank 4 is closer."""
    lefts = [random(outputs, r, seed=r) for r in ranks]
    rights = [random(r, inputs, seed=r + 50) for r in ranks]
    dense = sum(one @ other for one, other in zip(lefts, rights, strict=True))
    u, s, v = np.linalg.svd(dense)
    found = fit(lefts, rights, np.zeros((4, inputs)))
    assert np.abs(found.b @ found.a - (u[:, :4] * s[:4]) @ v[:4]).max() < 1e-6
    assert math.sqrt(found.residual) == pytest.approx(math.sqrt(float(np.sum(s[4:] ** 2))))
    # The first two rows and columns are the best fit of rank two.
    assert np.abs(found.b[:, :2] @ found.a[:2] - (u[:, :2] * s[:2]) @ v[:2]).max() < 1e-6


def test_a_direction_that_no_product_uses_begins_as_at_genesis():
    """B zero and A the source's: with both zero it would never be trained again."""
    spare = random(3, 5, seed=7)
    one = fit([random(6, 1)], [random(1, 5)], spare)
    assert np.abs(one.b[:, 0]).min() > 0
    assert not one.b[:, 1:].any()
    assert (one.a[1:] == spare[1:]).all()
    none = fit([np.zeros((6, 3))], [random(3, 5)], spare)
    assert not none.b.any()
    assert (none.a == spare).all()
    assert one.residual == none.residual == 0


def round_of(folder, seed=0, outputs=33, inputs=17):
    pair = layer(outputs, inputs, 4)
    manifest = adapter_of(pair, layer(inputs, outputs, 4, "v"))
    (source,) = drawn(manifest, 1, seed=seed + 1)
    deltas = written(folder, manifest, drawn(manifest, 3, seed=seed), [0.5, 0.25, 0.25])
    return sourced(folder, manifest, source), deltas, manifest


@pytest.mark.parametrize("blas", [1, 2])
def test_order_and_threads_do_not_change_a_byte(tmp_path, blas):
    """Whatever BLAS was set to before, and however many threads take layers."""
    source, deltas, manifest = round_of(tmp_path, outputs=300, inputs=200)
    first = aggregate(source, deltas, manifest, tmp_path / "one", threads=1, method=SVD)
    for threads in (1, 2, 3):
        with threadpool_limits(blas, "blas"):
            again = aggregate(
                source, deltas[::-1], manifest, tmp_path / "two", threads=threads, method=SVD
            )
        assert again == first
    assert distance(tmp_path / "one", tmp_path / "two", manifest) < 1e-12


def test_distance_is_of_the_products(tmp_path):
    """Two adapters that do the same are none apart; one that does 1 % more is 1 % apart."""
    manifest = adapter_of(layer(6, 5, 2))
    (values,) = drawn(manifest, 1)
    turned, larger = dict(values), dict(values)
    turned["q.lora_A.weight"] = np.float32(2 * values["q.lora_A.weight"][::-1])
    turned["q.lora_B.weight"] = np.float32(values["q.lora_B.weight"][:, ::-1] / 2)
    larger["q.lora_B.weight"] = np.float32(1.01 * values["q.lora_B.weight"])
    paths = []
    for name, one in (("one", values), ("turned", turned), ("larger", larger)):
        (tmp_path / name).mkdir()
        paths.append(sourced(tmp_path / name, manifest, one))
    assert distance(paths[0], paths[1], manifest) < 1e-12
    assert distance(paths[0], paths[2], manifest) == pytest.approx(0.01, rel=1e-4)


def test_a_delta_is_scaled_before_it_is_multiplied(tmp_path):
    """A clipped delta moves both factors by its scale."""
    pair = layer(4, 3, 2)
    manifest = adapter_of(pair)
    (source,), (values,) = drawn(manifest, 1, seed=1), drawn(manifest, 1)
    path = sourced(tmp_path, manifest, source)
    aggregate(
        path, written(tmp_path, manifest, [values], [1.0], [0.5]), manifest, tmp_path / "next",
        method=SVD,
    )  # fmt: skip
    b, a = (np.float64(source[s.name]) + 0.5 * values[s.name] for s in pair[1:])
    with TensorFile(tmp_path / "next") as file:
        got = file.read(pair.left.name).astype(float) @ file.read(pair.right.name)
    assert np.abs(got - b @ a).max() < 1e-6


def test_an_adapter_of_other_tensors_has_no_products(tmp_path):
    """An error and no half of an adapter."""
    manifest = Manifest(
        tensors=(TensorSpec(name="w", shape=(2, 2), init="zeros"),), target_modules=("w",)
    )
    (values,) = drawn(manifest, 1)
    source = sourced(tmp_path, manifest, values)
    deltas = written(tmp_path, manifest, [values], [1.0])
    with pytest.raises(LedgerError, match="svd"):
        aggregate(source, deltas, manifest, tmp_path / "next", method=SVD)
    assert not (tmp_path / "next").exists()


def test_a_product_beyond_fp32_names_the_tensor(tmp_path):
    """As a sum beyond it does."""
    manifest = adapter_of(layer(2, 1, 1))
    zeros = {s.name: np.zeros(s.shape) for s in manifest.tensors}
    huge = {s.name: np.full(s.shape, 3e38, np.float32) for s in manifest.tensors}
    source = sourced(tmp_path, manifest, zeros)
    deltas = written(tmp_path, manifest, [huge], [1.0])
    with pytest.raises(LedgerError, match=r"lora_.*max_delta_norm"):
        aggregate(source, deltas, manifest, tmp_path / "next", method=SVD)
