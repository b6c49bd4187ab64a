"""A secure round's one input: the mean of all masked deltas, as if one site had sent it.

Pure over files and records: the sum is one of integers, so it has no order, and the seeds that open
it are on record. So whoever holds them comes to the same bytes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.disk.files import allow_open_files
from shared.errors import LedgerError, ProtocolError
from shared.methods.inputs import WeightedDelta
from shared.secure_sum.opening import check_answer, check_offers, open_masks
from shared.secure_sum.quantise import mean_of, next_reach, step_of
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.masked_file import MaskedFile, in_order, masked_header, ring_of
from shared.topology import COORDINATOR

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.protocol.records import AcceptedRecord, UnmaskedRecord
    from shared.protocol.secure import SecureTerms
    from shared.secure_sum.cohort import Survivors
    from shared.secure_sum.opening import Opened

SUM: Final = "all"  # what stands for the sites in a round's figures


@dataclass(frozen=True)
class Summed:
    """The mean as a delta, and by tensor the reach of the next round that trains it."""

    delta: WeightedDelta
    reaches: dict[str, float]


def open_sum(
    survivors: Survivors,
    accepted: Mapping[str, AcceptedRecord],
    answers: Mapping[str, UnmaskedRecord],
) -> Opened:
    """The seeds that are left in the sum. Raises LedgerError where the records do not give them."""
    offers = {
        site: masked.offer(sha)
        for site, sha in survivors.shas.items()
        if (masked := accepted[site].masked) is not None
    }
    told = {site: record.revealed.answer for site, record in answers.items()}
    if offers.keys() != survivors.shas.keys():
        raise LedgerError("accepted: expected records of masked deltas, got others")
    try:
        check_offers(survivors, offers)
        for site, one in told.items():
            check_answer(survivors, site, one, offers)
        return open_masks(survivors, told, offers)
    except ProtocolError as error:
        raise LedgerError(
            f"{error}; the sum cannot be opened: stop the run, and begin another without the "
            "sites that are named"
        ) from None


def sum_deltas(
    survivors: Survivors,
    terms: SecureTerms,
    opened: Opened,
    paths: Mapping[str, Path],
    source_sha: str,
    manifest: Manifest,
    target: Path,
) -> Summed:
    """Add up the masked deltas in ``paths``, take the masks away, write the mean to ``target``.

    ``manifest``: of the deltas. Memory is a few tensors. Raises DeltaRefusedError for a file that
    does not fit.
    """
    attempt, ring, reaches = survivors.cohort.attempt, ring_of(terms), {}
    by_name = dict(zip([s.name for s in in_order(manifest)], terms.reaches, strict=True))
    streams, count = opened.streams(), len(paths)
    allow_open_files(count)
    with contextlib.ExitStack() as stack:
        files = []
        for site, path in sorted(paths.items()):
            header = masked_header(attempt.run, attempt.round, site, source_sha)
            files.append(stack.enter_context(MaskedFile(path, manifest, header, ring)))

        def mean(spec: TensorSpec) -> NDArray[np.float32]:
            total: NDArray[Any] = np.zeros(spec.elements, ring.word)
            for file in files:
                total += file.words(spec)
            numbers = ring.recentre(streams.unmask(total, ring))
            reach = by_name[spec.name]
            peak = int(np.abs(numbers).max())
            reaches[spec.name] = next_reach(reach, terms.levels, peak, count, count)
            return mean_of(numbers, step_of(reach, terms.levels), count).reshape(spec.shape)

        header = DeltaHeader.of(
            "fp32", run=attempt.run, number=attempt.round, site=COORDINATOR, source_sha=source_sha
        )
        write_delta(target, manifest, "fp32", header, mean, seed=0)
    return Summed(WeightedDelta(SUM, target, 1.0, manifest=manifest), reaches)


def next_reaches(
    manifest: Manifest, before: tuple[float, ...] | None, summed: Summed, first: float
) -> tuple[float, ...]:
    """By tensor of the adapter: as the round gave it, or as it was. ``first``: before any."""
    names = sorted(spec.name for spec in manifest.tensors)
    known = dict(zip(names, before or [first] * len(names), strict=True)) | summed.reaches
    return tuple(known[name] for name in names)
