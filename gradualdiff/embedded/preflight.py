"""What can be known before a run's first record: model, layers, text and room. Nothing is written.

So that a mistake at the start is an error with its own exit code, and no run that waits for ever.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from coordinator.aggregation.downlink import sends_updates
from coordinator.announcing import announcement
from coordinator.round.members import misfit, unfit
from shared import topology
from shared.adapters import kind_of
from shared.errors import ConfigError, GradualDiffError, ModelError, StoreUnavailableError
from shared.log import get_logger
from shared.protocol.ledger import Ledger
from shared.protocol.records import MemberRecord
from shared.tensors.codecs import get_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from participant.learner.port import Learner, Progress, Readiness
    from shared.config import FederationConfig
    from shared.protocol.manifest import Manifest
    from shared.stores.directory import DirectoryStore


def check_start(
    config: FederationConfig,
    learners: Mapping[str, Learner],
    store: DirectoryStore,
    report: Callable[[str, int | None, Progress], None],
    *,
    anew: bool = False,
    bases: Path | None = None,
) -> None:
    """Load model and text at every site as the run will, and look for room in the store.

    ``anew``: what is on record of the run will go. ``bases``: the file that ``lora.bases`` names.
    Nothing is asked of a run that ended. Raises ModelError, DataError, ConfigError (what the sites
    hold does not fit together, or not to what the run branches from), StoreUnavailableError (no
    room).
    """
    prefix = topology.run_prefix(config.run.name)
    names = set() if anew else {info.key.removeprefix(prefix) for info in store.list(prefix)}
    if "finished.json" in names:
        return
    origin = Ledger(store, config.run.name, "reader", lambda: 0.0).origin()
    against = misfit(config, origin)
    if against is not None:
        raise ConfigError(against)
    if bases is not None:
        for learner in learners.values():
            learner.take_bases(config.run.name, bases)
    members = {
        site: MemberRecord(
            site=site,
            manifest=ready.manifest,
            fingerprint=ready.fingerprint,
            numerics=ready.numerics,
            examples=ready.examples,
            bases=ready.bases,
        )
        for site, ready in (
            (site, _ready(config, site, learner, report))
            for site, learner in sorted(learners.items())
        )
    }
    odd = unfit(members, config, origin)
    if odd:
        raise ConfigError("; ".join(dict.fromkeys(odd.values())))
    one = next(iter(members.values())).manifest
    manifest = kind_of(one).manifest_for(one, config.lora)
    closed = sum(name.startswith("rounds/") and name.endswith("/closed.json") for name in names)
    _check_room(config, manifest, store, max(closed - 1, 0))  # the first adapter is round 0's


def _ready(
    config: FederationConfig,
    site: str,
    learner: Learner,
    report: Callable[[str, int | None, Progress], None],
) -> Readiness:
    try:
        return learner.prepare(
            announcement(config, site), lambda progress: report(site, None, progress)
        )
    except GradualDiffError:
        raise
    except Exception as error:  # noqa: BLE001 - whether the run begins is chosen here
        # As at a site: a library's message may hold text, so it stays in the log.
        get_logger().exception("preparation.crashed", run=config.run.name, site=site)
        raise ModelError(
            f"{site}: {type(error).__name__} while loading model and text; see the log"
        ) from None


def _encoded_size(codec_name: str, manifest: Manifest) -> int:
    codec = get_codec(codec_name)
    return sum(part.size_bytes for spec in manifest.tensors for part in codec.layout(spec))


def _check_room(
    config: FederationConfig, manifest: Manifest, store: DirectoryStore, done: int
) -> None:
    """The ledger keeps every delta and every adapter. Sites link to them where they can.

    With ``codec.down`` also the exact adapter and the update of every round.
    """
    rounds = max(config.run.rounds - done, 0)
    if config.convergence.patience is not None:
        rounds = min(rounds, config.convergence.patience + 2)
    deltas = sum(
        _encoded_size(
            config.codec.name, kind_of(manifest).manifest_for(manifest, config.lora, site)
        )
        for site in config.run.participants
    )
    adapter = sum(4 * spec.elements for spec in manifest.tensors)
    beside = adapter + _encoded_size(config.codec.down, manifest) if sends_updates(config) else 0
    wanted = rounds * (adapter + beside + deltas)
    free = shutil.disk_usage(store.root).free
    if wanted > free:
        raise StoreUnavailableError(
            f"{store.root}: expected {wanted / 1e6:.1f} MB free for {rounds} rounds of "
            f"{len(config.run.participants)} sites, got {free / 1e6:.1f} MB; make room, choose "
            "another place for the store, or run fewer rounds"
        )
