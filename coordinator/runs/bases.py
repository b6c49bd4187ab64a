"""The bases of core adapters that come as a file: read once, put into the store, handed out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared import topology
from shared.adapters import kind_of
from shared.disk.files import digest_file
from shared.errors import (
    ConfigError,
    DecodeError,
    LedgerDamagedError,
    ObjectMissingError,
    RunNotFoundError,
)
from shared.protocol.ledger import Ledger
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore

IN_THE_WEIGHTS = "weights"


def named_bases(
    config: FederationConfig, store: ObjectStore | None, folder: Path
) -> tuple[FederationConfig, Path | None]:
    """The settings as they go on record, with the sha256 of the bases, and the file to be put.

    ``folder``: what a path is relative to. ``store``: None where there is none yet. A run that is
    on record and whose file is no longer here goes on with what it has. Raises ConfigError
    for a file that is missing or is no bases.
    """
    lora = config.lora
    if not kind_of(lora).has_bases or lora.bases == IN_THE_WEIGHTS or lora.bases_sha is not None:
        return config, None
    path = folder / lora.bases
    if not path.is_file():
        on_record = _on_record(config, store) if store is not None else None
        if on_record is not None:
            return on_record, None
        raise ConfigError(
            f'lora.bases: expected "weights" or a file, got {lora.bases!r}, and there is no {path}'
        )
    try:
        with TensorFile(path):
            pass
    except (OSError, DecodeError) as error:
        raise ConfigError(
            f"lora.bases: {path}: expected a LoRA adapter's safetensors file: {error}"
        ) from None
    sha = digest_file(path)[0]
    return config.model_copy(update={"lora": lora.with_bases(sha)}), path


def put_bases(config: FederationConfig, store: ObjectStore, path: Path) -> None:
    """Put the file into the store under its sha256, which ``config`` names. Repeatable."""
    sha = config.lora.bases_sha
    assert sha is not None  # named_bases gave both
    store.put_file(topology.bases_key(config.run.name, sha), path)


def fetch_bases(store: ObjectStore, run: str, sha: str, path: Path) -> None:
    """Write them to ``path``. Raises LedgerDamagedError where the store lost or altered them."""
    key = topology.bases_key(run, sha)
    try:
        store.fetch_file(key, path)
    except ObjectMissingError:
        raise LedgerDamagedError(f"{key}: is missing; put the run's file of bases there") from None
    if digest_file(path)[0] != sha:
        path.unlink()
        raise LedgerDamagedError(f"{key}: does not have its sha256; put the run's file there")


def _on_record(config: FederationConfig, store: ObjectStore) -> FederationConfig | None:
    run = config.run.name
    try:
        lora = Ledger(store, run, "reader", lambda: 0.0).federation().settings(run).lora
    except (ObjectMissingError, RunNotFoundError):
        return None
    if lora.bases_sha is None or lora.bases.removesuffix(f"#{lora.bases_sha}") != config.lora.bases:
        return None
    return config.model_copy(update={"lora": config.lora.with_bases(lora.bases_sha)})
