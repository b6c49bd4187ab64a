"""ffa (FFA-LoRA, arXiv:2403.12313): A stays as drawn, B is trained; the mean of B A is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.adapters import kind_of
from shared.methods.averaging import Averaging

if TYPE_CHECKING:
    from shared.protocol.manifest import Manifest


class FrozenA(Averaging):
    """B alone."""

    factors_only = True

    def trained_in(self, manifest: Manifest, _number: int, /) -> Manifest:
        """B, in every round."""
        return kind_of(manifest).only(manifest, "left", "ffa")


MODE = FrozenA()
