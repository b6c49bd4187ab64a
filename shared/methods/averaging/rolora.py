"""rolora (arXiv:2502.01755): B in odd rounds and A in even ones, so that each mean is exact.

B goes first, since the gradient of A is 0 while B is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.adapters import kind_of
from shared.methods.averaging import Averaging

if TYPE_CHECKING:
    from shared.adapters import Side
    from shared.protocol.manifest import Manifest


class Alternating(Averaging):
    """One factor a round."""

    factors_only = True
    renews = "trains the other factor in the next round"

    def trained_in(self, manifest: Manifest, number: int, /) -> Manifest:
        """B in odd rounds, A in even ones."""
        side: Side = "left" if number % 2 == 1 else "right"
        return kind_of(manifest).only(manifest, side, "rolora")


MODE = Alternating()
