"""FedProx (arXiv:1812.06127): local training is held near the adapter that the round began with.

The local objective gets mu/2 x ||theta - A(t)||^2; here is its gradient, mu x (theta - A(t)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray


class ProximalTerm:
    """Holds one copy of the source adapter on the parameters' device (640 MB at 7B and r = 64)."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        source: Callable[[str], NDArray[Any]],
        mu: float,
    ) -> None:
        """``source(name)`` is A(t), float32 of the parameter's shape; it is not called again."""
        self._mu = mu
        self._pairs = [
            (parameter, torch.from_numpy(source(name).copy()).to(parameter.device))
            for name, parameter in parameters.items()
        ]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add mu x (theta - A(t)) to every gradient, one tensor at a time.

        A parameter without a gradient is not trained, and so still at its source.
        """
        for parameter, source in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - source, alpha=self._mu)
