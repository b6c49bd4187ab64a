"""``python -m tests.fuzz --inputs N [--seed S] [--targets T ...]``: N damaged inputs, shared out.

Prints inputs and inputs per second by target; a failing input is made shorter and printed as hex.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.fuzz.corpus import KEPT
from tests.fuzz.damage import damaged
from tests.fuzz.targets import Target, targets

if TYPE_CHECKING:
    from collections.abc import Sequence


def first_failure(
    target: Target, seed: str, count: int, kept: Sequence[bytes] = ()
) -> bytes | None:
    """The first that does not hold of those kept and ``count`` inputs from this seed."""
    for data in kept:
        if not target.holds(data):
            return data
    draw = Random(seed)
    for _ in range(count):
        data = damaged(draw, draw.choice(target.examples))
        if not target.holds(data):
            return data
    return None


def shorter(target: Target, data: bytes) -> bytes:
    """Leave out what may be left out while it still fails."""
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            less = data[:at] + data[at + size :]
            if target.holds(less):
                at += size
            else:
                data = less
        size //= 2
    return data


def say(line: str) -> None:
    """On standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Exit 1 when something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--targets", nargs="+", help="without: all")
    given = parser.parse_args()
    say(f"seed {given.seed}")
    warnings.simplefilter("error")  # as in the suite
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        all_targets = targets(Path(folder))
        if given.targets is not None:
            all_targets = {name: all_targets[name] for name in given.targets}
        shares = sum(target.share for target in all_targets.values())
        for name, target in all_targets.items():
            count, began = given.inputs * target.share // shares, time.monotonic()
            failure = first_failure(target, f"{given.seed} {name}", count, KEPT.get(name, ()))
            if failure is None:
                say(f"{name}: {count} inputs, {count / (time.monotonic() - began):.0f} a second")
            else:
                failed = 1
                say(f"{name}: failed on {shorter(target, failure).hex()}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
