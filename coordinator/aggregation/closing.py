"""Close a round's numbers: A(t+1) = A(t) + sum_i w_i D_i(t) (Algorithm 2 of arXiv:2506.19164).

With another rule than the mean (``shared/methods/rules``) something else stands in its place.

Pure over files: the same source, deltas and weights give the same bytes, whatever the order they
are listed in, on any number of threads. So every sum is taken in fp64 by separate multiply and add
(no fused one, and no BLAS but for ``svd`` and the exactness gap), sites in name order, with one
cast to fp32 at the end. Threads take whole tensors, and what is summed over tensors is summed
exactly (``math.fsum``). Memory is a few tensors per thread, however many the deltas; each delta
holds one file open.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from array import array
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from threadpoolctl import threadpool_limits

from coordinator.aggregation.exactness import DIGITS, squared_gap
from coordinator.aggregation.server_optimizer import open_step
from shared import modes
from shared.adapters import kind_of
from shared.config import AggregationSection, ServerSection
from shared.disk.files import allow_open_files
from shared.errors import LedgerError
from shared.methods.averaging import get_averaging
from shared.methods.inputs import Inputs
from shared.methods.rules import get_rule, too_few
from shared.methods.votes import Votes
from shared.tensors.arithmetic import (
    BLOCK,
    blocks,
    is_finite,
    significant,
    square_and_product,
    squared_norm,
)
from shared.tensors.delta_file import DeltaFile
from shared.tensors.stopwatch import Stopwatch
from shared.tensors.tensor_file import (
    ADAPTER_METADATA,
    FileDigest,
    TensorFile,
    TensorLayout,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from coordinator.aggregation.server_optimizer import ServerStep, StateFiles, Stepped
    from shared.config import FederationConfig
    from shared.methods.inputs import WeightedDelta
    from shared.protocol.manifest import Manifest, TensorSpec

WEIGHT_TOLERANCE: Final = 1e-9
MAX_THREADS: Final = 4


@dataclass(frozen=True)
class Method:
    """How a round's deltas become the next adapter, as the run's settings say."""

    aggregation: AggregationSection = field(default_factory=AggregationSection)
    server: ServerSection = field(default_factory=ServerSection)

    @classmethod
    def of(cls, config: FederationConfig) -> Method:
        """The method of a run."""
        return cls(config.aggregation, config.server)


@dataclass(frozen=True)
class SentDown:
    """Beside the run's adapter: the coordinator's exact one, and the update that sites add."""

    exact: FileDigest
    update: FileDigest


@dataclass(frozen=True)
class Aggregated:
    """What came of it. Norms are L2 over all tensors; all floats have 9 significant digits.

    ``mean_norm``: of what the rule makes of the deltas, by default their weighted mean.
    ``delta_norms``: as they were sent, before any scale. ``cosines``: of each site's delta with
    what the rule made, 0 where either is all zeros. ``left_out``: whose delta is no part of it, and
    why. ``stepped``: what the server's optimiser made of the mean, if the run has one.
    ``exactness_gap``: see ``coordinator/aggregation/exactness.py``. ``gradient_energy``: by layer,
    see ``shared/methods/averaging/range_finder.py``. ``sent_down``: with ``codec.down``, where
    ``digest`` is of what the update gives: ``coordinator/aggregation/downlink.py``.
    """

    digest: FileDigest
    mean_norm: float
    delta_norms: dict[str, float]
    cosines: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    exactness_gap: float | None = None
    stepped: Stepped | None = None
    gradient_energy: dict[str, tuple[float, ...]] = field(default_factory=dict)
    sent_down: SentDown | None = None


def aggregate(
    source: Path,
    deltas: Sequence[WeightedDelta],
    manifest: Manifest,
    target: Path,
    watch: Stopwatch | None = None,
    threads: int | None = None,
    method: Method | None = None,
    state: StateFiles | None = None,
) -> Aggregated:
    """Write the next adapter to ``target``: fp32(fp64(A) + step(sum_i w_i (scale_i * fp64(D_i)))).

    A tensor that no delta holds keeps its bytes. An averaging mode that does not join by value does
    it itself (``shared/methods/averaging``). ``source``: the adapter all deltas started from.
    ``watch`` gets the seconds of ``read``, ``accumulate``, ``measure``, ``gap``, ``fit`` (svd),
    ``hash`` and ``write``. ``threads`` sum beside the one that writes; None: as many as there are
    processors, at most 4. ``method`` None: the plain mean. ``state``: the files of the server's
    optimiser, if the method has one that keeps any. Raises LedgerError for a site that is
    listed twice, weights that do not sum to 1, fewer deltas than the rule needs or a result
    that is not finite, DeltaRefusedError for a delta that does not fit the manifest,
    DecodeError for a source that is torn, OSError where so many files may not be open.
    """
    ordered = sorted(deltas, key=lambda delta: delta.site)
    method = method or Method()
    _check_inputs(ordered, method.aggregation)
    allow_open_files(len(ordered))
    with contextlib.ExitStack() as stack:
        # Threads take whole tensors; BLAS, which only the figures ask, must not start more.
        stack.enter_context(threadpool_limits(1, "blas"))
        adapter = stack.enter_context(TensorFile(source))
        files: list[DeltaFile] = []
        for one in ordered:
            files.append(stack.enter_context(DeltaFile(one.path, one.manifest or manifest)))
            files[-1].share(files[0])
        watch = watch or Stopwatch()
        server = open_step(method.server, manifest, state, watch)
        stack.enter_context(server or contextlib.nullcontext())
        closing = _Closing(adapter, ordered, files, watch, method, server, manifest)
        threads = threads or min(os.cpu_count() or 1, MAX_THREADS)
        name = method.aggregation.averaging
        mode = get_averaging(name)
        if mode.by_value:
            closing.judge(threads)
            ahead = closing.tensors(manifest, threads)
        else:
            inputs = Inputs(adapter, ordered, files, closing, manifest)
            with modes.at_work("averaging", name):
                manifest, joined = mode.join(inputs, threads)
            ahead = _finite(joined, manifest, name)
        layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
        # Closed before the files are: a failed write must not leave threads reading them.
        values = stack.enter_context(contextlib.closing(ahead))
        digest = write_tensors(target, layouts, values, ADAPTER_METADATA, closing.watch)
        closing.stepped = server.finish() if server else None
    return closing.aggregated(digest)


def _finite(
    values: Generator[NDArray[np.float32]], manifest: Manifest, averaging: str
) -> Generator[NDArray[np.float32]]:
    """What a mode joined itself. Raises ValueError for a value that is not finite."""
    with modes.at_work("averaging", averaging), contextlib.closing(values):
        for at, value in enumerate(values):
            if not is_finite(value):
                raise ValueError(f"{manifest.tensors[at].name}: expected finite values, got others")
            yield value


class _Buffers:
    """Room for one tensor under way, of at most ``elements`` values: its fp64 sum and the cast."""

    def __init__(self, elements: int) -> None:
        self.mean = np.empty(elements, np.float64)
        self.result = np.empty(elements, np.float32)


class _Closing:
    """One aggregation under way: the open files and the sums over the tensors done so far."""

    def __init__(
        self,
        adapter: TensorFile,
        deltas: Sequence[WeightedDelta],
        files: Sequence[DeltaFile],
        watch: Stopwatch,
        method: Method,
        server: ServerStep | None,
        manifest: Manifest,
    ) -> None:
        self._method = method
        self._server = server
        self.stepped: Stepped | None = None
        self._adapter = adapter
        self._deltas = deltas
        self._files = files
        self._votes = Votes(files, [delta.scale for delta in deltas])
        self._rule = get_rule(method.aggregation.rule)
        self._shares = {delta.site: delta.weight for delta in deltas}
        self._left_out: dict[str, str] = {}
        self.watch = watch
        self._mean_squares: list[float] = []
        # Of thousands of sites and hundreds of tensors: 8 bytes each and not 32.
        self._squares = {delta.site: array("d") for delta in deltas}
        self._products = {delta.site: array("d") for delta in deltas}
        self._squared_gaps: list[float] = []
        self._energies: dict[str, tuple[float, ...]] = {}
        sent = next(d.manifest for d in deltas) or manifest
        self._manifest = sent
        self._sent = {spec.name for spec in sent.tensors}
        self._layers = {layer.left.name: layer for layer in kind_of(sent).layers(sent)}

    def note_mean(self, square: float) -> None:
        """Add a tensor of the mean delta to the figures."""
        self._mean_squares.append(square)

    def note_delta(self, site: str, square: float, product: float) -> None:
        """Add a delta's tensor: its own square and its product with the mean's."""
        self._squares[site].append(square)
        self._products[site].append(product)

    def note_gap(self, square: float) -> None:
        """Add what one layer's product differs by from the mean of the products."""
        self._squared_gaps.append(square)

    def note_energy(self, layer: str, squares: tuple[float, ...]) -> None:
        """Keep the squared norms of parts of one layer's mean gradient."""
        self._energies[layer] = squares

    def judge(self, threads: int) -> None:
        """Whom the rule leaves out as a whole; the others share equally then."""
        if self._rule.weighted_mean or self._rule.by_coordinate:
            return
        with self.watch.phase("judge"), modes.at_work("rules", self._method.aggregation.rule):
            self._left_out = self._rule.left_out(
                self._method.aggregation, self._manifest, self._votes, list(self._shares), threads
            )
        taken = [site for site in self._shares if site not in self._left_out]
        self._shares = dict.fromkeys(taken, 1 / len(taken))

    def tensors(self, manifest: Manifest, threads: int) -> Generator[NDArray[np.float32]]:
        """The next adapter's tensors in order; each is overwritten once the next is asked for.

        ``threads + 1`` are under way, each in a buffer of its own that is used again and again:
        fresh memory for every tensor costs more page faults than the sums cost time.
        """
        largest = max(spec.elements for spec in manifest.tensors)
        buffers = deque(_Buffers(largest) for _ in range(threads + 1))
        waiting = iter(manifest.tensors)
        coming: deque[tuple[TensorSpec, _Buffers, Future[NDArray[np.float32]]]] = deque()
        with ThreadPoolExecutor(threads, "aggregation") as pool:
            while True:
                for spec in itertools.islice(waiting, len(buffers)):
                    free = buffers.popleft()
                    coming.append((spec, free, pool.submit(self._tensor, spec, free)))
                if not coming:
                    return
                spec, used, values = coming.popleft()
                result = values.result()
                if self._server is not None:
                    self._server.keep(spec)
                yield result
                buffers.append(used)

    def _tensor(self, spec: TensorSpec, buffers: _Buffers) -> NDArray[np.float32]:
        """The next adapter's values of one tensor: fp32 of ``spec.shape``, in ``buffers``."""
        if spec.name not in self._sent:
            return self._unchanged(spec, buffers)
        mean = buffers.mean[: spec.elements]
        self._join(spec, mean)
        with self.watch.phase("measure"):
            self._measure(spec, mean)
        self._measure_gap(spec)
        if self._server is not None:
            self._server.step(spec, mean)  # from here on it is the step
        with self.watch.phase("read"):
            values = self._adapter.read(spec.name).reshape(-1)
        with self.watch.phase("accumulate"):
            _accumulate(mean, values, 1.0)
            self._adapter.release(spec.name)
            result = buffers.result[: spec.elements]
            _cast(mean, result, spec)
        return result.reshape(spec.shape)

    def _join(self, spec: TensorSpec, mean: NDArray[np.float64]) -> None:
        """What the rule makes of all deltas in one tensor, into ``mean``."""
        if self._rule.by_coordinate:
            with self.watch.phase("accumulate"):
                for at, rows in self._votes.slices(spec):
                    with modes.at_work("rules", self._method.aggregation.rule):
                        self._rule.combine(self._method.aggregation, rows, mean[at])
            return
        mean.fill(0)
        for delta, file in zip(self._deltas, self._files, strict=True):
            if delta.site in self._left_out:
                continue
            with self.watch.phase("read"):
                values = file.read(spec).reshape(-1)
            with self.watch.phase("accumulate"):
                _accumulate(mean, values, self._shares[delta.site], delta.scale)
            file.release(spec)  # a page of each of thousands is more than all the rest

    def _unchanged(self, spec: TensorSpec, buffers: _Buffers) -> NDArray[np.float32]:
        """A tensor that nobody trained, as it is."""
        if self._server is not None:  # its state goes on as it is, too
            mean = buffers.mean[: spec.elements]
            mean.fill(0)
            self._server.step(spec, mean)
        with self.watch.phase("read"):
            result = buffers.result[: spec.elements]
            np.copyto(result, self._adapter.read(spec.name).reshape(-1))
            self._adapter.release(spec.name)
        return result.reshape(spec.shape)

    def aggregated(self, digest: FileDigest) -> Aggregated:
        """The numbers of the whole adapter, once every tensor is done."""
        mean_norm = math.sqrt(math.fsum(self._mean_squares))
        norms = {site: math.sqrt(math.fsum(squares)) for site, squares in self._squares.items()}
        cosines = {}
        for site, products in self._products.items():
            length = norms[site] * mean_norm
            cosines[site] = significant(math.fsum(products) / length) if length else 0.0
        return Aggregated(
            digest,
            significant(mean_norm),
            {site: significant(norm) for site, norm in norms.items()},
            cosines,
            self._left_out,
            exactness_gap=self._gap(),
            stepped=self.stepped,
            gradient_energy=dict(sorted(self._energies.items())),
        )

    def _gap(self) -> float | None:
        """Over all layers. With another rule than the mean there is no mean to be apart from."""
        if not self._rule.weighted_mean:
            return None
        return significant(math.sqrt(math.fsum(self._squared_gaps)), DIGITS)

    def _measure_gap(self, spec: TensorSpec) -> None:
        """Once for each layer of which both factors were sent, when the left one's turn is."""
        layer = self._layers.get(spec.name)
        if layer is None or len(self._files) == 1 or not self._rule.weighted_mean:
            return
        shares = [delta.weight for delta in self._deltas]
        scales = [delta.scale for delta in self._deltas]
        with self.watch.phase("gap"):
            reads = [file.read for file in self._files]
            self.note_gap(squared_gap(layer, reads, shares, scales))
        for file in self._files:
            file.release(layer.right)
            file.release(layer.left)

    def _measure(self, spec: TensorSpec, mean: NDArray[np.float64]) -> None:
        """Second pass: decoding each delta once more costs less than keeping K of them."""
        self.note_mean(squared_norm(mean))
        for delta, file in zip(self._deltas, self._files, strict=True):
            values = file.read(spec).reshape(-1)
            square, product = square_and_product(values, mean)
            self.note_delta(delta.site, square, product)
            file.release(spec)


