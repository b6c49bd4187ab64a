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
    from collections.abc import Sequence
    from pathlib import Path

    from coordinator.aggregation.server_optimizer import StateFiles
    from shared.config import FederationConfig
    from shared.methods.inputs import WeightedDelta
    from shared.protocol.manifest import Manifest
    from shared.protocol.records import ClosingRecord


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


def close_round(
    config: FederationConfig,
    closing: ClosingRecord,
    deltas: Sequence[WeightedDelta],
    manifest: Manifest,
    files: RoundFiles,
) -> Aggregated:
    """Carry out a decision over files. A pure function of them; raises as ``aggregate`` does."""
    method = Method.of(config)
    if not sends_updates(config):
        return aggregate(
            files.source, deltas, manifest, files.target, method=method, state=files.state
        )
    source, exact = files.exact.before or files.source, files.exact.after
    made = aggregate(source, deltas, manifest, exact, method=method, state=files.state)
    number = closing.round
    header = update_header(config.run.name, number, closing.source_sha, config.codec.down)
    trained = get_averaging(config.aggregation.averaging).trained_in(manifest, number)
    seed = derive_seed(config.run.seed, "down", number)
    packed = config.codec.packed
    update = write_update(files.update, exact, files.source, trained, header, seed, packed=packed)
    try:
        adapter = apply_update(files.source, files.update, files.target, header)
    except DecodeError as error:  # these bytes were written here: what they add up to is the matter
        raise LedgerError(
            f"{error}; a delta is too large: set aggregation.max_delta_norm"
        ) from None
    return replace(made, digest=adapter, sent_down=SentDown(made.digest, update))
