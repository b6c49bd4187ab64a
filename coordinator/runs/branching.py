"""A new run that begins with an adapter of another one: ``runs/NEW/origin.json`` and a copy of it.

The copy comes first and the record last, so that a branch is whole or not there; repeating one that
was cut off is no harm. The branch needs nothing of its parent afterwards.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shared import topology
from shared.adapters import kind_of
from shared.errors import (
    ConfigError,
    LedgerDamagedError,
    ObjectMissingError,
    RunExistsError,
    RunNotFoundError,
)
from shared.methods.averaging import get_averaging
from shared.protocol.records import ClosedRecord, GenesisRecord, OriginRecord
from shared.stores.port import read_again

if TYPE_CHECKING:
    from shared.protocol.ledger import Ledger

ADAPTER_FILES = CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def branch_run(parent: Ledger, number: int, child: Ledger) -> OriginRecord:
    """Give ``child`` the adapter that round ``number`` of ``parent`` produced, to begin with.

    Raises RunNotFoundError (no such run, or no result of that round), ConfigError (a parent whose
    adapters have ranks of their own), RunExistsError, LedgerDamagedError (the adapter is missing,
    altered or pruned).
    """
    config = parent.config()
    averaging = config.aggregation.averaging
    why = get_averaging(averaging).no_branch_from
    if why:
        raise ConfigError(
            f'run {parent.run}: a run with aggregation.averaging = "{averaging}" cannot be '
            f"branched: {why}; to use the adapter elsewhere, export it: gradualdiff runs export"
        )
    genesis, result = _results(parent, number)
    _check_is_new(child)
    sha = result.adapter_sha
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / TENSORS
        config_file = _read_adapter(parent, sha, tensors)
        child.store.put(topology.adapter_key(child.run, sha, CONFIG), config_file)
        child.store.put_file(topology.adapter_key(child.run, sha), tensors)  # they come last
    record = OriginRecord(
        parent=parent.run,
        parent_digest=config.digest,
        parent_round=number,
        adapter_sha=sha,
        adapter_size=result.adapter_size,
        manifest=genesis.manifest,
        fingerprint=genesis.fingerprint,
        **kind_of(config.lora).scale(config.lora),
    )
    written = child.write(record)
    if written.writer != child.writer:
        raise RunExistsError(_taken(child.run, written))
    return written


def _results(parent: Ledger, number: int) -> tuple[GenesisRecord, GenesisRecord | ClosedRecord]:
    try:
        genesis = parent.read(GenesisRecord, topology.round_key(parent.run, 0, "closed"))
        if number == 0:
            return genesis, genesis
        key = topology.round_key(parent.run, number, "closed")
        return genesis, parent.read(ClosedRecord, key)
    except ObjectMissingError:
        raise RunNotFoundError(
            f"run {parent.run} has no result of round {number} to branch from; see: "
            f"gradualdiff rounds list {parent.run}"
        ) from None


def _check_is_new(child: Ledger) -> None:
    origin = child.origin()
    if origin is not None:
        raise RunExistsError(_taken(child.run, origin))
    try:
        child.store.stat(topology.federation_key(child.run))
    except ObjectMissingError:
        return
    raise RunExistsError(f"run {child.run} already exists in this store; choose another --name")


def _taken(run: str, origin: OriginRecord) -> str:
    return (
        f"run {run} already exists in this store, as a branch of {origin.label}; start it, or "
        "choose another --name"
    )


def _read_adapter(parent: Ledger, sha: str, tensors: Path) -> bytes:
    """Its config; the tensors come to a local file, and what is checked there is what is stored."""
    key = topology.adapter_key(parent.run, sha)
    pruned = next((record for record in parent.pruned() if key in record.keys), None)
    try:
        damage = read_again(lambda: parent.store.spool([key], tensors).sha256, sha)
        config = parent.store.get(topology.adapter_key(parent.run, sha, CONFIG))
    except ObjectMissingError as error:
        if pruned is not None:
            raise LedgerDamagedError(
                f"{key}: was {pruned.did} ({pruned.key(parent.run)}: {pruned.reason}); choose a "
                "round whose adapter was kept"
            ) from None
        raise LedgerDamagedError(f"{error}; restore it from a copy of the store") from None
    if damage is not None:
        raise LedgerDamagedError(
            f"{key}: its bytes do not have the sha256 of its name ({damage}); restore this object "
            "from a copy of the store"
        )
    return config
