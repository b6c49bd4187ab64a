"""``docker compose up``, as it is committed: images, confinement, a whole run with a kill in it.

Needs root and minutes, and neither a container registry nor a container engine that is there
already: ``engine.py`` brings one up and says what stands in for what (SeaweedFS for MinIO, Debian's
RabbitMQ and Python for the official images). ``pytest -m compose`` runs it, and nothing else does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.compose.engine import (
    Engine,
    cache_folder,
    debian_mirror,
    fetch_plugins,
    named_images,
    run,
    running_engine,
    why_not,
)
from tests.compose.least_privilege import check_encryption, check_least_privilege

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.compose, pytest.mark.slow]

RUN = "demo-1"
SHOW = ("runs", "show", RUN, "--federation", "/federation/federation.toml", "--json")
ROUND_SECONDS = 1200  # only a bound: the container has ended or it has not
KILLED = 137
# What a process in a container finds there; None is a folder that is not there.
LOOK_AROUND = """
import json, os, pathlib, socket, sys

def names(folder):
    path = pathlib.Path(folder)
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else None

def reaches(host, port):
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True

found = {name: names("/" + name) for name in ("site", "secrets", "operator", "federation")}
print(json.dumps({**found, "uid": os.getuid(), "reaches": reaches(*sys.argv[1:])}))
"""


@dataclass(frozen=True)
class Stack:
    """The committed compose file on an engine, with the settings of a short run."""

    engine: Engine

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.engine.docker("compose", *arguments, check=check)

    def config(self, *options: str) -> dict[str, Any]:
        """The file as Compose understands it."""
        text = self.compose(*options, "config", "--format", "json").stdout
        config: dict[str, Any] = json.loads(text)
        return config

    def state(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's one container."""
        container = self.compose("ps", "-aq", service).stdout.strip()
        state: dict[str, Any] = json.loads(
            self.engine.docker("inspect", "--format", "{{json .State}}", container).stdout
        )
        return state

    def told(self, *services: str) -> str:
        """The end of the services' logs, for a failure's message."""
        return self.compose("logs", "--no-color", "--tail", "40", *services).stdout[-8000:]

    def show(self) -> dict[str, Any]:
        """The run as a coordinator's image sees it in the store."""
        done = self.compose("run", "--rm", "--no-deps", "-T", "coordinator", *SHOW)
        summary: dict[str, Any] = json.loads(done.stdout)["summary"]
        return summary

    def ended(self) -> bool:
        """Whether the coordinator has ended; a code other than 0 is an error."""
        state = self.state("coordinator")
        if state["Status"] != "exited":
            return False
        assert state["ExitCode"] == 0, self.told("setup", "coordinator")
        return True


def wait_until(condition: Callable[[], bool], seconds: float, stack: Stack) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, stack.told()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    if (reason := why_not()) is not None:
        pytest.fail(reason)  # it was asked for by name: a run without it is no run
    # Two rounds, as short as a kit takes part in; torch from where pip on this machine has it.
    settings = {
        "GRADUALDIFF_ROUNDS": "2",
        "GRADUALDIFF_LOCAL_STEPS": "4",
        "GRADUALDIFF_TORCH_INDEX": "",
    }
    with running_engine(tmp_path_factory.mktemp("engine")) as up:
        yield Engine(up.folder, {**up.env, **settings})


@pytest.fixture(scope="module")
def images(engine) -> Engine:
    began = time.monotonic()
    engine.docker("compose", "build", timeout=1800)
    sys.stdout.write(f"\nboth images: built in {time.monotonic() - began:.0f} s\n")
    return engine


