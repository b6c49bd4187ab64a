"""Flower's side of ``against_others.py``: FedAvg that notes when each round begins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

TENSORS = 128
FEW_TENSORS = 4  # of the small model: each is a row of the database, which locks when many come

app = ServerApp()


class StampedFedAvg(FedAvg):  # type: ignore[misc]
    """``stamps``: a file with a line for each round."""

    stamps: Path

    def configure_train(self, server_round: int, *others: Any) -> Any:
        """Note the time, then do as FedAvg does."""
        with self.stamps.open("a") as file:
            file.write(f"{server_round} {time.time()}\n")
        return super().configure_train(server_round, *others)


@app.main()  # type: ignore[misc]
def main(grid: Grid, context: Context) -> None:
    """All participants in every round; nobody evaluates."""
    settings = context.run_config
    participants = int(settings["participants"])
    strategy = StampedFedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=participants,
        min_evaluate_nodes=0,
        min_available_nodes=participants,
    )
    strategy.stamps = Path(str(settings["stamps"]))
    values = int(settings["values"])
    count = TENSORS if values > 1_000_000 else FEW_TENSORS
    first = ArrayRecord([np.zeros(values // count, np.float32) for _ in range(count)])
    strategy.start(grid=grid, initial_arrays=first, num_rounds=int(settings["rounds"]))
    with strategy.stamps.open("a") as file:
        file.write(f"end {time.time()}\n")
