"""Write an adapter out of the ledger as a PEFT directory with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.genesis import adapter_config
from coordinator.inspection import perplexity
from coordinator.stacking import lora_in
from shared import topology
from shared.errors import ConfigError, LedgerDamagedError, ObjectMissingError, RunNotFoundError
from shared.files import digest_file
from shared.ledger import Ledger
from shared.records import ClosedRecord, GenesisRecord, pool_held_out

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.inspection import History
    from shared.config import FederationConfig, LoraSection
    from shared.store import ObjectStore

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    round: int
    sha: str
    path: Path


def export_adapter(
    history: History, store: ObjectStore, target: Path, round_number: int | None
) -> Exported:
    """Write the adapter that a round produced into the new or empty folder ``target``.

    Both files are the caller's own: nothing that is done to them reaches the ledger. Raises
    RunNotFoundError for a round without a result, ConfigError when ``target`` holds files,
    LedgerDamagedError when the stored adapter is missing or altered.
    """
    number = history.last_closed if round_number is None else round_number
    record = history.one(number, ClosedRecord) or history.one(number, GenesisRecord)
    if not isinstance(record, ClosedRecord | GenesisRecord):
        raise RunNotFoundError(f"run {history.run} has no result of round {number} to export")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {target}: cannot be made ({error.strerror})") from None
    if any(target.iterdir()):
        raise ConfigError(f"--to {target}: is not empty; name a new directory")
    tensors = target / TENSORS
    key = topology.adapter_key(history.run, record.adapter_sha, TENSORS)
    try:
        store.fetch_file(key, tensors)
    except ObjectMissingError:
        why = _why_missing(history.run, store, key)
        raise LedgerDamagedError(f"{key}: {why}") from None
    if digest_file(tensors)[0] != record.adapter_sha:
        tensors.unlink()
        raise LedgerDamagedError(f"{key}: does not have its sha256; see: gradualdiff runs verify")
    lora = lora_in(tensors, history.config)
    # Made from the record and not copied: what lies beside the tensors has no sha256 on record.
    config = adapter_config(history.config.base, lora, _genesis(history).manifest)
    (target / CONFIG).write_bytes(config)
    (target / "README.md").write_text(_card(history, number, record, lora), encoding="utf-8")
    return Exported(number, record.adapter_sha, target)


def _genesis(history: History) -> GenesisRecord:
    record = history.one(0, GenesisRecord)
    assert isinstance(record, GenesisRecord)  # no result comes before it
    return record


# What each rule takes of the deltas, for the model card.
_TAKEN = {
    "mean": "the weighted mean of the participants' deltas",
    "trimmed-mean": "the trimmed mean of the participants' deltas",
    "median": "the median of the participants' deltas, value by value",
    "multi-krum": "the mean of those participants' deltas that multi-Krum takes",
}


def _joined(config: FederationConfig) -> str:
    if config.aggregation.averaging == "svd":
        return (
            "each round's global adapter is the best fit of its rank to the weighted mean of the "
            "participants' products BA"
        )
    if config.aggregation.averaging == "flora":
        return (
            "each round's global adapter is the one before beside the participants' factors, so "
            "that its product grows by the weighted mean of theirs"
        )
    taken, optimizer = _TAKEN[config.aggregation.rule], config.server.optimizer
    step = taken if optimizer == "plain" else f"the step that {optimizer} makes of {taken}"
    return f"each round's global adapter is the one before plus {step}"


def _why_missing(run: str, store: ObjectStore, key: str) -> str:
    for record in Ledger(store, run, "reader", float).pruned():
        if key in record.keys:
            return f"was pruned ({record.key(run)}: {record.reason}); name a round that was kept"
    return "is missing; see: gradualdiff runs verify"


def _card(
    history: History, number: int, record: ClosedRecord | GenesisRecord, lora: LoraSection
) -> str:
    config = history.config
    losses = {n: pool_held_out(history.held_out(n).values()) for n in range(number + 1)}
    lines = [
        f"| {n} | {loss.nll:.4f} | {perplexity(loss):.2f} | {loss.tokens} |"
        for n, loss in losses.items()
        if loss is not None
    ]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {config.base.model}",
            "tags: [lora, federated-learning, gradualdiff-fed]",
            "---",
            "",
            f"# {history.run}, round {number}",
            "",
            (
                f"A LoRA adapter (r={lora.rank}, alpha={lora.alpha:g}, scaling "
                f"{lora.scaling}) trained by "
                f"{len(history.members)} participants with GradualDiff-Fed (arXiv:2506.19164). "
                f"No text left its site; {_joined(config)}."
            ),
            "",
            f"- Adapter sha256: `{record.adapter_sha}`",
            f"- Config digest: `{history.federation.digest}`",
            (
                f"- Base model: `{config.base.model}` ({config.base.quantisation} while "
                f"training), fingerprint `{next(iter(history.members.values())).fingerprint}`"
            ),
            (
                f"- Rounds: {number} of {history.total_rounds}; "
                f"weights: {config.aggregation.weights}; "
                f"averaging: {config.aggregation.averaging}; "
                f"codec: {config.codec.name}; seed: {config.run.seed}"
            ),
            "",
            (
                "Held-out loss of the global adapter, nats per answer token over all "
                "participants' held-out text (round 0 is the base model):"
            ),
            "",
            "| round | loss | perplexity | tokens |",
            "|---:|---:|---:|---:|",
            *lines,
            "",
        ]
    )
