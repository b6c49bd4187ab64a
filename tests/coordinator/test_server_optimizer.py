"""The server's optimisers: numbers worked out by hand, a dense second opinion, torch's SGD."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.closing import Method, aggregate
from coordinator.aggregation.server_optimizer import StateFiles
from shared.config import ServerSection
from shared.errors import DecodeError, LedgerError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.tensor_file import TensorFile
from tests.coordinator.test_aggregation import MANIFEST, delta, flat_of, split, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

STATEFUL = ("fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad")
ADAPTIVE = STATEFUL[2:]


def section(optimizer: str, **values: float) -> ServerSection:
    """Its settings, with a rate that is allowed for all."""
    return ServerSection(optimizer=optimizer, **{"learning_rate": 0.5, **values})


class Server:
    """Rounds one after the other, each from the files that the last one left."""

    def __init__(self, folder: Path, given: ServerSection, start: Any, manifest: Any = MANIFEST):
        self.folder, self.section, self.manifest = folder, given, manifest
        self.round = 0
        write_adapter(folder / "adapter-0", manifest, start)

    def close(self, *flats: Any, threads: int = 2, order: Any = None) -> Any:
        """Close a round with these deltas, equal weights, listed anyhow; what came of it."""
        number = self.round
        self.round += 1
        deltas = [
            delta(self.folder, f"s{i}", 1 / len(flats), flat, manifest=self.manifest)
            for i, flat in enumerate(flats)
        ]
        if order is not None:
            order.shuffle(deltas)
        before = self.folder / f"state-{number}" if number else None
        return aggregate(
            self.folder / f"adapter-{number}",
            deltas,
            self.manifest,
            self.folder / f"adapter-{self.round}",
            threads=threads,
            method=Method(server=self.section),
            state=StateFiles(before, self.folder / f"state-{self.round}"),
        )

    @property
    def adapter(self) -> Any:
        """The newest values, flat."""
        return flat_of(self.folder / f"adapter-{self.round}")

    def state(self, row: int) -> Any:
        """A row of the newest state, flat over all tensors."""
        with TensorFile(self.folder / f"state-{self.round}") as file:
            return np.concatenate([file.read(name)[row].reshape(-1) for name in file.layouts])


# By hand -------------------------------------------------------------------------------------

# Binary fractions throughout, so that each number below is exact.
HALVES = {"momentum": 0.5, "learning_rate": 0.5}


def test_fedavgm_by_hand(tmp_path: Path) -> None:
    """M = m / 2 + D; the step is M / 2."""
    server = Server(tmp_path, section("fedavgm", **HALVES), [0, 0, 1, 0])
    assert server.close([4, 0, 0, 8]).stepped.norm == float(f"{math.sqrt(4 + 16):.9g}")
    assert server.state(0).tolist() == [4, 0, 0, 8]
    assert server.adapter.tolist() == [2, 0, 1, 4]
    result = server.close([2, 2, 0, -4])
    assert server.state(0).tolist() == [4, 2, 0, 0]
    assert server.adapter.tolist() == [4, 1, 1, 4]
    assert result.mean_norm == float(f"{math.sqrt(4 + 4 + 16):.9g}")
    server.close([0, 0, 0, 1])
    # The first tensor was not trained: it stays, and so does what is remembered of it.
    assert server.state(0).tolist() == [4, 2, 0, 1]
    assert server.adapter.tolist() == [4, 1, 1, 4.5]


def test_nesterov_by_hand(tmp_path: Path) -> None:
    """M = m / 2 + D; the step is (D + M / 2) / 2."""
    server = Server(tmp_path, section("nesterov", **HALVES), [0, 0, 0, 0])
    server.close([4, 0, 0, 8])
    assert server.adapter.tolist() == [3, 0, 0, 6]
    server.close([2, 2, 0, -4])
    assert server.state(0).tolist() == [4, 2, 0, 0]
    assert server.adapter.tolist() == [3 + 2, 1.5, 0, 6 - 2]
    server.close([1, 0, 0, 0])
    assert server.state(0).tolist() == [3, 1, 0, 0]
    assert server.adapter.tolist() == [5 + 1.25, 1.5 + 0.25, 0, 4]


# b = b2 = 1/2, tau = 1, lr = 1/2: v = 1 before the first round.
GOLDEN = {
    # Round 1, D = (1, 0): m = (1/2, 0), v = (1, 1/2): 1/4 / 2. Round 2, D = (0, 1):
    # m = (1/4, 1/2), v = (1/2, 3/4).
    "fedadam": ([1, 0.5], [0.5, 0.75]),
    # D^2 = 1 is no more than v = 1: v stays; then v = 1 - 0 / 2, and 1 - 1/2 sign(1 - 1) 1.
    "fedyogi": ([1, 1], [1, 1]),
    "fedadagrad": ([2, 1], [2, 2]),
}


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_the_adaptive_ones_by_hand(tmp_path: Path, optimizer: str) -> None:
    """Two rounds of Algorithm 2 with every power spelt out."""
    given = section(optimizer, second_momentum=0.5, tau=1.0, **HALVES)
    server = Server(tmp_path, given, [0, 0, 0, 0])
    first, second = GOLDEN[optimizer]
    server.close([1, 0, 0, 0])
    assert server.state(0)[:2].tolist() == [0.5, 0]
    assert server.state(1).tolist() == [*first, 1, 1]  # an untrained tensor keeps tau^2
    moved = np.float32(0.25 / (math.sqrt(first[0]) + 1))
    assert server.adapter.tolist() == [moved, 0, 0, 0]
    server.close([0, 1, 0, 0])
    assert server.state(0)[:2].tolist() == [0.25, 0.5]
    assert server.state(1)[:2].tolist() == second
    wanted = [float(moved) + 0.125 / (math.sqrt(second[0]) + 1), 0.25 / (math.sqrt(second[1]) + 1)]
    assert server.adapter[:2].tolist() == np.float32(wanted).tolist()


def test_fedyogi_by_hand_where_it_differs_from_fedadam(tmp_path: Path) -> None:
    """V = 1: a square of 4 raises it by half of 4, one of 1/4 lowers it by half of 1/4."""
    server = Server(tmp_path, section("fedyogi", second_momentum=0.5, tau=1.0), [0] * 4)
    server.close([2, 0.5, 1, 0])
    assert server.state(1).tolist() == [3, 0.875, 1, 1]


# Against others ------------------------------------------------------------------------------


def dense(given: ServerSection, start: Any, means: list[Any]) -> tuple[Any, Any]:
    """The formulas over whole arrays, as the papers print them: adapter and last step."""
    b, b2, lr, tau = given.momentum, given.second_momentum, given.learning_rate, given.tau
    adapter = np.asarray(start, np.float32)
    m, v = np.zeros(adapter.size), np.full(adapter.size, tau * tau)
    step = np.zeros(adapter.size)
    for mean in means:
        if given.optimizer in ("fedavgm", "nesterov"):
            m = b * m + mean
            step = lr * (mean + b * m) if given.optimizer == "nesterov" else lr * m
        else:
            m, square = b * m + (1 - b) * mean, mean**2
            v = {
                "fedadam": b2 * v + (1 - b2) * square,
                "fedyogi": v - (1 - b2) * square * np.sign(v - square),
                "fedadagrad": v + square,
            }[given.optimizer]
            step = lr * m / (np.sqrt(v) + tau)
        adapter = (adapter + step).astype(np.float32)
    return adapter, step


@pytest.mark.parametrize("optimizer", STATEFUL)
@pytest.mark.parametrize("threads", [1, 4])
def test_three_rounds_of_large_tensors_have_the_bits_of_a_dense_computation(
    tmp_path: Path, optimizer: str, threads: int
) -> None:
    """Tensors longer than a block, more than threads; the state went through its file twice."""
    specs = tuple(TensorSpec(name=f"t{i}", shape=(3, 50_001), init="zeros") for i in range(6))
    manifest = Manifest(tensors=specs, target_modules=("t",))
    draw = np.random.default_rng(5)
    count = sum(spec.elements for spec in specs)
    start = draw.standard_normal(count, np.float32)
    given = section(optimizer, momentum=0.9, tau=1e-2)
    server = Server(tmp_path, given, start, manifest)
    means = []
    for _ in range(3):
        flats = [draw.standard_normal(count, np.float32) * np.float32(0.1) for _ in range(2)]
        result = server.close(*flats, threads=threads)
        means.append(flats[0].astype(np.float64) * 0.5 + flats[1].astype(np.float64) * 0.5)
    wanted, step = dense(given, start, means)
    assert server.adapter.tobytes() == wanted.tobytes()
    assert result.stepped.norm == pytest.approx(np.linalg.norm(step), rel=1e-8)
    assert result.mean_norm == pytest.approx(np.linalg.norm(means[-1]), rel=1e-8)


@pytest.mark.parametrize("optimizer", ["fedavgm", "nesterov"])
@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 0.7), (0.5, 1.0)])
def test_the_momentum_ones_are_torchs_sgd(
    tmp_path: Path, optimizer: str, momentum: float, rate: float
) -> None:
    """DiLoCo's outer step is SGD(nesterov=True) on minus the mean delta, over five rounds."""
    draw = np.random.default_rng(7)
    start = draw.standard_normal(4).astype(np.float32)
    weights = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
    outer = torch.optim.SGD([weights], lr=rate, momentum=momentum, nesterov=optimizer == "nesterov")
    server = Server(tmp_path, section(optimizer, momentum=momentum, learning_rate=rate), start)
    for _ in range(5):
        flats = [draw.standard_normal(4).astype(np.float32) for _ in range(3)]
        server.close(*flats)
        weights.grad = -torch.from_numpy(np.mean([f.astype(np.float64) for f in flats], axis=0))
        outer.step()
        assert np.abs(server.adapter - weights.detach().numpy()).max() < 2e-6


