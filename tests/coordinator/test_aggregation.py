"""Aggregation: Algorithm 2's numbers, to the byte, whatever the order and the threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from coordinator.aggregation.closing import aggregate
from coordinator.round.weighting import Counts, weights
from shared.errors import ConfigError, DecodeError, DeltaRefusedError, LedgerError
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.stopwatch import Stopwatch
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors

if TYPE_CHECKING:
    import random
    from pathlib import Path

MANIFEST = Manifest(
    tensors=(
        TensorSpec(name="a", shape=(2,), init="zeros"),
        TensorSpec(name="b", shape=(1, 2), init="zeros"),
    ),
    target_modules=("a",),
)
SMALL = nps.arrays(np.float32, 4, elements=st.floats(-(2.0**20), 2.0**20, width=32))


def write_adapter(path: Path, manifest: Manifest, flat: Any) -> None:
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    write_tensors(path, layouts, split(manifest, flat).values())


def split(manifest: Manifest, flat: Any) -> dict[str, Any]:
    """A flat array as the manifest's tensors, by name."""
    ends = np.cumsum([spec.elements for spec in manifest.tensors])[:-1]
    parts = zip(manifest.tensors, np.split(np.asarray(flat, np.float32), ends), strict=True)
    return {spec.name: values.reshape(spec.shape) for spec, values in parts}


def delta(
    folder: Path, site: str, weight: float, flat: Any, codec: str = "fp32", manifest: Any = MANIFEST
) -> WeightedDelta:
    tensors = split(manifest, flat)
    header = DeltaHeader(
        run="r", round=1, site=site, source_sha="0" * 64,
        codec=codec, codec_version=get_codec(codec).version,
    )  # fmt: skip
    path = folder / f"{site}.safetensors"
    write_delta(path, manifest, codec, header, lambda spec: tensors[spec.name], 1)
    return WeightedDelta(site, path, weight)


def flat_of(path: Path) -> Any:
    with TensorFile(path) as file:
        return np.concatenate([file.read(name).reshape(-1) for name in file.layouts])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    write_adapter(path, MANIFEST, [1, 2, 3, 4])
    return path


def test_the_result_is_the_one_worked_out_by_hand(tmp_path: Path, source: Path) -> None:
    """A + D1 / 4 + 3 D2 / 4, with its norms and cosines."""
    deltas = [
        delta(tmp_path, "east", 0.25, [4, 0, 0, 0]),
        delta(tmp_path, "west", 0.75, [0, 0, 4, 0]),
    ]
    result = aggregate(source, deltas, MANIFEST, tmp_path / "target")
    assert flat_of(tmp_path / "target").tolist() == [2, 2, 6, 4]
    assert result.delta_norms == {"east": 4, "west": 4}
    assert result.mean_norm == float(f"{math.sqrt(10):.9g}")
    # The mean is (1, 0, 3, 0): the cosines are 1 and 3 over sqrt(10).
    assert result.cosines == {"east": 0.316227766, "west": 0.948683298}


def test_equal_deltas_have_cosine_one_and_zeros_have_none(tmp_path: Path, source: Path) -> None:
    """A site that did not move points nowhere: 0, never NaN, which no record could hold."""
    deltas = [
        delta(tmp_path, "east", 0.5, [3, 4, 0, 0]),
        delta(tmp_path, "west", 0.5, [0, 0, 0, 0]),
    ]
    result = aggregate(source, deltas, MANIFEST, tmp_path / "target")
    assert result.cosines == {"east": 1, "west": 0}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(SMALL, st.integers(1, 50)), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_order_and_threads_do_not_change_a_byte(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: list[tuple[Any, int]],
    order: random.Random,
    threads: int,
    codec: str,
) -> None:
    """Any permutation of the deltas, any number of threads: one digest and equal metrics."""
    folder = tmp_path_factory.mktemp("permuted")
    total = sum(count for _, count in inputs)
    deltas = [
        delta(folder, f"site-{i}", count / total, values, codec)
        for i, (values, count) in enumerate(inputs)
    ]
    write_adapter(folder / "source", MANIFEST, [0.1, -0.2, 0.3, 1e-9])
    first = aggregate(folder / "source", deltas, MANIFEST, folder / "first", threads=1)
    order.shuffle(deltas)
    second = aggregate(folder / "source", deltas, MANIFEST, folder / "second", threads=threads)
    assert first == second
    assert (folder / "first").read_bytes() == (folder / "second").read_bytes()


