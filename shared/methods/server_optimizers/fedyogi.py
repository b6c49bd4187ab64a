"""fedyogi (arXiv:2003.00295): fedadam with v = v - (1 - b2) D^2 sign(v - D^2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.methods.server_optimizers.fedadam import FedAdam

if TYPE_CHECKING:
    from shared.config import ServerSection
    from shared.methods.server_optimizers import Values


class FedYogi(FedAdam):
    """v changes by no more than D^2 asks for, so it falls slowly."""

    def note_squares(
        self, section: ServerSection, moment: Values, squares: Values, room: Values, /
    ) -> None:
        """Toward D^2."""
        np.subtract(moment, squares, out=room)
        np.sign(room, out=room)
        np.multiply(squares, 1.0 - section.second_momentum, out=squares)
        np.multiply(squares, room, out=squares)
        np.subtract(moment, squares, out=moment)


MODE = FedYogi()
