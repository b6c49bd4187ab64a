"""What a round costs over a real RabbitMQ and a real S3 server, beside moving the same bytes bare.

One coordinator and K participants, on loopback, each a process of its own up to eight; more share
eight processes, each with its own threads and connection. Nobody trains: a
participant writes the same random values every round (67 MB of fp32 adapter in 128 tensors; with
``--shape llama-2-7b-r64`` 640 MB in 448), which the product encodes, hashes, syncs, uploads,
checks, joins, adds up and stores. A round's seconds are from its ``opened`` record to the next
round's (to ``finished`` for the last); the first round, which waits for everybody, stands apart.
Three floors are measured in turns with the federation:

- ``sdk``: as many processes and threads with the bare minio SDK each get the adapter (with
  ``--down CODEC`` as many bytes as its update has) and put as many bytes as a delta of that codec
  has, all at once, from and into memory; then numpy's mean of K fp32 arrays.
- ``read``: the same, and what no coordinator that checks can leave out: one process gets the K
  uploads back, one after another, and puts the mean; the bare SDK and memory again.
- ``tcp``: the bytes of ``sdk`` through K loopback connections, K processes at the other ends.

    python benchmarks/round_over_the_wire.py [--codecs fp32 int8] [--rounds 4] [--participants 5]
        [--shape llama-2-7b-r64] [--down int4]
    python benchmarks/round_over_the_wire.py --table [--codecs int8] [--rounds 4]

The second prints a Markdown table: 5, 50 and 500 participants with an adapter of 0.5 MB, then five
with 67 and 640 MB; each row from servers of its own. ``--table 5 50`` leaves out the 500.

No floor has what else the product adds by intent: encoding, checks, records, files synced. Starts
its own servers through ``tests/servers`` unless they are named. Needs Linux, some 8 GB of disk and
RabbitMQ installed. Aims: within 1.5x of ``sdk``; the coordinator's peak memory below 300 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wire_federation import (
    SHAPE,
    SHAPES,
    Federation,
    run_federation,
    shared_out,
    wire_manifest,
)
from wire_floors import Floor
from wire_servers import add_server_options, end_on_signals, servers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wire_servers import Servers

TABLE = (5, 50, 500)  # participants
WHOLE = "whole"


def measure(place: Servers, folder: Path, codec: str, floor: Floor, given: Any) -> dict[str, float]:
    """Floors, the federation, floors again; print what came. What a row of the table says."""
    sites = [f"{codec}-{number}" for number in range(given.participants)]
    size = encoded_size(codec)
    floor.sizes(size, None if given.down == WHOLE else encoded_size(given.down))
    sdk: list[float] = []
    read: list[float] = []
    tcp: list[float] = []
    floor_cpu = {"sdk": Counter[str](), "read, without sdk's": Counter[str]()}

    def looked() -> dict[str, float]:
        return {**place.cpu_seconds(), "clients": floor.cpu_seconds() + time.process_time()}

    def floors() -> None:
        for _ in range(given.floors):
            looks = [looked()]
            sdk.append(floor.sdk())
            looks.append(looked())
            read.append(sdk[-1] + floor.read())
            looks.append(looked())
            tcp.append(floor.tcp())
            for which, (before, after) in zip(floor_cpu, itertools.pairwise(looks), strict=True):
                floor_cpu[which].update(spent(before, after, 2 * given.floors))

    floors()
    federation = Federation(
        place, folder / codec, f"wire-{codec}", sites, given.rounds, codec, given.down
    )
    with federation:
        before = place.cpu_seconds()
        run_federation(federation)
        cpu = spent(before, place.cpu_seconds(), given.rounds)
        seconds = federation.round_seconds()
        coordinator = federation.phases("coordinator")
        watches = [federation.phases(names[0]) for names in shared_out(sites)]
        if given.keep_logs:
            for log in federation.folder.glob("*.log"):
                (given.keep_logs / f"{codec}-{log.name}").write_bytes(log.read_bytes())
    floors()
    later = seconds[1:] or seconds
    figure = statistics.median(later)
    print(f"codec {codec}: {len(sites)} deltas of {size / 1e6:.1f} MB a round", flush=True)
    print(f"  round {figure:6.2f} s  of {listed(later)}, the first {seconds[0]:.2f}")
    for name, values in (("sdk", sdk), ("read", read), ("tcp", tcp)):
        floor_seconds = statistics.median(values)
        print(
            f"  {name:<5} {floor_seconds:6.2f} s  of {listed(values)}   "
            f"round / {name} = {figure / floor_seconds:.2f}"
        )
    print(
        f"  coordinator's memory: peak {coordinator.pop('peak_rss_mb'):.0f} MB, of it not mapped "
        f"from files {coordinator.pop('peak_anonymous_mb'):.0f} MB"
    )
    count = max(len(seconds) - 1, 1)
    cpu["coordinator"] = coordinator.pop("cpu_seconds") / count
    cpu["sites"] = sum(watch.pop("cpu_seconds") for watch in watches) / count
    print(f"  processor seconds a round: {told(cpu)}")
    for which, used in floor_cpu.items():
        print(f"  processor seconds of the floor {which}: {told(used)}")
    mean = Counter[str]()
    for watch in watches:
        mean.update({phase: value / len(sites) for phase, value in watch.items()})
    print(f"  a site's seconds a round:        {told(mean, count)}")
    print(f"  the coordinator's, one thread:   {told(Counter(coordinator), count)}", flush=True)
    return {"round": figure, "sdk": statistics.median(sdk), "delta": size / 1e6, **cpu}


def encoded_size(codec: str) -> int:
    """Bytes of the adapter's values as a codec writes them."""
    from shared.tensors.codecs import get_codec

    layouts = [get_codec(codec).layout(spec) for spec in wire_manifest().tensors]
    return sum(part.size_bytes for part in itertools.chain(*layouts))


