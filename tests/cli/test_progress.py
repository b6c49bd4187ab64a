"""What a run in one process says where no terminal is."""

from __future__ import annotations

import io
import re

from rich.console import Console

from gradualdiff.cli.progress import Lines
from gradualdiff.events import RunMoved
from tests import federations


def test_off_a_terminal_each_round_is_one_line_with_its_losses(tmp_path):
    """Held out before it and in training; no count of steps or examples."""
    out = io.StringIO()
    lines = Lines(Console(file=out, width=80))
    config = federations.config(rounds=2)
    state = federations.run(
        config, tmp_path, moved=lambda state: lines.moved(RunMoved.of(state)), report=lines.report
    )
    told = [line.partition("] ")[2] for line in out.getvalue().splitlines()]
    assert [line.partition(",")[0].partition(":")[0] for line in told] == [
        f"round {number} of 2 is closed" for number in range(3)
    ]
    before = [f"{loss:.4f}" for loss in state.held_out]
    assert [re.findall(r"held-out loss before it ([0-9.]+)", line) for line in told[1:]] == [
        [loss] for loss in before
    ]
    assert all("training loss at its end 1.0000" in line for line in told[1:])
    assert state.adapter_sha[:12] in told[-1]
