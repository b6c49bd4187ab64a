"""fedadam (arXiv:2003.00295): m = b m + (1 - b) D, step = lr m / (sqrt(v) + tau).

Algorithm 2 of that paper, v = b2 v + (1 - b2) D^2. Before the first round m = 0 and v = tau^2: it
asks for v >= tau^2 at first and has no bias correction. lr: ``learning_rate``, b: ``momentum``, b2:
``second_momentum``. Its other two optimisers differ in v alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.methods.server_optimizers import MOST_SCALE, ServerOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig, ServerSection
    from shared.methods.server_optimizers import Values


class FedAdam(ServerOptimizer):
    """Each value's step is scaled by its own past."""

    rows = 2
    takes: tuple[str, ...] = ("momentum", "second_momentum", "tau")

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """Rates with which values jump, or leave fp32."""
        server = config.server
        if server.learning_rate >= 1:
            yield (
                "server.learning_rate: expected below 1 with server.optimizer = "
                f'"{server.optimizer}", got {server.learning_rate:g}: each value moves by about so '
                "much in a round, however small the deltas are; begin with 0.01"
            )
        if server.learning_rate / server.tau > MOST_SCALE:
            yield (
                f"server.tau: expected at least learning_rate / {MOST_SCALE:g}, got "
                f"{server.tau:g}: a large delta's step would leave fp32"
            )

    def begin(self, section: ServerSection, state: Values, /) -> None:
        """No estimate is below tau^2 then."""
        state[0] = 0.0
        state[1] = section.tau * section.tau

    def step(self, section: ServerSection, delta: Values, state: Values, room: Values, /) -> None:
        """Both moments, then their quotient."""
        momentum, moment, squares = state[0], state[1], room[0]
        np.multiply(delta, delta, out=squares)
        np.multiply(delta, 1.0 - section.momentum, out=delta)
        np.multiply(momentum, section.momentum, out=momentum)
        np.add(momentum, delta, out=momentum)
        self.note_squares(section, moment, squares, room[1])
        size = np.sqrt(moment, out=squares)
        np.add(size, section.tau, out=size)
        np.multiply(momentum, section.learning_rate, out=delta)
        np.divide(delta, size, out=delta)

    def note_squares(
        self, section: ServerSection, moment: Values, squares: Values, _room: Values, /
    ) -> None:
        """Update v, ``moment``, by D^2, ``squares``; that and ``_room`` may be spent."""
        np.multiply(moment, section.second_momentum, out=moment)
        np.multiply(squares, 1.0 - section.second_momentum, out=squares)
        np.add(moment, squares, out=moment)


MODE = FedAdam()
