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
from shared.tensors.arithmetic import is_finite
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.adapters import AdapterKind, AdapterSettings
    from shared.config import FederationConfig
    from shared.methods.inputs import Inputs
    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.protocol.records import ClosingRecord

# Of a run's last adapter. LLaMA-2-7B's layers are 4096 wide: far below this the plain matrices
# would be smaller.
MAX_STACKED_RANK: Final = 8192


def stack(inputs: Inputs, whole: Manifest) -> Generator[NDArray[np.float32]]:
    """The tensors of ``whole`` in order. Raises LedgerError for a value beyond fp32."""
    watch, trained = inputs.figures.watch, {spec.name: spec for spec in inputs.manifest.tensors}
    shares = [delta.weight * delta.scale for delta in inputs.deltas]
    for spec in whole.tensors:
        with watch.phase("measure"):
            inputs.measure(trained[spec.name], inputs.read, shares)
        with watch.phase("accumulate"):
            values = _stacked(inputs, spec)
        inputs.release(spec.name)
        yield values


def _stacked(inputs: Inputs, spec: TensorSpec) -> NDArray[np.float32]:
    """One tensor: what was there, and below (A) or beside it (B) each site's new factor."""
    name, kind = spec.name, kind_of(inputs.manifest)
    is_left = kind.side(name) == "left"
    result = np.empty(spec.shape, np.float32)
    rows = kind.directions(name, result)
    source = kind.directions(name, inputs.adapter.read(name))
    at = len(source)
    rows[:at] = source
    for index, delta in enumerate(inputs.deltas):
        factor = kind.directions(name, inputs.scaled(index, name))
        factor += source[: len(factor)]
        if is_left:
            factor *= delta.weight
        with np.errstate(over="ignore"):
            rows[at : at + len(factor)] = factor
        at += len(factor)
    if is_left:  # what was trained stands in the stack; the next round begins anew
        rows[: _rank(inputs.manifest)] = 0
    if not is_finite(result):
        raise LedgerError(
            f"tensor {name!r}: expected finite values, got a factor beyond fp32; "
            "a delta is too large: set aggregation.max_delta_norm"
        )
    return result


def _rank(manifest: Manifest) -> int:
    return kind_of(manifest).layers(manifest)[0].right.shape[0]


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
        self, inputs: Inputs, _threads: int, /
    ) -> tuple[Manifest, Generator[NDArray[np.float32]]]:
        """The stack, one tensor after another.

        Raises LedgerError for an adapter that is not made of factors, or of fewer directions than
        the trained part has.
        """
        manifest, kind = inputs.manifest, kind_of(inputs.manifest)
        if not kind.is_factors_only(manifest):
            raise LedgerError(
                'aggregation.averaging = "flora": not all tensors of the adapter are factors'
            )
        before = rank_in(inputs.adapter, kind)
        _check_source(inputs.adapter, kind.of_rank(manifest, max(before, _rank(manifest))))
        whole = kind.of_rank(manifest, before + sum(map(_rank, inputs.sent)))
        return whole, stack(inputs, whole)

    def settings_in(self, adapter: Path, settings: AdapterSettings, /) -> AdapterSettings:
        """At the file's own rank.

        Raises LedgerError for a file without factors, DecodeError or OSError for one that is torn.
        """
        with TensorFile(adapter) as file:
            kind = kind_of(settings)
            return kind.at_rank(settings, rank_in(file, kind))

    def settings_after(
        self, closings: Iterable[ClosingRecord | None], settings: AdapterSettings, /
    ) -> AdapterSettings | None:
        """From what all rounds counted, without the file."""
        kind = kind_of(settings)
        rank = kind.rank(settings)
        for closing in closings:
            if closing is None:
                return None
            rank += sum(kind.rank(settings, item.site) for item in closing.inputs)
        return kind.at_rank(settings, rank)


MODE = Stacked()
