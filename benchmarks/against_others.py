"""The same rounds by Flower, NVIDIA FLARE and this project, and what a killed server costs each.

Everything runs on this machine, one system after another. Nobody trains: K participants, each a
process, get the global model and send back as many fp32 values. Two measurements for each system:

- ``seconds``: median of a round's seconds, from one round's beginning to the next, the first
  round left out.
- ``killed``: the server's processes get SIGKILL in the third round of a run with a small model, and
  the server is started again with the same command. The table says which round the run reached
  and what the system itself says of the run ``--patience`` seconds later, or at its end.

The others are installed each in an environment of its own, and named by its interpreter:

    python3 -m venv flower && flower/bin/pip install flwr==1.41.0 numpy
    python3 -m venv flare && flare/bin/pip install nvflare==2.9.0 numpy
    python benchmarks/against_others.py --flower flower/bin/python --flare flare/bin/python

Flower runs as SuperLink and SuperNodes, plain text; its state is in memory for ``seconds`` and in
a database file for ``killed``, since it has to outlive the process. FLARE runs in its
proof-of-concept mode (TLS, as it comes). Ours runs over RabbitMQ and SeaweedFS, plain text, with
every record of the ledger synced. Needs Linux and RabbitMQ installed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
SMALL_VALUES = 131_072  # half a megabyte: what is killed is the run, not a transfer
KILLED_ROUNDS = 12
KILLED_IN_ROUND = 3
START_SECONDS = 180.0
FLOWER_PORT = 18_000


class System(Protocol):
    """One federation of this machine. ``stamps``: when each round began so far, and the end."""

    def start(self, rounds: int, values: int) -> None: ...  # noqa: D102
    def stamps(self) -> list[float]: ...  # noqa: D102
    def kill_server(self) -> None: ...  # noqa: D102
    def restart_server(self) -> None: ...  # noqa: D102
    def said(self) -> str: ...  # noqa: D102
    def over(self) -> bool: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


def wait_until(fact: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that it started."""
    from wire_servers import descendants

    for one in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


