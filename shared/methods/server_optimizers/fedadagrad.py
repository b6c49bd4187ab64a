"""fedadagrad (arXiv:2003.00295): fedadam with v = v + D^2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.methods.server_optimizers.fedadam import FedAdam

if TYPE_CHECKING:
    from shared.config import ServerSection
    from shared.methods.server_optimizers import Values


class FedAdagrad(FedAdam):
    """v only grows."""

    takes = ("momentum", "tau")

    def note_squares(
        self, _section: ServerSection, moment: Values, squares: Values, _room: Values, /
    ) -> None:
        """The sum of all squares."""
        np.add(moment, squares, out=moment)


MODE = FedAdagrad()
