"""Write an adapter out of the ledger as a PEFT directory with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.runs.bases import fetch_bases
from coordinator.runs.branching import CONFIG, TENSORS
from coordinator.runs.expanding import write_lora
from coordinator.runs.model_card import model_card
from shared import topology
from shared.adapters import kind_of
from shared.adapters.core import KIND as CORE
from shared.disk.files import digest_file
from shared.errors import ConfigError, LedgerDamagedError, ObjectMissingError, RunNotFoundError
from shared.methods.averaging import get_averaging
from shared.protocol.manifest import pool_held_out

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.history import History
    from shared.adapters import AdapterSettings
    from shared.stores.port import ObjectStore

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    round: int
    sha: str
    path: Path


def export_adapter(
    history: History,
    store: ObjectStore,
    target: Path,
    round_number: int | None,
    base: str | None = None,
    *,
    merged: bool = False,
    find_bases: Callable[[Path], None] | None = None,
) -> Exported:
    """Write the adapter that a round produced into the new or empty folder ``target``.

    ``base``: what the adapter's config and card call the base model (None: as the run does).
    ``merged``: the card is to be of a model that the adapter will be merged into. ``find_bases``:
    writes the bases of a core adapter into a file; without it there is no export of one.

    Both files are the caller's own: nothing that is done to them reaches the ledger. Raises
    RunNotFoundError for a round without a result, ConfigError when ``target`` holds files or the
    run makes bases, LedgerDamagedError when the stored adapter is missing or altered.
    """
    number = history.last_closed if round_number is None else round_number
    genesis, record = history.genesis, history.round(number).result
    if genesis is None or record is None:
        raise RunNotFoundError(f"run {history.run} has no result of round {number} to export")
    mode = get_averaging(history.config.aggregation.averaging)
    if mode.makes_bases:
        raise ConfigError(
            f"run {history.run} makes bases and no model: expected a run with a trained adapter; "
            f'make one with lora.kind = "core" and lora.bases = "{history.run}@{number}"'
        )
    new_folder(target)
    tensors = target / TENSORS
    key = topology.adapter_key(history.run, record.adapter_sha, TENSORS)
    try:
        store.fetch_file(key, tensors)
    except ObjectMissingError:
        raise LedgerDamagedError(f"{key}: {_why_missing(history, key)}") from None
    if digest_file(tensors)[0] != record.adapter_sha:
        tensors.unlink()
        raise LedgerDamagedError(f"{key}: does not have its sha256; see: gradualdiff runs verify")
    settings = mode.settings_in(tensors, history.config.lora)
    if kind_of(settings).has_bases:
        settings = _expand(tensors, history, store, find_bases)
    # Made from the record and not copied: what lies beside the tensors has no sha256 on record.
    named = history.config.base.model_copy(update={"model": base or history.config.base.model})
    made = kind_of(settings).peft_config(named, settings, genesis.manifest)
    (target / CONFIG).write_bytes(made)
    (target / CARD).write_text(
        model_card(history, number, record.adapter_sha, settings, named.model, merged=merged),
        encoding="utf-8",
    )
    return Exported(number, record.adapter_sha, target)


def _expand(
    tensors: Path,
    history: History,
    store: ObjectStore,
    find_bases: Callable[[Path], None] | None,
) -> AdapterSettings:
    """Make the file of R's one of a LoRA adapter; its settings."""
    bases, cores = tensors.with_name("bases.safetensors"), tensors.with_name("cores.safetensors")
    sha = history.config.lora.bases_sha
    if sha is not None:
        fetch_bases(store, history.run, sha, bases)
    elif find_bases is not None:
        find_bases(bases)
    else:
        raise ConfigError(
            f"run {history.run} has a core adapter: expected its base model and the participant's "
            "packages on this machine, where its bases are found in the weights; run gradualdiff "
            "runs export there"
        )
    tensors.rename(cores)
    write_lora(cores, bases, tensors)
    cores.unlink()
    bases.unlink()
    return CORE.as_lora(history.config.lora)


def new_folder(target: Path) -> None:
    """Make ``target``, or see that it is empty. Raises ConfigError."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        empty = not any(target.iterdir())
    except OSError as error:
        raise ConfigError(f"--to {target}: cannot be made ({error.strerror})") from None
    if not empty:
        raise ConfigError(f"--to {target}: is not empty; name a new directory")


def best_round(history: History) -> int:
    """The round whose adapter has the lowest loss, pooled over all held-out text of the run.

    A round that some site did not measure is not compared: its loss is of other text. Raises
    RunNotFoundError where no round was measured.
    """
    losses = {
        n: pool_held_out(history.held_out(n).values()) for n in range(1, history.last_closed + 1)
    }
    whole = max((loss.tokens for loss in losses.values() if loss), default=0)
    known = {n: loss.nll for n, loss in losses.items() if loss and loss.tokens == whole}
    if not known:
        raise RunNotFoundError(
            f"--best: run {history.run} has no round with a held-out loss; name one by --round"
        )
    return min(known, key=lambda number: (known[number], number))


def _why_missing(history: History, key: str) -> str:
    for record in history.pruned:
        if key in record.keys:
            where = record.key(history.run)
            return f"was {record.did} ({where}: {record.reason}); name a round that was kept"
    return "is missing; see: gradualdiff runs verify"
