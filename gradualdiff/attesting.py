"""One file that proves a run elsewhere: written where the store is, checked where nothing is."""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from shared.disk.durable_files import file_errors, temporary

if TYPE_CHECKING:
    from coordinator.audit.attestation import Attestation
    from coordinator.audit.evidence import Verification
    from shared.protocol.ledger import Ledger
    from shared.trust.keys import SigningKey

TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class CheckedAttestation:
    """What a file says, and what its own records say. ``adapter_sha``: of the file beside it."""

    told: Attestation
    found: Verification
    adapter_sha: str | None

    @property
    def is_result(self) -> bool:
        """Whether the adapter beside it, if there is one, is the run's last."""
        return self.adapter_sha in (None, self.found.adapter_sha)


def own_key(path: Path) -> SigningKey | None:
    """The coordinator's, if ``path`` is a federation.toml that names one and its file is here.

    A store that is named by its folder names no key. Raises ConfigError for a file that is none.
    """
    from shared.config import load_federation
    from shared.trust.keys import SigningKey

    trust = load_federation(path).trust if path.suffix == ".toml" else None
    file = path.resolve().parent / trust.key_file if trust is not None else None
    if file is None or not file.exists():
        return None
    return SigningKey.load(file, "trust.key_file")


def save(ledger: Ledger, found: Verification, to: Path, key: SigningKey | None) -> None:
    """Write the file ``to``, whole or not at all. Raises StoreUnavailableError."""
    from coordinator.audit.attestation import attest, write_attestation
    from coordinator.audit.bom import OWN, bill_of_materials

    told = attest(ledger, found, time.time(), version(OWN))
    told.bom = bill_of_materials()
    with file_errors(to), temporary(to.resolve().parent, f".{to.name}-") as unfinished:
        with unfinished.open("xb") as file:
            write_attestation(told, file, key)
        unfinished.replace(to)


def check_attestation(
    path: Path | str,
    *,
    key: str | None = None,
    against: str | None = None,
    adapter: Path | str | None = None,
) -> CheckedAttestation:
    """Check a file that ``runs attest`` wrote; no store is needed, and none is asked.

    ``key``, ``against``: as of ``Run.verify``. ``adapter``: an exported adapter, or its file of
    tensors, to compare with the run's result. Raises LedgerDamagedError for what is no attestation,
    SignatureError for one that was altered or that another key signed, ConfigError.
    """
    from coordinator.audit.attestation import check_attestation, read_attestation
    from coordinator.audit.links import Expected
    from shared.protocol.chain import Head
    from shared.trust.keys import PublicKey

    expected = Expected(
        key=PublicKey(key) if key else None,
        demanded=key is not None,
        against=Head.parse(against, "--against") if against else None,
    )
    path = Path(path)
    with path.open("rb") as file:
        told = read_attestation(file, str(path))
    with tempfile.TemporaryDirectory(prefix="gradualdiff-attest-") as scratch:
        found = check_attestation(told, Path(scratch), expected)
    return CheckedAttestation(told, found, None if adapter is None else _sha256(Path(adapter)))


def _sha256(adapter: Path) -> str:
    file = adapter / TENSORS if adapter.is_dir() else adapter
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
