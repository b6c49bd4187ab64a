"""A mode is one value in one file, found by its name: nothing else compares that name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from shared import modes
from shared.errors import ConfigError

ROOT = Path(__file__).parents[2]
BUILT_IN = {
    "averaging": ("fedavg", "ffa", "flora", "range-finder", "rolora", "svd"),
    "codecs": (
        "bf16",
        "fp32",
        "int4",
        "int8",
        "sign",
        "topk",
        "uniform16",
        "uniform256",
        "uniform4",
    ),
    "policies": ("all", "buffered", "quorum"),
    "rules": ("mean", "median", "multi-krum", "trimmed-mean"),
    "server_optimizers": ("fedadagrad", "fedadam", "fedavgm", "fedyogi", "nesterov", "plain"),
}
# What else is called so: an arm of reproduction, a way to quantise a base model, what to keep.
OTHERS = {
    ("gradualdiff/reproduction", "fedavg"),
    ("participant/model", "int8"),
    ("coordinator/runs", "all"),
}


def compared(path):
    """Every text that a file compares with something, or matches a case against."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value, node.lineno


@pytest.mark.parametrize("kind", modes.KINDS)
def test_no_file_compares_the_name_of_a_mode(kind):
    """Whoever has to know something of it asks the value."""
    folders = ("shared", "coordinator", "participant", "gradualdiff")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        for text, line in compared(file)
        if text in modes.names(kind) and (str(file.relative_to(ROOT).parent), text) not in OTHERS
    ]
    assert len(files) > 200
    assert found == []


@pytest.mark.parametrize("kind", modes.KINDS)
def test_every_mode_is_there_by_its_name(kind):
    """A file in the folder is a mode that has all that its kind promises; it has no origin."""
    assert modes.names(kind) == BUILT_IN[kind]
    for name in modes.names(kind):
        mode = modes.get(kind, name)
        assert all(hasattr(mode, part) for part in modes._parts(kind))
        assert modes.origin(kind, name) is None


@pytest.mark.parametrize("kind", modes.KINDS)
def test_an_unknown_mode_names_the_known_ones(kind):
    """And the setting, and the nearest."""
    near = BUILT_IN[kind][0] + "x"
    wanted = f"{modes.KINDS[kind].setting}: expected one of .*got '{near}'; did you mean"
    with pytest.raises(ConfigError, match=wanted):
        modes.get(kind, near)


def test_settings_load_no_kind_of_modes():
    """So that nothing is slow at import, and no circle ties the settings to the modes."""
    script = "import sys, shared.config; print([n for n in sys.modules if 'methods' in n])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


def test_policies_load_no_numpy():
    """A coordinator folds its ledger with them: they know records, and nothing of tensors."""
    script = (
        "import sys; from shared import modes; "
        "[modes.get('policies', name) for name in modes.names('policies')]; "
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"
