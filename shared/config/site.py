"""``site.toml``: one site's own affairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.config.reading import load
from shared.config.section import Section
from shared.config.servers import BrokerSection, SiteStoreSection, SiteTrustSection
from shared.config.site_privacy import SitePrivacySection
from shared.config.values import Name, Positive
from shared.trust.keys import PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class SiteSection(Section):
    """Who this site is and where it keeps the current round, and how often."""

    name: Name
    """One of the run's participants."""
    workspace: str = "workspace"
    """Folder of the current round, relative to this file. ``demo`` and ``simulate`` do not read it:
    they use ``sites/NAME`` beside ``federation.toml``.
    """
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """While a round is trained, write adapter and optimiser state to the workspace this often, in
    seconds. A kill costs at most what was trained since.
    """


class DataSection(Section):
    """The site's private text and how to read it.

    Exactly one mapping: ``messages`` (a column holding a list of ``{role, content}``), ``prompt``
    and ``answer``, or ``text``. ``group`` names the column that must not be split between train
    and held-out.
    """

    path: Annotated[str, Field(min_length=1)]
    """The text, relative to this file."""
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets"] = "auto"
    """What kind of file it is; by default told from its name."""
    messages: str | None = None
    """Column with a list of ``{role, content}``."""
    prompt: str | None = None
    """Column of the prompt; needs ``answer``."""
    answer: str | None = None
    """Column of the answer; needs ``prompt``."""
    text: str | None = None
    """Column of plain text."""
    group: str | None = None
    """Column whose equal values stay on one side of the split."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the text that is never trained on."""
    max_held_out: Positive | None = None
    """At most this many held-out examples are measured."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of the split. It is the site's own, not the run's."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """One way to read the text."""
        return (self._one_mapping,)

    def _one_mapping(self) -> Iterator[str]:
        if (self.prompt is None) != (self.answer is None):
            yield "prompt and answer go together; give both column names"
        asked = self.answer if self.prompt is None else self.prompt
        columns = {"messages": self.messages, "prompt": asked, "text": self.text}
        kinds = [kind for kind, column in columns.items() if column is not None]
        if len(kinds) != 1:
            yield (
                "give exactly one of: messages; prompt and answer; text "
                f"(got {', '.join(kinds) or 'none'})"
            )


class DeviceSection(Section):
    """Where this site trains. ``auto``: the GPU when there is one."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. In a simulation it must be the same at every site."""


class AcceptSection(Section):
    """What this site takes part in; a run outside of it is declined."""

    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Base models this site trains, as the run names them; a relative path is relative to this
    file.
    """
    runs: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Runs it takes part in."""
    max_rank: Positive | None = None
    """Largest r of an adapter."""
    max_steps: Positive | None = None
    """Most optimiser steps in a round; epochs are counted in this site's text."""
    max_rounds: Positive | None = None
    """Most rounds of a run, with every extension."""
    min_participants: Positive | None = None
    """Fewest participants of a run, this site among them."""
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the layers that may hold an adapter (their last part). Without it: all linear layers
    of attention and MLP. Embeddings and head never may.
    """
    min_steps: Positive = 4
    """Fewer optimiser steps in a round: declined. One step is one gradient, from which text can be
    read.
    """
    min_examples: Positive = 16
    """Fewer different examples in a delta: declined, or it stays here."""
    min_batch: Positive = 4
    """Fewer examples in an optimiser step: declined."""
    min_answer_tokens: Positive = 8
    """A run that cuts answers shorter than this is declined."""
    min_held_out: Positive = 8
    """With fewer held-out examples no held-out loss leaves."""
    send_metrics: bool = True
    """false: no losses leave; deltas, counts (examples, tokens, steps) and seconds still do."""
    flora: bool = False
    """Whether it takes part in a run with ``averaging = "flora"``, which gives each site's own
    factors to all others.
    """
    gradients: bool = False
    """Whether it takes part in a run with ``averaging = "range-finder"``, in which it sends
    gradients of its text, each over all examples of a round, in place of trainings.
    """
    secure: bool = False
    """true: only runs with ``aggregation.secure``, whose coordinator learns the sum of all sites'
    deltas and nothing of this one's.
    """
    peers: dict[Name, PublicText] = Field(default_factory=dict)
    """What other sites sign with, as their operators read it out. With any: this site masks with
    those sites alone, and only under these keys.
    """
    approval: bool = False
    """true: each run waits until a person at the site says ``gradualdiff site approve RUN``."""
    modes: tuple[str, ...] = ()
    """Modes of other packages that it runs, as ``averaging.NAME`` or ``codecs.NAME``."""
    privacy: Literal["any", "required", "site"] = "any"
    """``"required"``: a run without ``[privacy]`` is declined, and one with ``unit = "site"`` that
    has no secure sum: what leaves the site has too little noise there. ``"site"``: one that does
    not protect the site as a whole is declined.
    """
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Most epsilon of everything that is trained on this text, in all runs together; what would go
    beyond is declined, or not trained.
    """

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A ceiling holds for what has noise."""
        return (self._ceiling_needs_privacy,)

    def _ceiling_needs_privacy(self) -> Iterator[str]:
        if self.max_epsilon is not None and self.privacy == "any":
            yield (
                'max_epsilon needs privacy = "required" or "site": a run without noise has no '
                "epsilon"
            )


class SiteConfig(Section):
    """A whole ``site.toml``."""

    site: SiteSection
    data: DataSection
    device: DeviceSection = DeviceSection()
    broker: BrokerSection | None = None
    store: SiteStoreSection | None = None
    trust: SiteTrustSection = SiteTrustSection()
    accept: AcceptSection = AcceptSection()
    privacy: SitePrivacySection = SitePrivacySection()


def load_site(path: Path) -> SiteConfig:
    """Read a ``site.toml``. Raises ConfigError naming every mistake in it."""
    return load(path, SiteConfig)
