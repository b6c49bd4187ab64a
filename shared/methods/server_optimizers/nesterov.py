"""nesterov (DiLoCo, arXiv:2311.08105): m = b m + D, step = lr (D + b m); m = 0 at first.

lr: ``learning_rate``, b: ``momentum``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.methods.server_optimizers.fedavgm import FedAvgM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig, ServerSection
    from shared.methods.server_optimizers import Values


class Nesterov(FedAvgM):
    """Momentum that looks ahead."""

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """Without momentum there is nothing ahead."""
        if config.server.momentum == 0:
            yield (
                'server.momentum: expected above 0 with server.optimizer = "nesterov", got 0; use '
                '"fedavgm"'
            )
        yield from super().misfits(config)

    def step(self, section: ServerSection, delta: Values, state: Values, room: Values, /) -> None:
        """As if the next round's delta were this one's."""
        momentum, ahead = state[0], room[0]
        np.multiply(momentum, section.momentum, out=momentum)
        np.add(momentum, delta, out=momentum)
        np.multiply(momentum, section.momentum, out=ahead)
        np.add(delta, ahead, out=delta)
        np.multiply(delta, section.learning_rate, out=delta)


MODE = Nesterov()
