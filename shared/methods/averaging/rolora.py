"""rolora (arXiv:2502.01755): B in odd rounds and A in even ones, so that each mean is exact.

B goes first, since the gradient of A is 0 while B is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.lora_factors import A, B, factors
from shared.methods.averaging import Averaging

if TYPE_CHECKING:
    from shared.protocol.manifest import Manifest


class Alternating(Averaging):
    """One factor a round."""

    factors_only = True
    renews = "trains the other factor in the next round"

    def trained_in(self, manifest: Manifest, number: int, /) -> Manifest:
        """B in odd rounds, A in even ones."""
        return factors(manifest, B if number % 2 == 1 else A, "rolora")


MODE = Alternating()
