"""plain: the mean delta is the step (Algorithm 2 of arXiv:2506.19164)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.methods.server_optimizers import ServerOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.config import FederationConfig


class Plain(ServerOptimizer):
    """step = D."""

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """A learning rate would have no effect."""
        if config.server.learning_rate != 1:
            yield (
                'server.learning_rate: expected none with server.optimizer = "plain", which adds '
                f"the mean delta as it is, got {config.server.learning_rate}; to scale it use "
                'optimizer = "fedavgm" with momentum = 0.0'
            )


MODE = Plain()
