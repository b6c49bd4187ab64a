"""Flower's side of ``against_others.py``: a participant that adds the same noise every round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from flwr.app import Context

app = ClientApp()


@app.train()  # type: ignore[misc]
def train(message: Message, _context: Context) -> Message:
    """Nobody trains: the model it got, plus noise."""
    random = np.random.default_rng(1)
    arrays = [
        array + random.standard_normal(array.size, dtype=np.float32)
        for array in message.content["arrays"].to_numpy_ndarrays()
    ]
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)