# Identities ------------------------------------------------------------------------------------


def test_plain_writes_the_bytes_of_before_and_no_state(tmp_path: Path) -> None:
    """And fedavgm without momentum at rate 1 is plain."""
    start, flats = [0.1, -0.2, 0.3, 1e-9], ([0.7, 0.1, 2, 3], [1e-3, 5, 0, 1])
    (tmp_path / "plain").mkdir()
    plain = Server(tmp_path / "plain", ServerSection(), start)
    result = plain.close(*flats)
    assert result.stepped is None
    assert not (tmp_path / "plain" / "state-1").exists()
    bare = aggregate(
        tmp_path / "plain" / "adapter-0",
        [delta(tmp_path, f"s{i}", 0.5, flat) for i, flat in enumerate(flats)],
        MANIFEST,
        tmp_path / "bare",
    )
    assert bare == result
    other = Server(tmp_path, section("fedavgm", momentum=0.0, learning_rate=1.0), start)
    assert other.close(*flats).digest == bare.digest


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(STATEFUL), st.integers(1, 4), st.randoms(use_true_random=False))
def test_order_and_threads_change_no_byte_of_adapter_or_state(
    tmp_path_factory: pytest.TempPathFactory, optimizer: str, threads: int, order: Any
) -> None:
    """Two rounds with the deltas listed in any order."""
    draw = np.random.default_rng(3)
    rounds = [[draw.standard_normal(4).astype(np.float32) for _ in range(4)] for _ in range(2)]
    straight, shuffled = (
        Server(tmp_path_factory.mktemp("order"), section(optimizer), [1, 2, 3, 4]) for _ in range(2)
    )
    for flats in rounds:
        assert straight.close(*flats, threads=1) == shuffled.close(
            *flats, threads=threads, order=order
        )