def print_table(given: argparse.Namespace) -> None:
    """A row for each number of participants, and for each size of the adapter.

    What else is measured goes to standard error.
    """
    told_by = ("coordinator", "sites", "store", "broker")
    head = ("participants", "shape", "codec", "a delta", "a round", "sdk", "round / sdk", *told_by)
    print(f"| {' | '.join(head)} |\n|---:|---|---|{'---:|' * (len(head) - 3)}", flush=True)
    rows = [(number, "small") for number in given.table or TABLE]
    for participants, shape in (*rows, (5, "square"), (5, "llama-2-7b-r64")):
        with tempfile.TemporaryDirectory(prefix="row-") as folder:
            file = Path(folder) / "row.json"
            options = {"participants": participants, "rounds": given.rounds, "floors": given.floors}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            subprocess.run(
                [sys.executable, __file__, *words, "--shape", shape, "--to", str(file), "--codecs",
                 *given.codecs],
                check=True, stdout=sys.stderr,
            )  # fmt: skip
            for codec, row in json.loads(file.read_text(encoding="utf-8")).items():
                cells = [
                    str(participants), shape, codec, f"{row['delta']:.1f} MB",
                    f"{row['round']:.2f} s", f"{row['sdk']:.2f} s",
                    f"{row['round'] / row['sdk']:.2f}", *(f"{row[who]:.2f}" for who in told_by),
                ]  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


def spent(before: dict[str, float], after: dict[str, float], by: int) -> Counter[str]:
    """Processor seconds between two looks, divided."""
    return Counter({name: (after[name] - before[name]) / by for name in after})


def listed(values: Sequence[float]) -> str:
    """Seconds, for a line of text."""
    return " ".join(f"{value:.2f}" for value in values)


def told(values: Counter[str], by: int = 1) -> str:
    """Phases, the longest first."""
    return ", ".join(f"{phase} {value / by:.2f}" for phase, value in values.most_common())


def main() -> None:
    """Start the servers, measure each codec, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Seconds of a round over RabbitMQ and S3.")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--down", default=WHOLE, help="codec.down of the run")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE)
    parser.add_argument("--floors", type=int, default=2, help="of each kind, before and after")
    parser.add_argument("--table", nargs="*", type=int, default=None, metavar="PARTICIPANTS")
    parser.add_argument("--to", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--keep-logs", type=Path, default=None, help="copy the logs here")
    add_server_options(parser)
    given = parser.parse_args()
    if given.table is not None:
        print_table(given)
        return
    if given.shape != SHAPE:  # read once, by the file that has the shapes
        os.environ["WIRE_SHAPE"] = given.shape
        os.execv(sys.executable, [sys.executable, *sys.argv])
    end_on_signals()
    if given.dir is not None:
        given.dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=given.dir, prefix="wire-"))
        place = stack.enter_context(servers(given, Path(name)))
        floor = stack.enter_context(Floor(place, given.participants))
        rows = {codec: measure(place, Path(name), codec, floor, given) for codec in given.codecs}
    if given.to is not None:
        given.to.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
