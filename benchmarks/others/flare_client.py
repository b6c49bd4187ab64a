"""NVIDIA FLARE's side of ``against_others.py``: a participant that adds the same noise every round.

Its first argument is the file where site-1 notes when each round begins.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import nvflare.client as flare

flare.init()
noise = np.random.default_rng(1)
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if flare.get_site_name() == "site-1":
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{model.current_round} {time.time()}\n")
    params = {
        name: np.asarray(value) + noise.standard_normal(np.shape(value), dtype=np.float32)
        for name, value in model.params.items()
    }
    flare.send(flare.FLModel(params=params))
