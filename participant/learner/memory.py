"""How much memory this process needed at most since it was asked last."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Begin a new measurement; where the kernel allows it, else the process's whole peak counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size


def peak_bytes() -> dict[str, int]:
    """``resident``: of the process, ``gpu``: allocated on the first GPU, if there is one."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                found["resident"] = int(line.split()[1]) * 1024
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found
