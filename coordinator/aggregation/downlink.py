"""A closed round's files: the next adapter as it comes out, or with ``codec.down`` by an update.

Then two adapters go on side by side (EF21-P, ``shared/tensors/updates.py``). The exact one, x, is
the coordinator's alone: the round's step is added to it. The one that every site holds, w, is the
run's adapter: a round adds c = Q(x - w) to it, and publishes c beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coordinator.aggregation.closing import Aggregated, Method, SentDown, aggregate
from shared.errors import DecodeError, LedgerError
from shared.methods.averaging import get_averaging
from shared.modes import WHOLE
from shared.seeds import derive_seed
from shared.tensors.updates import apply_update, update_header, write_update

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from coordinator.aggregation.server_optimizer import StateFiles
    from shared.config import FederationConfig
    from shared.methods.inputs import WeightedDelta
    from shared.protocol.manifest import Manifest
    from shared.protocol.records import ClosingRecord
    from shared.tensors.delta_file import DeltaHeader
    from shared.tensors.tensor_file import FileDigest


@dataclass(frozen=True)
class RoundFiles:
    """What a round goes on from and where it goes.

    ``source`` and ``target``: the run's adapter before and after. ``state``: of the server's
    optimiser. ``exact``: the exact adapter; no file before where it is the source itself.
    ``update``: where the update goes.
    """

    source: Path
    target: Path
    state: StateFiles
    exact: StateFiles
    update: Path


def sends_updates(config: FederationConfig) -> bool:
    """Whether a round publishes an update beside its adapter."""
    return config.codec.down != WHOLE


def _nobody_waits(_path: Path, _sha: str) -> None: ...


def close_round(
    config: FederationConfig,
    closing: ClosingRecord,
    deltas: Sequence[WeightedDelta],
    manifest: Manifest,
    files: RoundFiles,
    ready: Callable[[Path, str], None] = _nobody_waits,
) -> Aggregated:
    """Carry out a decision over files. A pure function of them; raises as ``aggregate`` does.

    ``ready`` is told each of ``files`` that came to be and its sha256 as soon as it is whole, so
    that it may be read while the others are computed; it must stay where it is.
    """
    updates = sends_updates(config)
    source = (files.exact.before if updates else None) or files.source
    target = files.exact.after if updates else files.target
    method = Method.of(config)
    made = aggregate(source, deltas, manifest, target, method=method, state=files.state)
    ready(target, made.digest.sha256)
    if made.stepped is not None:
        ready(files.state.after, made.stepped.state.sha256)
    if not updates:
        return made
    sent = SentDown(made.digest, _write_update(config, closing, manifest, files))
    ready(files.update, sent.update.sha256)
    header = _header(config, closing)
    try:
        adapter = apply_update(files.source, files.update, files.target, header)
    except DecodeError as error:  # these bytes were written here: what they add up to is the matter
        raise LedgerError(
            f"{error}; a delta is too large: set aggregation.max_delta_norm"
        ) from None
    ready(files.target, adapter.sha256)
    return replace(made, digest=adapter, sent_down=sent)


def _write_update(
    config: FederationConfig, closing: ClosingRecord, manifest: Manifest, files: RoundFiles
) -> FileDigest:
    number = closing.round
    trained = get_averaging(config.aggregation.averaging).trained_in(manifest, number)
    seed = derive_seed(config.run.seed, "down", number)
    return write_update(
        files.update,
        files.exact.after,
        files.source,
        trained,
        _header(config, closing),
        seed,
        packed=config.codec.packed,
    )


def _header(config: FederationConfig, closing: ClosingRecord) -> DeltaHeader:
    return update_header(config.run.name, closing.round, closing.source_sha, config.codec.down)
