"""The long storm, by hand: ``python -m tests.chaos --seed N --faults 200 [--write-docs]``."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

from shared.log import configure
from tests.chaos.report import markdown, write_block
from tests.chaos.storm import ChaosError, storm


def main() -> int:
    """0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--faults", type=int, default=200, help="how many are to fire")
    parser.add_argument("--report", type=Path, help="write the table there (Markdown)")
    parser.add_argument(
        "--write-docs", action="store_true", help="put it into docs/explanation/failure-model.md"
    )
    parser.add_argument("--dir", type=Path, help="keep servers' data and logs there (a new folder)")
    asked = parser.parse_args()
    configure(level="critical")  # the undisturbed runs in this process
    with tempfile.TemporaryDirectory(prefix="gradualdiff-chaos-") as temporary:
        folder = asked.dir or Path(temporary) / "stand"
        try:
            tally = storm(folder, asked.seed, asked.faults)
        except ChaosError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    table = markdown(tally)
    sys.stdout.write(table)
    if asked.report:
        asked.report.write_text(table)
    if asked.write_docs:
        write_block("chaos", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
