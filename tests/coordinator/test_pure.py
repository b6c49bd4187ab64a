"""The round machine loads nothing that computes tensors, stores, sends or waits."""

import subprocess
import sys

HEAVY = (
    "numpy",
    "minio",
    "pika",
    "shared.stores",
    "shared.brokers",
    "shared.tensors",
    "shared.log",
)


def test_the_round_machine_loads_neither_numpy_nor_a_store():
    """In a process of its own: here everything is loaded already."""
    code = "import sys, coordinator.round.machine; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ran.stdout.split()
    assert "coordinator.round.machine" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []
