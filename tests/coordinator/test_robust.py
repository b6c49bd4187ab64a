"""Robust rules: by hand, against dense numpy, in any order, and what a bad delta can do at most."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from coordinator.aggregation.closing import Method, aggregate
from shared.config import AggregationSection
from shared.errors import LedgerError
from shared.methods import votes
from shared.methods.rules.multi_krum import krum_scores
from shared.protocol.manifest import Manifest, TensorSpec
from tests.coordinator.test_aggregation import MANIFEST, delta, flat_of, write_adapter

ANY = st.floats(-(2.0**100), 2.0**100, width=32)
FLAT = nps.arrays(np.float32, 4, elements=ANY)
RULES = ("median", "trimmed-mean", "multi-krum")


def method(rule: str, bad: int = 1) -> Method:
    return Method(AggregationSection(rule=rule, assumed_bad=bad))


def closed(folder, flats, how, source=(0, 0, 0, 0), manifest=MANIFEST, scales=None, **more):
    """The next adapter's values and the figures; sites are a, b, c, ..."""
    write_adapter(folder / "source", manifest, source)
    names = [f"s{i:02}" for i in range(len(flats))]
    deltas = [
        delta(folder, name, 1 / len(flats), flat, more.pop("codec", "fp32"), manifest)
        for name, flat in zip(names, flats, strict=True)
    ]
    if scales:
        deltas = [replace(d, scale=s) for d, s in zip(deltas, scales, strict=True)]
    result = aggregate(folder / "source", deltas, manifest, folder / "target", method=how, **more)
    return flat_of(folder / "target"), result


FIVE = [
    [1, 0, 2, -1],
    [2, 3, 4, 8],
    [3, 6, 6, 3],
    [4, 0, 8, 9],
    [1000, -8, 10, 1],
]


def test_the_median_is_the_one_worked_out_by_hand(tmp_path):
    """Sorted by value: 1 2 [3] 4 1000, -8 0 [0] 3 6, 2 4 [6] 8 10, -1 1 [3] 8 9."""
    values, result = closed(tmp_path, FIVE, method("median"), source=(10, 20, 30, 40))
    assert values.tolist() == [13, 20, 36, 43]
    assert result.mean_norm == float(f"{math.sqrt(9 + 0 + 36 + 9):.9g}")
    assert result.left_out == {}
    # (1, 0, 2, -1) . (3, 0, 6, 3) = 12, over sqrt(6) sqrt(54) = 18.
    assert result.cosines["s00"] == 0.666666667


def test_the_median_of_four_is_the_mean_of_the_two_in_the_middle(tmp_path):
    """Without the last: 1 [2 3] 4, 0 [0 3] 6, 2 [4 6] 8, -1 [3 8] 9."""
    values, _ = closed(tmp_path, FIVE[:4], method("median"))
    assert values.tolist() == [2.5, 1.5, 5, 5.5]


def test_the_trimmed_mean_is_the_one_worked_out_by_hand(tmp_path):
    """One from each end goes: (2+3+4)/3, (0+0+3)/3, (4+6+8)/3, (1+3+8)/3."""
    values, _ = closed(tmp_path, FIVE, method("trimmed-mean"))
    assert values.tolist() == [3, 1, 6, 4]
    values, _ = closed(tmp_path, FIVE, method("trimmed-mean", 2))
    assert values.tolist() == [3, 0, 6, 3]


def test_multi_krum_is_the_one_worked_out_by_hand(tmp_path):
    """On a line at 0, 1, 2, 4, 100; two nearest: 1+4, 1+1, 1+4, 4+9, 96^2+98^2; mean of four."""
    flats = [[x, 0, 0, 0] for x in (0, 1, 2, 4, 100)]
    values, result = closed(tmp_path, flats, method("multi-krum"))
    assert values.tolist() == [1.75, 0, 0, 0]
    assert result.mean_norm == 1.75
    assert result.left_out == {
        "s04": "multi-krum: its score 18820 is not among the 4 smallest of 5; "
        "the largest of those is 13"
    }
    assert result.delta_norms["s04"] == 100  # it is measured all the same


def test_krum_scores_by_hand():
    """Seven with f = 2: the three nearest of six."""
    places = (0, 1, 3, 6, 10, 50, 90)
    distances = {
        (i, j): float((places[i] - places[j]) ** 2) for i, j in itertools.combinations(range(7), 2)
    }
    assert krum_scores(7, distances, 2) == [46, 30, 22, 50, 146, 5136, 15056]


