"""``[privacy]`` of ``site.toml``: the audit of a delta before it leaves the site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.config.section import Section
from shared.config.values import Positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Share = Annotated[float, Field(ge=0, le=1)]


class SitePrivacySection(Section):
    """What a delta is tested for before it leaves, and what is too much.

    The tests run at the site, on base model + adapter + own delta; only numbers leave.
    """

    audit: Literal["off", "report", "gate"] = "off"
    """``report``: each delta is tested, and the numbers go with it. ``gate``: a delta that crosses
    a limit is also kept here until an operator of the site releases or drops it.
    """
    records: Annotated[int, Field(ge=16)] = 256
    """At most this many training records, and as many held-out ones, are drawn for the tests."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Which ones. It is the site's own, not the run's."""
    global_adapter: bool = False
    """Test the global adapter, too, as each round begins with it and at the run's end. What that
    finds stays in this site's log.
    """
    patterns: tuple[Literal["email", "phone", "date", "id"], ...] = ("email", "phone", "date", "id")
    """Personal data that is looked for in reproduced text."""
    names_file: str | None = None
    """File of names or other words that are personal data, one a line, relative to this file."""
    hits_warn: Positive = 1
    """So many training records reproduced: warn."""
    hits_block: Positive = 3
    """So many, at more than twice the rate of held-out records: block."""
    personal_block: Positive = 1
    """So many reproduced records with personal data: block."""
    auc_warn: Share = 0.6
    """Membership told from the loss with a larger area under the ROC curve: warn."""
    auc_block: Share = 0.75
    """Block."""
    tpr_warn: Share = 0.1
    """A larger share of members found at 1 % false alarms: warn."""
    canaries: Annotated[int, Field(ge=0, le=10_000)] = 0
    """So many random records are made, of which a coin puts each into the training text or not, to
    bound epsilon from below. They are trained on: only for runs whose result is thrown away.
    """
    epsilon_block: Annotated[float, Field(gt=0)] | None = None
    """Lower bound of epsilon, from the canaries, above which a delta is blocked. In a run with
    differential privacy it need not be set: there it is what the delta itself declares.
    """

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Each warning at or below its block; a bound needs canaries."""
        return (self._in_order, self._needs_canaries)

    def _in_order(self) -> Iterator[str]:
        for name in ("hits", "auc"):
            warn, block = getattr(self, f"{name}_warn"), getattr(self, f"{name}_block")
            if warn > block:
                yield f"{name}_warn: expected at most {name}_block ({block:g}), got {warn:g}"

    def _needs_canaries(self) -> Iterator[str]:
        if self.epsilon_block is not None and not self.canaries:
            yield "epsilon_block: expected canaries to measure it with, got none; set canaries = 64"
