"""How surprising a token is to a model, and how surprising tokens are there in general."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_SPREAD = 1e-5  # of less, fp32 keeps nothing but its rounding


@dataclass(frozen=True)
class Surprises:
    """Of each scored token, float32 [n]: -log p in nats, and its deviation.

    Deviation: (log p - mean) / standard deviation, these of the log p of all tokens there, under p.
    """

    nats: NDArray[np.float32]
    deviations: NDArray[np.float32]


def surprises(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Both of them: float32 [2, n].

    ``logits``: float32 [n, vocabulary]; ``targets``: int64 [n]. The formula of the deviation is
    that of Min-K%++ (arXiv:2404.02936).
    """
    logs = torch.log_softmax(logits, -1)
    told = logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    shares = logs.exp()
    logs = logs.masked_fill(shares == 0, 0.0)  # of a token that a model forbids it is -inf
    mean = (shares * logs).sum(-1)
    spread = (shares * (logs - mean.unsqueeze(-1)).square()).sum(-1).sqrt()
    return torch.stack([-told, (told - mean) / spread.clamp(min=LEAST_SPREAD)])