def _check_inputs(ordered: Sequence[WeightedDelta], section: AggregationSection) -> None:
    sites = [delta.site for delta in ordered]
    twice = sorted(site for site, count in Counter(sites).items() if count > 1)
    if twice:
        raise LedgerError(f"deltas: expected each site once, got {', '.join(twice)} twice")
    shares = [delta.weight for delta in ordered]
    # Written so that NaN fails too.
    if not all(0 <= share < math.inf for share in shares):
        raise LedgerError(f"weights: expected numbers from 0 to 1, got {shares}")
    if abs(math.fsum(shares) - 1) > WEIGHT_TOLERANCE:
        raise LedgerError(f"weights: expected a sum of 1, got {math.fsum(shares)!r}")
    short = too_few(section, len(ordered))
    if short is not None:
        raise LedgerError(f"inputs: {short}")


def _accumulate(
    total: NDArray[np.float64], values: NDArray[np.float32], weight: float, scale: float = 1.0
) -> None:
    """``total += weight * (scale * fp64(values))`` in place, both flat, block by block.

    A block fits the cache; a scale of 1 is not multiplied by, which has the same bits.
    """
    scratch = np.empty(min(BLOCK, total.size), np.float64)
    for at in blocks(total.size):
        scaled = scratch[: at.stop - at.start]
        np.copyto(scaled, values[at])
        if scale != 1:
            np.multiply(scaled, scale, out=scaled)
        np.multiply(scaled, weight, out=scaled)
        np.add(total[at], scaled, out=total[at])


def _cast(total: NDArray[np.float64], result: NDArray[np.float32], spec: TensorSpec) -> None:
    """The one rounding to fp32. Raises LedgerError where it leaves fp32's range."""
    with np.errstate(over="ignore"):
        np.copyto(result, total, casting="same_kind")
    if not is_finite(result):
        raise LedgerError(
            f"tensor {spec.name!r}: expected finite values, got a sum beyond fp32; "
            "a delta is too large: set aggregation.max_delta_norm"
        )
