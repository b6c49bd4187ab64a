"""flora (arXiv:2409.05976): a round's factors stacked, so that their product is sum_i w_i B_i A_i.

An adapter of a run of rank r is [fresh | round 1 | round 2 ...]: first r directions that the next
round trains, A as drawn at genesis and B zero; then for each round, site by site in name order, the
rows A_i and the columns w_i B_i of its r_i directions. So an adapter's rank is its file's own, and
B A of the whole file is the sum of all rounds, without a rounding but that of each factor to fp32.
Sites merge what stands beyond their own directions into their base: participant/model/merging.py.

Nothing is summed but the figures, and one tensor is in memory at a time: bytes depend on no order
of arrival and on no number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from shared.adapters import kind_of
from shared.errors import LedgerError
from shared.methods.averaging import Averaging
from shared.tensors.arithmetic import is_finite, square_and_product, squared_norm
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.adapters import AdapterKind
    from shared.config import FederationConfig, LoraSection
    from shared.methods.inputs import Figures, WeightedDelta
    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.protocol.records import ClosingRecord
    from shared.tensors.delta_file import DeltaFile

# Of a run's last adapter. LLaMA-2-7B's layers are 4096 wide: far below this the plain matrices
# would be smaller.
MAX_STACKED_RANK: Final = 8192


class Stacking:
    """One round's layers. ``manifest``: of the part that is trained, rank r.

    A delta of a lower rank is a change of the adapter's first directions. Raises LedgerError for
    an adapter that is not made of factors, or of fewer directions than r.
    """

    def __init__(
        self,
        adapter: TensorFile,
        deltas: Sequence[WeightedDelta],
        files: Sequence[DeltaFile],
        figures: Figures,
        manifest: Manifest,
    ) -> None:
        self._kind = kind_of(manifest)
        if not self._kind.is_factors_only(manifest):
            raise LedgerError(
                'aggregation.averaging = "flora": not all tensors of the adapter are factors'
            )
        self._adapter = adapter
        self._deltas = deltas
        self._files = files
        self._figures = figures
        sent = [delta.manifest or manifest for delta in deltas]
        self._specs = [{spec.name: spec for spec in own.tensors} for own in sent]
        self._fresh = self._rank(manifest)
        self._before = rank_in(adapter, self._kind)
        _check_source(adapter, self._kind.of_rank(manifest, max(self._before, self._fresh)))
        self.manifest = self._kind.of_rank(manifest, self._before + sum(map(self._rank, sent)))
        self._trained = {spec.name: spec for spec in manifest.tensors}

    def tensors(self) -> Generator[NDArray[np.float32]]:
        """The next adapter's tensors in order. Raises LedgerError for a value beyond fp32."""
        watch = self._figures.watch
        for spec in self.manifest.tensors:
            with watch.phase("measure"):
                self._measure(self._trained[spec.name])
            with watch.phase("accumulate"):
                values = self._stacked(spec)
            self._adapter.release(spec.name)
            for file, specs in zip(self._files, self._specs, strict=True):
                file.release(specs[spec.name])
            yield values

    def _stacked(self, spec: TensorSpec) -> NDArray[np.float32]:
        """One tensor: what was there, and below (A) or beside it (B) each site's new factor."""
        name, directions = spec.name, self._kind.directions
        is_left = self._kind.side(name) == "left"
        result = np.empty(spec.shape, np.float32)
        rows = directions(name, result)
        source = directions(name, self._adapter.read(name))
        rows[: self._before] = source
        at = self._before
        for index, delta in enumerate(self._deltas):
            factor = directions(name, self._read(index, name)).astype(np.float64)
            factor *= delta.scale
            factor += source[: len(factor)]
            if is_left:
                factor *= delta.weight
            with np.errstate(over="ignore"):
                rows[at : at + len(factor)] = factor
            at += len(factor)
        if is_left:  # what was trained stands in the stack; the next round begins anew
            rows[: self._fresh] = 0
        if not is_finite(result):
            raise LedgerError(
                f"tensor {name!r}: expected finite values, got a factor beyond fp32; "
                "a delta is too large: set aggregation.max_delta_norm"
            )
        return result

    def _measure(self, spec: TensorSpec) -> None:
        """Figures of the deltas as they were sent; a lower rank counts as zeros beyond it."""
        mean = np.zeros(spec.shape)
        parts = []
        for index, delta in enumerate(self._deltas):
            own = self._specs[index][spec.name]
            parts.append(mean[tuple(slice(length) for length in own.shape)])
            share = delta.weight * delta.scale
            parts[-1][:] += np.multiply(self._read(index, spec.name), share, dtype=np.float64)
        self._figures.note_mean(squared_norm(mean))
        for index, delta in enumerate(self._deltas):
            found = square_and_product(self._read(index, spec.name), parts[index])
            self._figures.note_delta(delta.site, *found)

    def _rank(self, manifest: Manifest) -> int:
        return self._kind.layers(manifest)[0].right.shape[0]

    def _read(self, index: int, name: str) -> NDArray[np.float32]:
        return self._files[index].read(self._specs[index][name])


