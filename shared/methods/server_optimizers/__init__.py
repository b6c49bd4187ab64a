"""What becomes of a round's mean delta before the adapter takes it: one file per optimiser.

A new optimiser is a new file here that sets ``MODE``, or another package's: ``shared/modes.py``.
Settings, closing, verification and the model card ask that object and compare no name. ``plain`` is
what :class:`ServerOptimizer` itself says.

The mean delta D points downhill already (it is minus the pseudo-gradient), so every optimiser adds.
State is fp64, one row per moment, with the names of the adapter's tensors, and the bytes are the
same on any number of threads: separate numpy calls in a fixed order, value by value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from shared.config import FederationConfig, ServerSection

    Values = NDArray[np.float64]

# A delta's norm is at most 1e30 and fp32 ends at 3.4e38: what multiplies it must leave room, since
# a decision that is on record must be possible to carry out.
MOST_GROWTH: Final = 1e6
MOST_SCALE: Final = 1e7


class ServerOptimizer:
    """The paper's: the mean delta is added as it is. Formulas of the others: their own files."""

    rows: int = 0
    """Rows of state that survive from round to round; 0: the mean delta is added as it is."""

    takes: tuple[str, ...] = ()
    """Settings of ``[server]`` it has a use for, beside ``learning_rate``."""

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """Settings that this optimiser does not go with: field, expected, got, what to do."""
        yield from ()

    def begin(self, _section: ServerSection, state: Values, /) -> None:
        """Fill ``state`` (rows, values) as it is before the first round."""
        state.fill(0)

    def step(
        self, _section: ServerSection, _delta: Values, _state: Values, _room: Values, /
    ) -> None:
        """Turn ``_delta`` (values,) into the step and ``_state`` (rows, values) into the next one.

        In place, at most ``shared.tensors.arithmetic.BLOCK`` values at once, in several threads.
        ``_room``: (2, values), to spend.
        """
        raise NotImplementedError


def get_server_optimizer(name: str) -> ServerOptimizer:
    """The optimiser of this name. Raises ConfigError that lists the known ones."""
    return cast("ServerOptimizer", modes.get("server_optimizers", name))
