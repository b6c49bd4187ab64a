"""``site.toml``: one site's own affairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.config.reading import load
from shared.config.section import Section
from shared.config.servers import BrokerSection, SiteStoreSection
from shared.config.values import Name, Positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class SiteSection(Section):
    """Who this site is and where it keeps the current round, and how often."""

    name: Name
    workspace: str = "workspace"
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0


class DataSection(Section):
    """The site's private text and how to read it.

    Exactly one mapping: ``messages`` (a column holding a list of ``{role, content}``), ``prompt``
    and ``answer``, or ``text``. ``group`` names the column that must not be split between train
    and held-out.
    """

    path: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets"] = "auto"
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    group: str | None = None
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_held_out: Positive | None = None
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 1

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """One way to read the text."""
        return (self._one_mapping,)

    def _one_mapping(self) -> Iterator[str]:
        if (self.prompt is None) != (self.answer is None):
            yield "prompt and answer go together; give both column names"
            return
        kinds = [k for k in ("messages", "prompt", "text") if getattr(self, k) is not None]
        if len(kinds) != 1:
            yield (
                "give exactly one of: messages; prompt and answer; text "
                f"(got {', '.join(kinds) or 'none'})"
            )


class DeviceSection(Section):
    """Where this site trains. ``auto``: the GPU when there is one."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"


class AcceptSection(Section):
    """What this site takes part in; a run outside of it is declined.

    ``max_steps``: local optimiser steps in a round. ``min_participants``: of the run as announced.
    ``modules``: names of layers that may hold an adapter; embeddings and head never may. From
    ``min_steps`` to ``min_answer_tokens``: a delta of fewer steps or examples gives its text away.
    ``send_metrics``: false: no losses leave; deltas, counts (examples, tokens, steps) and seconds
    still do.
    ``flora``: whether its own factors may be given to all other sites, as that averaging does.
    """

    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    runs: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    max_rank: Positive | None = None
    max_steps: Positive | None = None
    max_rounds: Positive | None = None
    min_participants: Positive | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    min_steps: Positive = 4
    min_examples: Positive = 16
    min_batch: Positive = 4
    min_answer_tokens: Positive = 8
    min_held_out: Positive = 8
    send_metrics: bool = True
    flora: bool = False


class SiteConfig(Section):
    """A whole ``site.toml``."""

    site: SiteSection
    data: DataSection
    device: DeviceSection = DeviceSection()
    broker: BrokerSection | None = None
    store: SiteStoreSection | None = None
    accept: AcceptSection = AcceptSection()


def load_site(path: Path) -> SiteConfig:
    """Read a ``site.toml``. Raises ConfigError naming every mistake in it."""
    return load(path, SiteConfig)