def test_threads_and_blas_do_not_change_a_byte_of_large_tensors(tmp_path: Path) -> None:
    """Tensors longer than a block, not a multiple of it, more of them than threads."""
    specs = tuple(TensorSpec(name=f"t{i}", shape=(3, 50_001), init="zeros") for i in range(7))
    manifest = Manifest(tensors=specs, target_modules=("t",))
    draw = np.random.default_rng(1)
    count = sum(spec.elements for spec in specs)
    write_adapter(tmp_path / "source", manifest, draw.standard_normal(count, np.float32))
    flats = [draw.standard_normal(count, np.float32) for _ in range(3)]
    deltas = [
        delta(tmp_path, f"s{i}", 1 / 3, flat, manifest=manifest) for i, flat in enumerate(flats)
    ]
    results = [
        aggregate(tmp_path / "source", deltas, manifest, tmp_path / "target", threads=threads)
        for threads in (1, 2, 5)
    ]
    assert results[0] == results[1] == results[2]
    # The formula, spelt out in fp64 over whole arrays, has the same bits.
    mean = np.zeros(count)
    for flat in flats:
        mean += flat.astype(np.float64) * (1 / 3)
    wanted = (mean + flat_of(tmp_path / "source")).astype(np.float32)
    assert flat_of(tmp_path / "target").tobytes() == wanted.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SMALL, st.integers(1, 50)), min_size=1, max_size=4), SMALL)
def test_it_is_fedavg_on_the_weights(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[tuple[Any, int]], start: Any
) -> None:
    """The weighted mean of A + D_i equals A + the weighted mean of D_i to 1e-6 of the largest."""
    folder = tmp_path_factory.mktemp("fedavg")
    total = sum(count for _, count in inputs)
    deltas = [
        delta(folder, f"site-{i}", count / total, values)
        for i, (values, count) in enumerate(inputs)
    ]
    write_adapter(folder / "source", MANIFEST, start)
    aggregate(folder / "source", deltas, MANIFEST, folder / "target")
    locals_ = [start.astype(np.float64) + values for values, _ in inputs]
    wanted = sum(local * (count / total) for local, (_, count) in zip(locals_, inputs, strict=True))
    scale = max(1.0, *(float(np.abs(local).max()) for local in locals_), float(np.abs(start).max()))
    assert np.abs(flat_of(folder / "target") - wanted).max() <= 1e-6 * scale


def test_one_cast_keeps_what_many_would_lose(tmp_path: Path, source: Path) -> None:
    """At 1, eight steps of 2**-26 each vanish in fp32; together they are 2**-23, its next value."""
    deltas = [delta(tmp_path, f"s{i}", 0.125, [2.0**-23, 0, 0, 0]) for i in range(8)]
    aggregate(source, deltas, MANIFEST, tmp_path / "target")
    assert flat_of(tmp_path / "target")[0] == 1 + 2.0**-23


def test_the_stopwatch_tells_the_phases_apart(tmp_path: Path, source: Path) -> None:
    """A benchmark sees five phases, and the result is the same as without."""
    deltas = [delta(tmp_path, "east", 1.0, [1, 1, 1, 1])]
    watch = Stopwatch()
    timed = aggregate(source, deltas, MANIFEST, tmp_path / "target", watch)
    assert set(watch.seconds) == {"read", "accumulate", "measure", "hash", "write"}
    assert timed == aggregate(source, deltas, MANIFEST, tmp_path / "target")


def test_a_site_that_is_listed_twice_is_refused(tmp_path: Path, source: Path) -> None:
    """A delta counts once."""
    deltas = [delta(tmp_path, "east", 0.5, [1, 1, 1, 1])] * 2
    with pytest.raises(LedgerError, match="each site once, got east twice"):
        aggregate(source, deltas, MANIFEST, tmp_path / "target")