def test_of_equal_scores_the_later_name_is_left_out(tmp_path):
    """Five equal deltas: somebody must go, and always the same one."""
    values, result = closed(tmp_path, [[1, 2, 3, 4]] * 5, method("multi-krum"))
    assert list(result.left_out) == ["s04"]
    assert values.tolist() == [1, 2, 3, 4]


def test_a_scale_is_multiplied_by_before_anything_else(tmp_path):
    """Mean: (8 x 0.5 + 2) / 2 = 3. Median of 8 x 0.5, 2, 3: 3. The norm is of what was sent."""
    values, result = closed(tmp_path, [[8, 0, 0, 0], [2, 0, 0, 0]], None, scales=[0.5, 1.0])
    assert values.tolist() == [3, 0, 0, 0]
    assert result.delta_norms == {"s00": 8, "s01": 2}
    assert result.mean_norm == 3
    flats = [[8, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]
    values, _ = closed(tmp_path, flats, method("median"), scales=[0.5, 1.0, 1.0])
    assert values.tolist() == [3, 0, 0, 0]
    flats = [[x, 0, 0, 0] for x in (0, 1, 2, 4, 100)]
    values, result = closed(tmp_path, flats, method("multi-krum"), scales=[1, 1, 1, 1, 0.01])
    assert list(result.left_out) == ["s03"]  # scaled to 1, the last one is in the middle
    assert values.tolist() == [1, 0, 0, 0]


def test_a_scale_of_one_leaves_every_byte_as_it_was(tmp_path):
    """The formula without any scale, spelt out, has the same bits."""
    draw = np.random.default_rng(3)
    flats = draw.standard_normal((3, 4)).astype(np.float32)
    start = draw.standard_normal(4).astype(np.float32)
    values, _ = closed(tmp_path, flats, Method(), start, scales=[1.0, 1.0, 1.0])
    mean = np.zeros(4)
    for flat in flats:
        mean += flat.astype(np.float64) * (1 / 3)
    assert values.tobytes() == (mean + start).astype(np.float32).tobytes()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_rule_equals_a_dense_computation(tmp_path_factory, data):
    """Any shapes, K, f and scales against numpy over whole arrays, within one rounding to fp32."""
    folder = tmp_path_factory.mktemp("dense")
    rule = data.draw(st.sampled_from(RULES))
    bad = data.draw(st.integers(1, 2))
    count = data.draw(st.integers(2 * bad + 3, 2 * bad + 6))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1))
    specs = [TensorSpec(name=f"t{i:02}", shape=s, init="zeros") for i, s in enumerate(shapes[:6])]
    manifest = Manifest(tensors=tuple(specs), target_modules=("t",))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = sum(spec.elements for spec in specs)
    flats = draw.standard_normal((count, size)).astype(np.float32)
    scales = draw.choice([1.0, 1.0, 0.3], count).tolist()
    start = draw.standard_normal(size).astype(np.float32)
    got, result = closed(folder, flats, method(rule, bad), start, manifest, scales)
    dense = flats.astype(np.float64) * np.array(scales)[:, None]
    if rule == "median":
        step = np.median(dense, axis=0)
    elif rule == "trimmed-mean":
        step = np.sort(dense, axis=0)[bad : count - bad].mean(axis=0)
    else:
        apart = ((dense[:, None] - dense[None]) ** 2).sum(axis=2)
        scores = np.sort(apart, axis=1)[:, 1 : count - bad - 1].sum(axis=1)
        taken = np.sort(np.argsort(scores)[: count - bad])
        assert set(result.left_out) == {f"s{i:02}" for i in range(count) if i not in taken}
        step = dense[taken].mean(axis=0)
    np.testing.assert_allclose(got, start + step, rtol=1e-6, atol=1e-6)
    assert math.isclose(result.mean_norm, np.linalg.norm(step), rel_tol=1e-6, abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(RULES),
    st.lists(
        nps.arrays(np.float32, 4, elements=st.floats(-8, 8, width=32)), min_size=5, max_size=7
    ),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_order_and_threads_do_not_change_a_byte(
    tmp_path_factory, rule, flats, order, threads, codec
):
    """Any permutation of the deltas, any number of threads: one digest, one verdict."""
    folder = tmp_path_factory.mktemp("permuted")
    write_adapter(folder / "source", MANIFEST, [-0.0, -0.2, 0.3, 1e-9])
    deltas = [delta(folder, f"s{i}", 1 / len(flats), flat, codec) for i, flat in enumerate(flats)]
    how = method(rule)
    first = aggregate(folder / "source", deltas, MANIFEST, folder / "1", threads=1, method=how)
    order.shuffle(deltas)
    again = aggregate(
        folder / "source", deltas, MANIFEST, folder / "2", threads=threads, method=how
    )
    assert first == again
    assert (folder / "1").read_bytes() == (folder / "2").read_bytes()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@pytest.mark.parametrize("zeros", [[0.0, -0.0, -0.0], [-0.0, 0.0, -0.0], [-0.0, -0.0, 0.0]])
def test_which_site_sends_a_negative_zero_does_not_change_a_byte(tmp_path, rule, zeros):
    """Sorting has no order between 0.0 and -0.0, yet -0.0 + 0.0 and -0.0 + -0.0 differ in a bit."""
    flats = [[zero, 0, 0, 0] for zero in zeros]
    values, _ = closed(tmp_path, flats, method(rule), source=(-0.0, 0, 0, 0))
    assert not np.signbit(values[0])


@pytest.mark.parametrize("rule", RULES)
def test_slices_and_threads_do_not_change_what_is_read(tmp_path, rule, monkeypatch):
    """Tensors of many slices, not a multiple of one: the same values as in one piece."""
    specs = tuple(TensorSpec(name=f"t{i}", shape=(3, 1001), init="zeros") for i in range(4))
    manifest = Manifest(tensors=specs, target_modules=("t",))
    flats = np.random.default_rng(4).standard_normal((5, 4 * 3003)).astype(np.float32)
    start = np.zeros(4 * 3003)
    whole, first = closed(tmp_path, flats, method(rule), start, manifest)
    monkeypatch.setattr(votes, "ROOM", 5 * 250)
    parts, second = closed(tmp_path, flats, method(rule), start, manifest, threads=3)
    assert whole.tobytes() == parts.tobytes()
    assert first == second


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["median", "trimmed-mean"]),
    st.integers(1, 2),
    st.data(),
)
def test_bad_deltas_cannot_leave_the_range_of_the_good_ones(tmp_path_factory, rule, bad, data):
    """With f of K arbitrary every coordinate stays between the good ones' least and largest."""
    good = data.draw(st.lists(FLAT, min_size=bad + 1, max_size=bad + 4))
    evil = data.draw(st.lists(FLAT, min_size=bad, max_size=bad))
    if rule == "median" and len(good) + len(evil) < 3:
        return
    mixed = data.draw(st.permutations([*good, *evil]))
    values, _ = closed(tmp_path_factory.mktemp("range"), mixed, method(rule, bad))
    slack = np.abs(good).max(axis=0) * 2.0**-22
    assert (values >= np.min(good, axis=0) - slack).all()
    assert (values <= np.max(good, axis=0) + slack).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(0, 3), st.floats(10, 2.0**60), st.randoms())
def test_multi_krum_leaves_out_exactly_the_far_ones(tmp_path_factory, bad, more, far, order):
    """K - f near each other and f that are far away, even all at one place: the f are left out."""
    count = 2 * bad + 3 + more
    flats = [[i / count, -i / count, 0, 0] for i in range(count - bad)]
    flats += [[far, far, far, far]] * bad
    order.shuffle(flats)
    _, result = closed(tmp_path_factory.mktemp("far"), flats, method("multi-krum", bad))
    assert set(result.left_out) == {f"s{i:02}" for i, flat in enumerate(flats) if flat[3] == far}


@pytest.mark.parametrize(
    ("rule", "bad", "count", "needs"),
    [("median", 1, 2, 3), ("trimmed-mean", 2, 4, 5), ("multi-krum", 1, 4, 5)],
)
def test_too_few_deltas_are_refused(tmp_path, rule, bad, count, needs):
    """No rule gives a result that it cannot stand for."""
    with pytest.raises(LedgerError, match=rf'"{rule}".*needs {needs} deltas, got {count}'):
        closed(tmp_path, [[1, 1, 1, 1]] * count, method(rule, bad))
    assert not (tmp_path / "target").exists()
