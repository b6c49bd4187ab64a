"""What ``make dist`` publishes: the same bytes each time, all that is needed, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EPOCH = "1700000000"


def run(*words, **options):
    """Run a program to its end; what it said."""
    return subprocess.run(
        [str(word) for word in words], check=True, capture_output=True, text=True, **options
    ).stdout


def build(folder, umask):
    """Copy what git holds, with times of its own, and build it; the sdist and the wheel."""
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    run(
        *(sys.executable, "-m", "build", "--no-isolation"),
        cwd=folder,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        umask=umask,
    )
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return sdist, wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Built twice, in folders of other names, under other masks."""
    return [build(tmp_path_factory.mktemp(f"at-{mask}"), mask) for mask in (0o022, 0o077)]


def test_building_twice_gives_the_same_bytes(built):
    """Whoever has the commit can check what was published."""
    for one, other in zip(*built, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_the_wheel_holds_the_product_and_no_tests(built):
    """The packages with their data files, and the console script's module."""
    sdist, wheel = built[0]
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"shared", "coordinator", "participant", "gradualdiff"}
    for top in tops - {"gradualdiff.py"}:
        tracked = run("git", "ls-files", top, cwd=ROOT).splitlines()
        assert {name for name in names if name.startswith(f"{top}/")} == set(tracked)
    assert {"shared/py.typed", "gradualdiff/reproduction/presets/cpu.toml"} < names
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "tests/test_dist.py"} < inside


@pytest.mark.parametrize("image", ["coordinator", "participant"])
def test_an_image_is_built_from_all_that_the_wheel_holds(built, image):
    """What a Dockerfile does not copy, or .dockerignore hides, would be missing in it."""
    names = zipfile.ZipFile(built[0][1]).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    dockerfile = (ROOT / "deploy" / "compose" / f"Dockerfile.{image}").read_text()
    copied = {
        source
        for line in dockerfile.splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }
    shown = {
        line.removeprefix("!").removesuffix("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert tops <= copied
    assert tops <= shown


def test_the_wheel_runs_in_an_environment_of_its_own(built, tmp_path):
    """Installed, it tells its version and its commands, and finds its own packages."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"),
        *("--disable-pip-version-check", built[0][1]),
    )
    # What it depends on stands in for a download; its own packages come before.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    needed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "needed.pth").write_text("\n".join(needed) + "\n")
    command = tmp_path / "venv" / "bin" / "gradualdiff"
    assert run(command, "--version", cwd=tmp_path).startswith("gradualdiff-fed 0.")
    assert "simulate" in run(command, "--help", cwd=tmp_path)
    told = run(python, "-c", "import shared; print(shared.__file__)", cwd=tmp_path)
    assert told.strip() == str(site / "shared" / "__init__.py")
