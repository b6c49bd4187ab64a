"""A folder for other packages, on the path while a test runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.extension.installing import forget


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """What ``install`` writes here is found, in this process and in one that it starts."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    forget()
    yield folder
    monkeypatch.undo()
    for name, module in [*sys.modules.items()]:
        if folder in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]
    forget()
