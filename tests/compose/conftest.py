"""A container engine is brought up only for whoever asks for it by name: ``pytest -m compose``."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "compose":
        return
    skip = pytest.mark.skip(reason="brings up a container engine; ask by: pytest -m compose")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)
