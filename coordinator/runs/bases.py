"""The bases of core adapters that a file or a run holds: read once, put into the store, handed out.

``lora.bases`` names a file, or a run of the same store that made bases: ``RUN@ROUND``, or ``RUN``
for its last round. What looks like a run's name is one; a file of such a name is ``./NAME``.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.history import read_history
from coordinator.runs.captured import captured
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
from shared.methods.averaging import get_averaging
from shared.protocol.ledger import Ledger
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.history import History
    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore

IN_THE_WEIGHTS = "weights"
_A_RUN = re.compile(r"([a-z0-9-]{1,40})(?:@([0-9]{1,6}))?")


def named_bases(
    config: FederationConfig, store: ObjectStore | None, folder: Path, scratch: Path
) -> tuple[FederationConfig, Path | None]:
    """The settings as they go on record, with the sha256 of the bases, and the file to be put.

    ``folder``: what a path is relative to. ``store``: None where there is none yet. ``scratch``:
    a folder that a run's bases are copied to. A run that is on record, and whose file is no longer
    here or whose bases another run made, goes on with what it has. Raises ConfigError for a file
    that is missing or is no bases, and for a run that has none for these settings;
    LedgerDamagedError where the store lost or altered them.
    """
    lora = config.lora
    if not kind_of(lora).has_bases or lora.bases == IN_THE_WEIGHTS or lora.bases_sha is not None:
        return config, None
    named = _A_RUN.fullmatch(lora.bases)
    path = folder / lora.bases
    if named is None and path.is_file():
        return _of_file(config, path)
    on_record = _on_record(config, store) if store is not None else None
    if on_record is not None:
        return on_record, None
    if named is None:
        raise ConfigError(
            f'lora.bases: expected "weights", a run of this store or a file, got {lora.bases!r}, '
            f"and there is no {path}"
        )
    return _of_run(config, store, named[1], named[2], scratch)


@contextmanager
def bases_here(
    config: FederationConfig, store: ObjectStore | None, folder: Path
) -> Iterator[tuple[FederationConfig, Path | None]]:
    """As ``named_bases``; the file is there in any case, for as long as the context lasts."""
    if not kind_of(config.lora).has_bases:
        yield config, None
        return
    with tempfile.TemporaryDirectory(prefix=".gradualdiff-bases-", dir=folder) as scratch:
        config, path = named_bases(config, store, folder, Path(scratch))
        sha = config.lora.bases_sha
        if path is None and sha is not None and store is not None:
            path = Path(scratch) / sha
            fetch_bases(store, config.run.name, sha, path)
        yield config, path


def _of_file(config: FederationConfig, path: Path) -> tuple[FederationConfig, Path]:
    try:
        with TensorFile(path):
            pass
    except (OSError, DecodeError) as error:
        raise ConfigError(
            f"lora.bases: {path}: expected a LoRA adapter's safetensors file: {error}"
        ) from None
    sha = digest_file(path)[0]
    return config.model_copy(update={"lora": config.lora.with_bases(sha)}), path


def _of_run(
    config: FederationConfig, store: ObjectStore | None, run: str, number: str | None, scratch: Path
) -> tuple[FederationConfig, Path]:
    """A copy of the adapter that the run made; the new run is of its base model only."""
    history: History | None = None
    with suppress(RunNotFoundError):
        history = read_history(store, run) if store is not None else None
    if store is None or history is None:
        raise ConfigError(
            f'lora.bases: expected "weights", a run of this store or a file, got '
            f"{config.lora.bases!r}, and the store has no run {run}; see: gradualdiff runs list; "
            f'a file of that name is "./{config.lora.bases}"'
        )
    sha = _made(config, history, None if number is None else int(number))
    genesis = history.genesis
    assert genesis is not None  # a round was closed
    _check_base(config, history, genesis.fingerprint)
    path = scratch / sha
    _fetch(store, topology.adapter_key(run, sha), sha, path)
    # The directions are those of one model's gradient: at another one a site declines.
    base = config.base.model_copy(update={"fingerprint": genesis.fingerprint})
    return config.model_copy(update={"lora": config.lora.with_bases(sha), "base": base}), path


def _made(config: FederationConfig, history: History, number: int | None) -> str:
    """sha256 of the bases that the run made, in its last round or in that one."""
    run, theirs, asked = history.run, history.config, config.lora.bases
    if not get_averaging(theirs.aggregation.averaging).makes_bases:
        raise ConfigError(
            f"lora.bases: expected a run that makes bases, got {asked!r}, of which "
            f'aggregation.averaging is "{theirs.aggregation.averaging}"; name a run with '
            '"range-finder", or a file'
        )
    if number is None and history.finished is None:
        raise ConfigError(
            f"lora.bases: expected a finished run, got {asked!r}, which is not; wait for its end, "
            f'or name one of its rounds: "{run}@2"'
        )
    at = history.last_closed if number is None else number
    made, record = captured(history, at), history.round(at).closed
    if made is None or record is None:
        raise ConfigError(
            f"lora.bases: expected a round that made bases (2, 4, ...), got {asked!r}, and round "
            f"{at} has made none; see: gradualdiff rounds list {run}"
        )
    if config.lora.rank > theirs.lora.rank:
        raise ConfigError(
            f"lora.rank: expected at most {theirs.lora.rank}, which the bases of {asked!r} have, "
            f"got {config.lora.rank}; lower it, or make bases of a higher rank"
        )
    return record.adapter_sha


def _check_base(config: FederationConfig, history: History, fingerprint: str) -> None:
    ours, theirs = config.base, history.config.base
    for name, wanted, got in (
        ("quantisation", theirs.quantisation, ours.quantisation),
        ("fingerprint", fingerprint, ours.fingerprint or fingerprint),
    ):
        if wanted != got:
            raise ConfigError(
                f"base.{name}: expected {wanted}, as of run {history.run}, whose bases lora.bases "
                f"names, got {got}; use its base model, or make bases for this one"
            )


def put_bases(config: FederationConfig, store: ObjectStore, path: Path) -> None:
    """Put the file into the store under its sha256, which ``config`` names. Repeatable."""
    sha = config.lora.bases_sha
    assert sha is not None  # named_bases gave both
    store.put_file(topology.bases_key(config.run.name, sha), path)


def fetch_bases(store: ObjectStore, run: str, sha: str, path: Path) -> None:
    """Write them to ``path``. Raises LedgerDamagedError where the store lost or altered them."""
    _fetch(store, topology.bases_key(run, sha), sha, path)


def _fetch(store: ObjectStore, key: str, sha: str, path: Path) -> None:
    try:
        store.fetch_file(key, path)
    except ObjectMissingError:
        raise LedgerDamagedError(f"{key}: is missing; put the run's file of bases there") from None
    if digest_file(path)[0] != sha:
        path.unlink()
        raise LedgerDamagedError(f"{key}: does not have its sha256; put the run's file there")


def _on_record(config: FederationConfig, store: ObjectStore) -> FederationConfig | None:
    run = config.run.name
    ledger = Ledger(store, run, "reader", lambda: 0.0)
    try:
        theirs = ledger.federation().settings(run)
    except (ObjectMissingError, RunNotFoundError):
        return None
    sha = theirs.lora.bases_sha
    if sha is None or theirs.lora.bases != config.lora.with_bases(sha).bases or ledger.is_dying():
        return None
    base = config.base
    if base.fingerprint is None:  # bases of a run pin it
        base = base.model_copy(update={"fingerprint": theirs.base.fingerprint})
    return config.model_copy(update={"lora": config.lora.with_bases(sha), "base": base})