# Zeros and bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_a_mean_of_zeros_moves_nothing_and_changes_no_state(tmp_path: Path, optimizer: str) -> None:
    """First of all, after a step, and where two deltas cancel: never NaN, never a warning."""
    server = Server(tmp_path, section(optimizer), [1, 2, 3, 4])
    result = server.close([0, 0, 0, 0])
    assert (result.mean_norm, result.stepped.norm) == (0, 0)
    assert server.adapter.tolist() == [1, 2, 3, 4]
    server.close([1, 1, 1, 1])
    moved, state = server.adapter, (tmp_path / "state-2").read_bytes()
    result = server.close([3, -1, 2, 5], [-3, 1, -2, -5])
    assert result.stepped.norm == 0
    assert server.adapter.tolist() == moved.tolist()
    assert (tmp_path / "state-3").read_bytes() == state
    server.close([1, 0, 1, 0])  # within a trained tensor a zero is a value like any other
    assert np.isfinite(server.adapter).all()


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_the_largest_delta_that_is_taken_can_be_stepped(tmp_path: Path, optimizer: str) -> None:
    """Its square is beyond fp32 and within the state."""
    server = Server(tmp_path, section(optimizer, momentum=0.9), [0] * 4)
    for flat in ([1e30, 0, 0, 0], [0, 1e-30, 0, 0], [1e-45, 0, 0, 0]):
        server.close(flat)
        assert np.isfinite(server.adapter).all()
        assert np.isfinite(server.state(0)).all()