class Stamps:
    """What both other systems share: a folder, a file with stamps, processes."""

    def __init__(self, python: Path, folder: Path, participants: int) -> None:
        self.bin = python.absolute().parent
        self.folder = folder
        self.participants = participants
        self.file = folder / "stamps.txt"
        self.env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()

    def stamps(self) -> list[float]:
        """When each round began."""
        if not self.file.exists():
            return []
        return [float(line.split()[1]) for line in self.file.read_text().splitlines()]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A command of that system to its end; what it printed."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd or self.folder, capture_output=True, text=True,
            timeout=START_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def spawn(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """A process of that system."""
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End every process."""
        for process in self.processes:
            kill_tree(process.pid)
            process.wait()


class Flower(Stamps):
    """SuperLink and SuperNodes. ``durable``: its state in a file."""

    def __init__(self, python: Path, folder: Path, participants: int, *, durable: bool) -> None:
        super().__init__(python, folder, participants)
        self.durable = durable
        self.env |= {"FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0"}

    def start(self, rounds: int, values: int) -> None:
        """Write the app, start all processes, submit the run."""
        app = self.folder / "app"
        (app / "rounds").mkdir(parents=True)
        for name in ("server", "client"):
            shutil.copy(HERE / "others" / f"flower_{name}.py", app / "rounds" / f"{name}.py")
        (app / "rounds" / "__init__.py").touch()
        (app / "pyproject.toml").write_text(
            f"""[project]
name = "rounds"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "rounds.server:app"
clientapp = "rounds.client:app"
[tool.flwr.app.config]
rounds = {rounds}
participants = {self.participants}
values = {values}
stamps = "{self.file}"
"""
        )
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{FLOWER_PORT}"\ninsecure = true\n'
        )
        self.restart_server()
        for number in range(1, self.participants + 1):
            self.spawn(
                f"node-{number}.log", "flower-supernode", "--insecure",
                "--superlink", f"127.0.0.1:{FLOWER_PORT}", "--port", str(FLOWER_PORT + number),
            )  # fmt: skip
        self.run("flwr", "run", ".", "here", cwd=app)

    def restart_server(self) -> None:
        """Start the SuperLink, and wait until it answers."""
        state = ["--database", "state.db"] if self.durable else []
        self.server = self.spawn(
            "server.log", "flower-superlink", "--insecure", "--port", str(FLOWER_PORT),
            "--disable-runtime-dependency-installation", *state,
        )  # fmt: skip
        log = self.folder / "server.log"
        if not wait_until(lambda: b"Uvicorn running" in log.read_bytes(), START_SECONDS):
            raise SystemExit(log.read_text()[-2000:])

    def kill_server(self) -> None:
        """The SuperLink and the server app it runs."""
        kill_tree(self.server.pid)
        self.server.wait()
        (self.folder / "server.log").unlink()

    def said(self) -> str:
        """The run's status."""
        runs = json.loads(self.run("flwr", "list", "here", "--format", "json"))["runs"]
        return str(runs[0]["status"])

    def over(self) -> bool:
        """Whether Flower calls it finished."""
        return self.said().startswith("finished")


class Flare(Stamps):
    """Server and clients of the proof-of-concept mode."""

    def __init__(self, python: Path, folder: Path, participants: int) -> None:
        super().__init__(python, folder, participants)
        self.env |= {"NVFLARE_POC_WORKSPACE": str(folder / "poc"), "HOME": str(folder)}
        self.job = ""

    def start(self, rounds: int, values: int) -> None:
        """Provision, start all processes, submit the job."""
        self.run(
            str(self.bin / "python"), "flare_job.py", str(self.folder), str(self.participants),
            str(rounds), str(values), str(self.file), cwd=HERE / "others",
        )  # fmt: skip
        self.run("nvflare", "poc", "prepare", "-n", str(self.participants), "--force")
        self.run("nvflare", "poc", "start", "--timeout", "120")
        told = self.run("nvflare", "job", "submit", "-j", str(self.folder / "jobs" / "rounds"))
        self.job = told.rpartition("job_id:")[2].split()[0]

    def _pids(self, word: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if str(self.folder / "poc") in line and word in line:
                        found.append(int(entry.name))
        return found

    def kill_server(self) -> None:
        """The server, and the process of the job on it."""
        pids = self._pids("fed.app.server")
        if not pids:
            raise SystemExit("no FLARE server to kill")
        for pid in pids:
            kill_tree(pid)

    def restart_server(self) -> None:
        """Start the server again."""
        self.run("nvflare", "poc", "start", "-p", "server", "--no-wait")

    def said(self) -> str:
        """The job's status."""
        lines = self.run("nvflare", "job", "list").splitlines()
        return next(line.split()[2] for line in lines if line.startswith(self.job))

    def over(self) -> bool:
        """Whether FLARE calls it finished."""
        with contextlib.suppress(SystemExit, StopIteration):  # it may still be starting
            return self.said().startswith("FINISHED")
        return False

    def stop(self) -> None:
        """End every process of this workspace."""
        for pid in self._pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Ours:
    """The real coordinator and participants' processes, over the given servers."""

    def __init__(
        self, place: Any, folder: Path, participants: int, codec: str, down: str = "whole"
    ) -> None:
        self.place, self.folder, self.codec, self.down = place, folder, codec, down
        self.sites = [f"{folder.name}-site-{n}" for n in range(1, participants + 1)]

    def start(self, rounds: int, values: int) -> None:
        """Accounts, kits, all processes."""
        os.environ["WIRE_WIDTH"] = str(values // 2_048)  # 128 tensors of rank 16
        from wire_federation import Federation, start_federation

        self.federation = Federation(
            self.place, self.folder, self.folder.name, self.sites, rounds, self.codec, self.down
        )
        self.federation.__enter__()
        start_federation(self.federation)

    def stamps(self) -> list[float]:
        """When each round was opened, and the run finished, by the ledger."""
        from shared.errors import RunNotFoundError

        with contextlib.suppress(RunNotFoundError):
            return self.federation.stamps()
        return []

    def kill_server(self) -> None:
        """The coordinator."""
        process = self.federation.processes["coordinator"]
        process.kill()
        process.wait()

    def restart_server(self) -> None:
        """Start it again."""
        self.federation.start_coordinator()

    def said(self) -> str:
        """What ``runs list`` says."""
        from coordinator.runs.inspection import summarise_runs

        (run,) = summarise_runs(self.place.store(self.federation.name))
        return run.state

    def over(self) -> bool:
        """Whether the run is finished."""
        return not self.federation.alive()

    def stop(self) -> None:
        """End every process."""
        self.federation.__exit__()


def seconds(system: System, rounds: int, values: int) -> str:
    """Median of a round's seconds, the first left out; or how far it came in the time it had."""
    try:
        system.start(rounds, values)
        limit = rounds * START_SECONDS
        if not wait_until(lambda: len(system.stamps()) >= rounds, limit):
            return f"{len(system.stamps())} of {rounds} rounds in {limit:.0f} s"
        times = system.stamps()[1:rounds]
        return f"{statistics.median(b - a for a, b in itertools.pairwise(times)):.1f}"
    finally:
        system.stop()


def killed(system: System, patience: float) -> str:
    """Which round the run reached after its server was killed, and what the system says."""
    try:
        system.start(KILLED_ROUNDS, SMALL_VALUES)
        if not wait_until(lambda: len(system.stamps()) >= KILLED_IN_ROUND, 5 * START_SECONDS):
            raise SystemExit(f"{type(system).__name__}: never began round {KILLED_IN_ROUND}")
        before = len(system.stamps())
        system.kill_server()
        system.restart_server()
        begun = time.monotonic()
        wait_until(system.over, patience)
        after = len(system.stamps())
        reached = min(after, KILLED_ROUNDS)
        waited = time.monotonic() - begun
        return (
            f"killed in round {before}, reached {reached} of {KILLED_ROUNDS}; "
            f'after {waited:.0f} s it says "{system.said()}"'
        )
    finally:
        system.stop()


def main() -> None:
    """Measure each system, print one table."""
    parser = argparse.ArgumentParser(description="Flower, NVIDIA FLARE and this, side by side.")
    parser.add_argument("--flower", type=Path, help="interpreter with flwr")
    parser.add_argument("--flare", type=Path, help="interpreter with nvflare")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--values", type=int, default=16_777_216, help="67 MB in fp32")
    parser.add_argument("--patience", type=float, default=180.0)
    parser.add_argument("--only", choices=("seconds", "killed"))
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from wire_servers import add_server_options, end_on_signals, servers

    add_server_options(parser)
    given = parser.parse_args()
    end_on_signals()
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(dir=given.dir, prefix="others-")
        folder = Path(stack.enter_context(temporary))
        place = stack.enter_context(servers(given, folder))
        count = itertools.count()
        k = given.participants

        def fresh() -> Path:
            return folder / f"system-{next(count)}"

        makers: dict[str, Callable[[bool], System]] = {
            "ours, fp32": lambda _: Ours(place, fresh(), k, "fp32"),
            "ours, int8": lambda _: Ours(place, fresh(), k, "int8"),
            "ours, int4 both ways": lambda _: Ours(place, fresh(), k, "int4", "int4"),
        }
        if given.flare:
            makers["NVIDIA FLARE"] = lambda _: Flare(given.flare, fresh(), k)
        if given.flower:
            makers["Flower"] = lambda durable: Flower(given.flower, fresh(), k, durable=durable)
        print("| system | seconds a round | its server is killed |")
        print("|---|---:|---|")
        for name, make in makers.items():
            took, fate = "", ""
            if given.only != "killed":
                took = seconds(make(False), given.rounds + 1, given.values)
            again = name.startswith("ours") and name != "ours, fp32"  # a codec changes nothing here
            if given.only != "seconds" and not again:
                fate = killed(make(True), given.patience)
            print(f"| {name} | {took} | {fate} |", flush=True)


if __name__ == "__main__":
    main()
