"""Seconds from a killed process's restart to its next useful effect, over the whole crash table.

Each row of ``tests/crash/table.py`` is a run of two sites and two rounds over a real RabbitMQ and a
real S3 server, in which one process is killed by SIGKILL at one named point and started again. The
clock runs from just before the new process is started to the first thing it does that moves the run
on: a record, an announcement or a word that the broker confirmed (ticks and greetings do not
count), a file in the store, an uploaded chunk, a committed round. Every row's end is checked as the
tests do; one that does not end in the undisturbed adapter ends the benchmark.

    python benchmarks/recovery_seconds.py [--rows REGEX] [--forked] [--json FILE] [--write-docs]

Processes are started as programs, so that Python's start and its imports (torch at a site) count;
``--forked`` leaves them out, and what is left is the protocol. The sites of most rows load no
model; those that do stand in a line of their own. Prints a Markdown table; ``--write-docs`` puts
it into docs/explanation/failure-model.md. The whole table takes
about a quarter of an hour on two cores, forked a few minutes. Needs Linux and RabbitMQ installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.crash.drill import Ground
    from tests.crash.table import Row

ROOT = Path(__file__).resolve().parent.parent


def measure(ground: Ground, row: Row) -> dict[str, Any]:
    """Carry one row out. ``seconds``: None where nothing was left for the new process to do."""
    from tests.crash.drill import SITES, carry_out, check

    with ground.drill(row) as drill:
        seconds = carry_out(drill)
        check(drill)
        committed = sum(drill.points(site).count("commit.renamed") for site in SITES)
        # A delta that the coordinator refused is made anew on purpose.
        again = 0 if row.fault == "spoilt" else max(0, committed - sum(map(len, row.counted)))
    return {**asdict(row), "seconds": seconds, "finished_rounds_trained_again": again}


def table(found: list[dict[str, Any]]) -> list[str]:
    """Median and worst for each role, as lines of Markdown."""
    lines = [
        "| restarted | kills | median s | worst s | worst at | finished rounds trained again |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for title, role, real in (
        ("coordinator", "coordinator", None),
        ("participant, no model to load", "participant", False),
        ("participant with a model", "participant", True),
    ):
        rows = [r for r in found if r["role"] == role and real in (None, r["real"])]
        timed = [r for r in rows if r["seconds"] is not None]
        if not timed:
            continue
        worst = max(timed, key=lambda r: r["seconds"])
        median = statistics.median(r["seconds"] for r in timed)
        again = sum(r["finished_rounds_trained_again"] for r in rows)
        lines.append(
            f"| {title} | {len(rows)} | {median:.2f} | {worst['seconds']:.2f} "
            f"| `{worst['point']}` | {again} |"
        )
    return lines


def main() -> None:
    """Run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", default="", help="only rows whose name has this in it")
    parser.add_argument("--forked", action="store_true", help="leave Python's start out")
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--write-docs", action="store_true", help="write the table into the docs")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # tests/ is not installed
    os.environ["PYTHONPATH"] = str(ROOT)
    from shared.log import configure
    from tests.crash.drill import Ground
    from tests.crash.table import ROWS
    from tests.servers.rabbitmq import RabbitServer
    from tests.servers.seaweedfs import SeaweedFS

    configure(level="error")
    rows = [row for row in ROWS if re.search(options.rows, row.name)]
    found = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        (folder / "rabbit").mkdir()
        rabbit = RabbitServer(folder / "rabbit")
        try:
            rabbit.start()
            with SeaweedFS(folder / "weed") as weed:
                ground = Ground(folder / "ground", rabbit, weed.server, forked=options.forked)
                for row in rows:
                    found.append(measure(ground, row))
                    print(f"{row.name}: {found[-1]['seconds']}", file=sys.stderr)
                ground.close()
        finally:
            if rabbit.process is not None:
                rabbit.stop()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    lines = table(found)
    print("\n".join(lines))
    if options.write_docs:
        from tests.chaos.report import write_block

        flags = "".join(f" --{f}" for f in ("forked",) if getattr(options, f))
        flags += f" --rows '{options.rows}'" if options.rows else ""
        command = f"`python benchmarks/recovery_seconds.py{flags}`:"
        write_block("recovery", "\n".join([command, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
