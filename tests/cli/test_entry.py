"""The console script: whose packages it runs, its version, and completion."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from gradualdiff import entry
from shared.errors import ForeignPackageError

ROOT = Path(__file__).parents[2]


def command(*arguments, cwd=None, **environment):
    """Run the console script's module in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gradualdiff", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", entry.PACKAGES)
def test_a_package_of_somebody_else_is_said_in_one_line(tmp_path, name):
    """In a folder on PYTHONPATH, and in the folder that ``python -m`` is started in."""
    package, elsewhere = tmp_path / "mine" / name, tmp_path / "elsewhere"
    package.mkdir(parents=True)
    elsewhere.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("it was run")\n')
    for done in (
        command("--help", cwd=elsewhere, PYTHONPATH=str(package.parent)),
        command("--help", cwd=package.parent),
    ):
        assert done.returncode == ForeignPackageError.exit_code == entry.FOREIGN_PACKAGE
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {name}: expected")
        assert str(package / "__init__.py") in line
        assert "virtual environment of its own" in line


def test_a_folder_without_python_in_it_is_in_nobodys_way(tmp_path):
    """A folder named shared is common; only a package is taken for one."""
    (tmp_path / "shared").mkdir()
    assert command("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 0


def test_a_distribution_that_was_installed_over_ours_is_said(tmp_path):
    """Its files lie where ours were, so the place alone tells nothing."""
    for name in ("gradualdiff", *entry.PACKAGES):
        (tmp_path / name).mkdir()
        for file in (ROOT / name).glob("_*_.py"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "gradualdiff" / "entry.py").write_bytes(Path(entry.__file__).read_bytes())
    (tmp_path / "coordinator" / "__init__.py").write_text('"""Coordinates threads."""\n')
    done = command("--help", cwd=tmp_path)
    assert done.returncode == ForeignPackageError.exit_code
    assert done.stderr.startswith("error: coordinator: expected")
    (tmp_path / "coordinator" / "__init__.py").unlink()
    (tmp_path / "coordinator").rmdir()
    assert "Traceback" not in command("--help", cwd=tmp_path).stderr


def test_the_version_is_told_at_once():
    """Nothing is loaded for it but the command line itself."""
    program = (
        "import sys, gradualdiff.entry\n"
        "sys.argv = ['gradualdiff', '--version']\n"
        "try:\n"
        "    gradualdiff.entry.main()\n"
        "finally:\n"
        "    print({'torch', 'numpy', 'pydantic', 'pika', 'minio', 'rich'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"gradualdiff-fed {version('gradualdiff-fed')}", "set()"]
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_asked(shell):
    """The script that a shell sources, and what the command answers to it."""
    off = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = command("--show-completion", shell, **off)
    assert shown.returncode == 0, shown.stderr
    assert f"_GRADUALDIFF_COMPLETE=complete_{shell}" in shown.stdout
    asked = {
        "bash": {"COMP_WORDS": "gradualdiff runs ver", "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "gradualdiff runs ver"},
        "fish": {
            "_TYPER_COMPLETE_ARGS": "gradualdiff runs ver",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
    }[shell]
    answer = command(_GRADUALDIFF_COMPLETE=f"complete_{shell}", **asked)
    assert "verify" in answer.stdout
    assert "pause" not in answer.stdout
