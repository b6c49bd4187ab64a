"""What ``import gradualdiff`` loads, whose packages it takes, and the types that it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gradualdiff
from gradualdiff import entry

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "pandas", "matplotlib", "transformers", "pika", "minio", "rich", "typer")


def python(program, cwd):
    """Run a program in a process of its own; what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_loads_nothing_of_ours_and_asking_loads_nothing_heavy(tmp_path):
    """The first import is of one small file; runs are read without numpy or torch."""
    program = (
        "import json, sys\n"
        "import gradualdiff as gd\n"
        "first = [n for n in sys.modules if n.partition('.')[0] in "
        f"{('gradualdiff', *entry.PACKAGES, 'pydantic', *HEAVY)}]\n"
        "gd.open_store\n"
        f"print(json.dumps([first, [n for n in {HEAVY} if n in sys.modules]]))\n"
    )
    assert python(program, tmp_path) == [["gradualdiff"], []]


def test_every_name_is_there_and_is_listed():
    """As ``dir`` and ``import *`` see them; another one is no attribute."""
    found = {}
    exec("from gradualdiff import *", found)
    names = set(gradualdiff.__all__)
    assert names <= set(found)
    assert names <= set(dir(gradualdiff))
    assert not hasattr(gradualdiff, "Path")  # what the API itself imports is no part of it
    assert not hasattr(gradualdiff, "_hidden")


def test_a_package_of_somebody_else_is_an_import_error_that_says_so(tmp_path):
    """The same words that the command ends with, and nothing of the other package is run."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text('raise RuntimeError("it was run")\n')
    program = (
        "import json\n"
        "import gradualdiff as gd\n"
        "try:\n"
        "    gd.open_store\n"
        "except ImportError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    said = python(program, tmp_path)
    assert said.startswith("shared: expected this project's package")
    assert str(tmp_path / "shared" / "__init__.py") in said
    assert "virtual environment of its own" in said


@pytest.mark.slow
def test_a_script_sees_types(tmp_path):
    """mypy, as strict as can be, in a folder that is not this project's."""
    (tmp_path / "script.py").write_text((ROOT / "tests" / "api" / "typed_script.py").read_text())
    (tmp_path / "wrong.py").write_text(
        'import gradualdiff as gd\ngd.open_store("store").run("demo-1").rounds[0].round.upper()\n'
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    files = ["script.py", "wrong.py"]
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(found) == 1, done.stdout + done.stderr
    assert found[0].startswith("wrong.py:2: error: ")
    assert '"int" has no attribute "upper"' in found[0]
