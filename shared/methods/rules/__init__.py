"""What is made of a round's deltas: one file in this folder per rule, found by its name.

A new rule is a new file here that sets ``MODE``, or another package's: ``shared/modes.py``.
Settings, closing, verification and the model card ask that object and compare no name. The weighted
mean is what :class:`Rule` itself says. The others withstand a bad delta.

The bytes must depend on nothing but the deltas: fp64, no BLAS, no order of arrival, no number of
threads. Deltas come in name order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from shared.config import AggregationSection
    from shared.methods.votes import Votes
    from shared.protocol.manifest import Manifest


class Rule:
    """The paper's: the mean of all deltas, by their weights. Any number of deltas is enough."""

    taken: str = "the weighted mean of the participants' deltas"
    """What the rule takes of the deltas, for the model card."""

    weighted_mean: bool = True
    """Whether it is the weighted mean of all deltas, so that averaging may join whole factors."""

    one_vote: bool = False
    """Whether each site has one vote in a round: equal weights, and no late deltas."""

    by_coordinate: bool = False
    """Whether :meth:`combine` joins the values of all deltas."""

    assumes_bad: bool = False
    """Whether it has a use for ``assumed_bad``."""

    def least(self, _section: AggregationSection, /) -> int:
        """With fewer deltas than this the rule withstands nothing, and a round does not close."""
        return 0

    def least_in_words(self, section: AggregationSection, /) -> str:
        """How that number comes about: ``2 x 1 + 3``."""
        return str(self.least(section))

    def combine(
        self,
        _section: AggregationSection,
        _rows: NDArray[np.float64],
        _result: NDArray[np.float64],
        /,
    ) -> None:
        """Where ``by_coordinate``: for each column of ``_rows`` one value, into ``_result``.

        ``_rows``: (deltas, values), scaled, and the rule's to overwrite. ``_result``: (values,).
        """
        raise NotImplementedError

    def left_out(
        self,
        _section: AggregationSection,
        _manifest: Manifest,
        _votes: Votes,
        _labels: Sequence[str],
        _threads: int,
        /,
    ) -> dict[str, str]:
        """Else: whom the rule leaves out as a whole, by label, and why; the others share equally.

        ``_labels``: the names of the votes. ``_threads``: how many may work.
        """
        return {}


def get_rule(name: str) -> Rule:
    """The rule of this name. Raises ConfigError that lists the known ones."""
    return cast("Rule", modes.get("rules", name))


def too_few(section: AggregationSection, count: int) -> str | None:
    """Why ``count`` deltas are not enough for the run's rule, in words; None if they are."""
    rule = get_rule(section.rule)
    least = rule.least(section)
    if count >= least:
        return None
    bad = f" and assumed_bad = {section.assumed_bad}" if rule.assumes_bad else ""
    return f'aggregation.rule = "{section.rule}"{bad} needs {least} deltas, got {count}'