def rank_in(adapter: TensorFile, kind: AdapterKind) -> int:
    """The rank of an adapter file's first factor. Raises LedgerError if it holds none."""
    for name, layout in adapter.layouts.items():
        if kind.side(name) == "right":
            return layout.shape[0]
    raise LedgerError(f"adapter: expected factors of the kind {kind.name}, found none")


def _check_source(adapter: TensorFile, wanted: Manifest) -> None:
    for spec in wanted.tensors:
        layout = adapter.layouts.get(spec.name)
        if layout is None or layout.shape != spec.shape:
            got = "none" if layout is None else str(layout.shape)
            raise LedgerError(
                f"source: tensor {spec.name!r}: expected shape {spec.shape}, got {got}; it is not "
                "an adapter of this run"
            )


class Stacked(Averaging):
    """Side by side: nothing is rounded away, and the adapter grows."""

    by_value = False
    factors_only = True
    takes_ranks = True
    renews = "merges what was trained into the base and begins anew in every round"
    merges = True
    consent = "flora"
    shows = "gives each site's own factors to all others"
    joined = (
        "each round's global adapter is the one before beside the participants' factors, so "
        "that its product grows by the weighted mean of theirs"
    )
    no_branch_to = "begins with an adapter that changes nothing"
    no_branch_from = "its adapter grows in each round, and no site of the branch could hold it"

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """A quantised base, and an adapter that would grow too far."""
        if config.base.quantisation != "none":
            yield (
                f'aggregation.averaging = "flora" merges every round into the base, but '
                f'base.quantisation is "{config.base.quantisation}": quantised again, the merged '
                "base would lose more than a round adds (a residual of 1 % of the weight's norm "
                "comes back with an error of 108 % of itself from nf4); use svd, or "
                'quantisation = "none"'
            )
        lora, sites = config.lora, config.run.participants
        each_round = sum(kind_of(lora).rank(lora, site) for site in sites)
        rank = lora.rank + config.run.rounds * each_round
        if rank > MAX_STACKED_RANK:
            yield (
                f'aggregation.averaging = "flora": expected adapters of at most rank '
                f"{MAX_STACKED_RANK}, got lora.rank + run.rounds x the sum of the sites' ranks = "
                f"{lora.rank} + {config.run.rounds} x {each_round} = {rank}: lower lora.rank (or "
                "lora.ranks) or run.rounds, or use svd, whose adapter does not grow"
            )

    def join(
        self,
        adapter: TensorFile,
        deltas: Sequence[WeightedDelta],
        files: Sequence[DeltaFile],
        figures: Figures,
        manifest: Manifest,
        _threads: int,
        /,
    ) -> tuple[Manifest, Generator[NDArray[np.float32]]]:
        """The stack, one tensor after another."""
        stacking = Stacking(adapter, deltas, files, figures, manifest)
        return stacking.manifest, stacking.tensors()

    def lora_in(self, adapter: Path, lora: LoraSection, /) -> LoraSection:
        """At the file's own rank.

        Raises LedgerError for a file without factors, DecodeError or OSError for one that is torn.
        """
        with TensorFile(adapter) as file:
            kind = kind_of(lora)
            return kind.at_rank(lora, rank_in(file, kind))

    def lora_after(
        self, closings: Iterable[ClosingRecord | None], lora: LoraSection, /
    ) -> LoraSection | None:
        """From what all rounds counted, without the file."""
        kind = kind_of(lora)
        rank = kind.rank(lora)
        for closing in closings:
            if closing is None:
                return None
            rank += sum(kind.rank(lora, item.site) for item in closing.inputs)
        return kind.at_rank(lora, rank)


MODE = Stacked()
