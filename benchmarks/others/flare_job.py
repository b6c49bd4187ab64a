"""NVIDIA FLARE's side of ``against_others.py``: exports the job.

python flare_job.py FOLDER PARTICIPANTS ROUNDS VALUES STAMPS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

folder, participants, rounds, values, stamps = sys.argv[1:]
start = Path(folder) / "start.npy"
np.save(start, np.zeros(int(values), np.float32))
NumpyFedAvgRecipe(
    name="rounds",
    initial_ckpt=str(start),
    min_clients=int(participants),
    num_rounds=int(rounds),
    train_script="flare_client.py",  # looked up beside this file, where it is run
    train_args=stamps,
).export(str(Path(folder) / "jobs"))