@pytest.mark.parametrize(
    "shares", [(0.5, 0.49), (0.5, 0.500001), (1.5, -0.5), (math.nan, 1.0), (math.inf, 0.0)]
)
def test_weights_that_are_no_shares_are_refused(
    tmp_path: Path, source: Path, shares: tuple[float, float]
) -> None:
    """They must be numbers from 0 that sum to 1 within 1e-9."""
    deltas = [delta(tmp_path, site, w, [1] * 4) for site, w in zip("ab", shares, strict=True)]
    with pytest.raises(LedgerError, match="weights: expected"):
        aggregate(source, deltas, MANIFEST, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_no_deltas_at_all_are_refused(tmp_path: Path, source: Path) -> None:
    """A round without inputs is not closed by copying the source."""
    with pytest.raises(LedgerError, match="sum of 1, got 0"):
        aggregate(source, [], MANIFEST, tmp_path / "target")


def test_a_sum_beyond_fp32_is_refused(tmp_path: Path) -> None:
    """Two finite tensors may add up to infinity; no adapter holding it is written."""
    write_adapter(tmp_path / "source", MANIFEST, [3e38, 0, 0, 0])
    deltas = [delta(tmp_path, "east", 1.0, [3e38, 0, 0, 0])]
    with pytest.raises(LedgerError, match="'a': expected finite values"):
        aggregate(tmp_path / "source", deltas, MANIFEST, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_torn_files_are_refused(tmp_path: Path, source: Path) -> None:
    """A delta or a source that lost its end is an error of its own kind, not a short result."""
    east = delta(tmp_path, "east", 1.0, [1, 1, 1, 1])
    whole = source.read_bytes()
    source.write_bytes(whole[:-1])
    with pytest.raises(DecodeError, match="bytes of data"):
        aggregate(source, [east], MANIFEST, tmp_path / "target")
    source.write_bytes(whole)
    east.path.write_bytes(east.path.read_bytes()[:-1])
    with pytest.raises(DeltaRefusedError, match="bytes of data"):
        aggregate(source, [east], MANIFEST, tmp_path / "target")


COUNTS = {"b": Counts(examples=3, tokens=10), "a": Counts(examples=1, tokens=70)}


def test_weights_follow_their_mode() -> None:
    """Equal shares, or in proportion to examples or tokens; sites in name order."""
    assert weights("equal", COUNTS) == {"a": 0.5, "b": 0.5}
    assert weights("examples", COUNTS) == {"a": 0.25, "b": 0.75}
    assert weights("tokens", COUNTS) == {"a": 0.875, "b": 0.125}
    assert list(weights("examples", COUNTS)) == ["a", "b"]


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 10**12), min_size=1))
def test_weights_sum_to_one(examples: dict[str, int]) -> None:
    """Far inside the tolerance that aggregation allows."""
    shares = weights("examples", {site: Counts(n, 0) for site, n in examples.items()})
    assert abs(math.fsum(shares.values()) - 1) < 1e-12


@pytest.mark.parametrize("counts", [{}, {"a": Counts(0, 0)}, {"a": Counts(-1, 0)}])
def test_nothing_to_share_by_is_a_config_error(counts: dict[str, Counts]) -> None:
    """No site, no examples anywhere, or a negative count."""
    with pytest.raises(ConfigError, match="expected examples from at least one site"):
        weights("examples", counts)


MEASURE = """
import sys
from pathlib import Path
from coordinator.aggregation.closing import aggregate
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest
from shared.tensors.stopwatch import Stopwatch

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

class Sampling(Stopwatch):
    def phase(self, name):
        samples.append(anonymous())
        return super().phase(name)

folder, count = Path(sys.argv[1]), int(sys.argv[2])
manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
deltas = [WeightedDelta(f"s{i}", folder / f"s{i}.safetensors", 1 / count) for i in range(count)]
samples = [anonymous()]
aggregate(folder / "source", deltas, manifest, folder / "target", Sampling(), threads=2)
print(max(samples) - samples[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' /proc")  # noqa: PTH110
def test_memory_does_not_grow_with_the_number_of_deltas(tmp_path: Path) -> None:
    """Eight deltas of 4 million values cost what two cost: a few tensors a thread."""
    specs = tuple(TensorSpec(name=f"t{i:02}", shape=(250_000,), init="zeros") for i in range(16))
    manifest = Manifest(tensors=specs, target_modules=("t",))
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    flat = np.ones(sum(spec.elements for spec in specs), np.float32)
    write_adapter(tmp_path / "source", manifest, flat)
    for i in range(8):
        delta(tmp_path, f"s{i}", 1, flat, "int8", manifest)
    grown = {}
    for count in (2, 8):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(count)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown[count] = int(answer) * 1024
    assert grown[8] < grown[2] + 8_000_000
    assert max(grown.values()) < 64_000_000
