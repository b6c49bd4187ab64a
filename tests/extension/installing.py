"""Another package as pip leaves it: a folder with code, and one that says what it offers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shared import modes

if TYPE_CHECKING:
    from pathlib import Path


def install(
    folder: Path,
    offers: dict[str, dict[str, str]],
    distribution: str = "toy-modes",
    version: str = "1.0",
) -> None:
    """Write the package's ``dist-info`` into ``folder``, which is to be on ``sys.path``.

    ``offers``: by kind and name, ``module:value``. Once more with another version: an upgrade.
    """
    info = folder / f"{distribution.replace('-', '_')}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    words = ("Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}", "")
    (info / "METADATA").write_text("\n".join(words))
    lines = []
    for kind, values in offers.items():
        lines += [f"[gradualdiff.{kind}]", *(f"{name} = {at}" for name, at in values.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    forget()


def uninstall(folder: Path, distribution: str = "toy-modes") -> None:
    """The code stays; nothing offers it any more."""
    (folder / f"{distribution.replace('-', '_')}.dist-info" / "entry_points.txt").unlink()
    forget()


def forget() -> None:
    """Look again at what is installed, as a process that starts does."""
    importlib.invalidate_caches()
    modes.get.cache_clear()
    modes._installed.cache_clear()