@pytest.fixture
def stack(images) -> Iterator[Stack]:
    up = Stack(images)
    try:
        yield up
    finally:
        up.compose("down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Stack:
    """Compose without an engine: enough to read the file."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "cli-plugins").symlink_to(fetch_plugins(cache_folder()))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COMPOSE_", "GRADUALDIFF_"))}
    return Stack(Engine(folder, {**kept, "DOCKER_CONFIG": str(folder)}))


def volumes(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Named volume -> where it is mounted, and whether it can be written to."""
    return {
        mount["source"]: (mount["target"], not mount.get("read_only", False))
        for mount in service.get("volumes", [])
    }


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--profile", "gpu")], ids=["cpu", "gpu"])
def test_the_file_is_valid(plain, options):
    """Compose takes it without a warning, with and without the GPU."""
    done = plain.compose(*options, "config", "-q")
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(("options", "infix"), [((), ""), (("--profile", "gpu"), "gpu-")])
def test_each_site_trains_once(plain, options, infix):
    """CPU or GPU, never both; each with the site's own kit, text and workspace, and no other's."""
    services = plain.config(*options)["services"]
    trainers = {name: s for name, s in services.items() if name.startswith("participant-")}
    assert sorted(trainers) == [f"participant-{infix}{n}" for n in range(1, 6)]
    for n in range(1, 6):
        assert volumes(trainers[f"participant-{infix}{n}"]) == {
            f"site-{n}": ("/site", False),
            f"workspace-{n}": ("/workspace", True),
            "model": ("/model", False),
        }


def test_each_secret_is_seen_by_who_needs_it(plain):
    """An administrator's secret is mounted at its server and at setup, and at nobody else's."""
    services = plain.config()["services"]
    del services["secrets"]  # which makes them all, and has no network

    def seen_by(volume: str) -> set[str]:
        found = {name: volumes(service).get(volume) for name, service in services.items()}
        assert all(mount is None or not mount[1] for mount in found.values()), volume
        return {name for name, mount in found.items() if mount is not None}

    assert seen_by("broker-admin-secret") == {"rabbitmq", "setup"}
    assert seen_by("broker-secret") == {"coordinator", "setup"}
    assert seen_by("store-admin-secret") == {"minio", "setup"}
    assert seen_by("store-encryption-secret") == {"minio"}
    assert seen_by("store-secret") == {"coordinator", "setup"}


def test_a_gpu_participant_reserves_a_gpu(plain):
    """The reservation is there with the profile, and the image is the CUDA build."""
    services = plain.config("--profile", "gpu")["services"]
    (device,) = services["participant-gpu-3"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["participant-gpu-3"]["build"]["args"] == {"TORCH_INDEX": ""}


@pytest.mark.parametrize("options", [(), ("--profile", "gpu")], ids=["cpu", "gpu"])
def test_every_service_is_confined(plain, options):
    """No root, no capability, no writable image, no endless log, no port beyond this machine."""
    for name, service in plain.config(*options)["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name
        assert "privileged" not in service, name


def test_the_images_are_named_to_the_release(plain):
    """No moving tag, and no digest: what stands in for an image has none."""
    tags = named_images()
    assert all(":" in tag and "@" not in tag and "latest" not in tag for tag in tags.values())
    services = plain.config()["services"]
    assert services["rabbitmq"]["image"] == tags["rabbitmq"]
    assert services["minio"]["image"] == tags["minio"]


# --- the images -----------------------------------------------------------------------------------


def test_the_coordinators_image_holds_no_torch(images):
    """The coordinator starts in a blink because nothing of the trainer's is in its image."""
    command = ["run", "--rm", "--entrypoint", "python", "gradualdiff-fed-coordinator"]
    done = images.docker(*command, "-c", "import torch", check=False)
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr
    assert images.docker(*command, "-c", "import coordinator.bootstrap").returncode == 0


def test_the_coordinators_image_is_small(images):
    """What it adds to Python: its packages and our code."""

    def size(tag: str) -> int:
        return int(images.docker("image", "inspect", "--format", "{{.Size}}", tag).stdout)

    base = size(named_images()["python"])
    for role in ("coordinator", "participant"):
        whole = size(f"gradualdiff-fed-{role}")
        sys.stdout.write(
            f"\n{role} image: {whole / 1e6:.0f} MB, {(whole - base) / 1e6:.0f} MB over its base\n"
        )
    assert size("gradualdiff-fed-coordinator") - base < 250e6


# --- a run ----------------------------------------------------------------------------------------


def test_a_killed_stack_goes_on_and_ends_in_the_adapter_of_a_simulation(stack, tmp_path):
    """One command, a kill of everything in round 1, the same command: the same sha256.

    The simulation on this machine has the same settings, text and base model, copied out of the
    volumes. A start after the end finds the run finished and changes nothing.
    """
    began = time.monotonic()
    stack.compose("up", "-d")
    wait_until(lambda: in_round_one(stack), ROUND_SECONDS, stack)
    check_confinement(stack)
    check_least_privilege(stack.engine)
    stack.compose("kill")
    assert_killed_in_round_one(stack)
    say("killed in round 1", began)

    stack.compose("up", "-d")
    wait_until(stack.ended, ROUND_SECONDS, stack)
    say("resumed and finished", began)
    summary = stack.show()
    assert (summary["state"], summary["rounds_closed"]) == ("finished", 2)
    check_encryption(stack.engine)

    stack.compose("up", "-d")
    wait_until(stack.ended, 60, stack)
    say("started after the end", began)
    assert stack.show() == summary
    state = stack.state("coordinator")
    assert seconds_of(state) < 20

    stack.compose("stop")  # the simulation wants the cores
    expected = simulate(stack, tmp_path)
    say("simulated here", began)
    assert summary["adapter_sha"] == expected


def in_round_one(stack: Stack) -> bool:
    """A delta of round 1 is in, and the round is still open."""
    state = stack.state("coordinator")
    assert state["Status"] != "exited" or state["ExitCode"] == 0, stack.told("coordinator")
    shown = stack.compose("exec", "-T", "coordinator", "gradualdiff", *SHOW, check=False)
    if shown.returncode:
        return False  # not connected yet, or the run is not in the store yet
    summary = json.loads(shown.stdout)["summary"]
    assert summary["rounds_closed"] < 1, "round 1 closed before it was seen open"
    return summary["state"] == "round 1 open"


def assert_killed_in_round_one(stack: Stack) -> None:
    """The fault fired: every process died of it, and the store says how far the run had come."""
    for service in ("rabbitmq", "minio", "coordinator", "participant-1", "participant-5"):
        assert stack.state(service)["ExitCode"] == KILLED, service
    stack.compose("up", "-d", "--wait", "minio")
    summary = stack.show()
    assert (summary["state"], summary["rounds_closed"]) == ("round 1 open", 0)


def check_confinement(stack: Stack) -> None:
    """From inside a participant: its own files only, no secret of the servers, no way out.

    That there is something to reach shows in a container on the engine's usual network.
    """
    mirror = urlsplit(debian_mirror().site)
    port = mirror.port or (443 if mirror.scheme == "https" else 80)
    look = ["python", "-c", LOOK_AROUND, socket.gethostbyname(mirror.hostname or ""), str(port)]
    told = stack.compose("exec", "-T", "participant-2", *look).stdout
    assert json.loads(told) == {
        "uid": 10001,
        "site": ["broker-password", "identity.key", "site-2.jsonl", "site.toml"],
        "secrets": None,
        "operator": [],
        "federation": [],
        "reaches": False,
    }
    command = ["run", "--rm", "--entrypoint", look[0], "gradualdiff-fed-coordinator"]
    assert json.loads(stack.engine.docker(*command, *look[1:]).stdout)["reaches"] is True


def simulate(stack: Stack, folder: Path) -> str:
    """The adapter's sha256 of the same federation in one process on this machine."""
    stack.compose("cp", "setup:/operator/prepared", str(folder / "prepared"))
    stack.compose("cp", "setup:/model", str(folder / "model"))
    path = folder / "prepared" / "federation.toml"
    text = path.read_text()
    model = tomllib.loads(text)["base"]["model"]
    path.write_text(text.replace(model, str(folder / model.lstrip("/"))))
    gradualdiff = Path(sys.executable).with_name("gradualdiff")
    # As in the file: a thread that waits sleeps. It changes the time and not the bytes.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = run([gradualdiff, "simulate", path, "--json"], env)
    sha: str = json.loads(done.stdout)["adapter_sha"]
    return sha


def seconds_of(state: dict[str, Any]) -> float:
    """From a container's start to its end."""
    began, ended = (datetime.fromisoformat(state[key]) for key in ("StartedAt", "FinishedAt"))
    return (ended - began).total_seconds()


def say(what: str, began: float) -> None:
    with contextlib.suppress(ValueError):
        sys.stdout.write(f"{what}: {time.monotonic() - began:.0f} s after the first start\n")
