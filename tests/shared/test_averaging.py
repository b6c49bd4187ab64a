"""An averaging mode is one value in one file: nothing else compares its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.methods.averaging import Averaging, averaging_names, get_averaging

ROOT = Path(__file__).parents[2]


def compared(path):
    """Every text that a file compares with something, or matches a case against."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value, node.lineno


def test_no_file_compares_the_name_of_a_mode():
    """Whoever has to know something of it asks the value."""
    folders = ("shared", "coordinator", "participant", "cli")
    # Reproduction has an arm of its own that is called as one of the modes is.
    files = [f for n in folders for f in (ROOT / n).rglob("*.py") if f.name != "experiment.py"]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        for text, line in compared(file)
        if text in averaging_names() and file.parts[-2:] != ("reproduction", "arms.py")
    ]
    assert len(files) > 100
    assert found == []


def test_every_mode_is_there_by_its_name():
    """A file in the folder is a mode."""
    assert averaging_names() == ("fedavg", "ffa", "flora", "rolora", "svd")
    assert all(isinstance(get_averaging(name), Averaging) for name in averaging_names())


def test_an_unknown_mode_names_the_known_ones():
    """And the nearest."""
    with pytest.raises(ConfigError, match=r"expected one of fedavg, .*got 'floral'; did you mean"):
        get_averaging("floral")