def test_a_state_of_another_optimiser_or_run_is_refused(tmp_path: Path) -> None:
    """By name and by shape; a torn one cannot be read at all."""
    server = Server(tmp_path, section("fedadam"), [1, 2, 3, 4])
    server.close([1, 1, 1, 1])
    server.section = section("fedyogi")
    with pytest.raises(LedgerError, match="server state: expected fedyogi over 2 tensors"):
        server.close([1, 1, 1, 1])
    assert not (tmp_path / "state-2").exists()
    assert not (tmp_path / "adapter-2").exists()
    server.section, server.round = section("fedadam"), 1
    whole = (tmp_path / "state-1").read_bytes()
    (tmp_path / "state-1").write_bytes(whole[:-1])
    with pytest.raises(DecodeError, match="bytes of data"):
        server.close([1, 1, 1, 1])


def test_a_round_that_fails_leaves_no_half_state(tmp_path: Path) -> None:
    """Neither under its name nor beside it."""
    server = Server(tmp_path, section("fedavgm", learning_rate=100.0), [3e38, 0, 0, 0])
    with pytest.raises(LedgerError, match="'a': expected finite values"):
        server.close([3e38, 0, 0, 0])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["adapter-0", "s0.safetensors"]


def test_an_optimiser_with_a_state_needs_a_place_for_it(tmp_path: Path) -> None:
    """Who forgets it must not get the plain mean."""
    write_adapter(tmp_path / "source", MANIFEST, [0] * 4)
    one = delta(tmp_path, "a", 1.0, [1] * 4)
    with pytest.raises(ValueError, match="a place for the state of fedadam"):
        aggregate(
            tmp_path / "source", [one], MANIFEST, tmp_path / "target",
            method=Method(server=section("fedadam")),
        )  # fmt: skip


def test_the_state_has_the_adapters_names_in_fp64(tmp_path: Path) -> None:
    """One row for each of m and v, and the optimiser's name beside them."""
    server = Server(tmp_path, section("fedadam"), [0] * 4)
    server.close([1, 2, 3, 4])
    with TensorFile(tmp_path / "state-1") as file:
        forms = {name: (layout.dtype, layout.shape) for name, layout in file.layouts.items()}
        assert file.metadata == {"gradualdiff_server_state": "fedadam"}
    wanted = {name: ("F64", (2, *v.shape)) for name, v in split(MANIFEST, [0] * 4).items()}
    assert forms == wanted
