"""fedavgm (arXiv:1909.06335): m = b m + D, step = lr m; m = 0 before the first round.

lr: ``learning_rate``, b: ``momentum``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.methods.server_optimizers import MOST_GROWTH, ServerOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig, ServerSection
    from shared.methods.server_optimizers import Values


class FedAvgM(ServerOptimizer):
    """Momentum."""

    rows = 1
    takes = ("momentum",)

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """A rate by which a large delta would leave fp32 in the long run."""
        server = config.server
        if server.learning_rate / (1 - server.momentum) > MOST_GROWTH:
            yield (
                f"server.learning_rate: expected at most {MOST_GROWTH:g} / (1 - momentum), got "
                f"{server.learning_rate:g}: a large delta's step would leave fp32"
            )

    def step(self, section: ServerSection, delta: Values, state: Values, _room: Values, /) -> None:
        """What was moved by before is carried on with."""
        momentum = state[0]
        np.multiply(momentum, section.momentum, out=momentum)
        np.add(momentum, delta, out=momentum)
        np.multiply(momentum, section.learning_rate, out=delta)


MODE = FedAvgM()
