"""All tests of one delta, in a fixed order and on records drawn by a seed: the same numbers again.

Nothing is kept between two audits: one that a kill interrupts begins again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from participant.audit import membership
from participant.audit.binomial import upper_bound
from participant.audit.canaries import Canaries, epsilon_lower, guessed_rightly
from participant.audit.extraction import MOST_SUFFIX, cut_record, find_hits
from participant.audit.report import AuditReport, Finding
from participant.audit.verdict import judge
from participant.model.batches import by_length, scored_tokens
from shared.errors import InterruptedRunError
from shared.failpoints import failpoint
from shared.protocol.manifest import AuditFigures
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from participant.audit.extraction import Cut, Hit
    from participant.audit.patterns import Patterns
    from participant.data import SiteData, TokenisedExample
    from participant.model import LocalModel
    from participant.model.surprise import Surprises
    from shared.config import SitePrivacySection

AT_ONCE = 32  # rows that are continued together


@dataclass(frozen=True)
class Audit:
    """One delta's. ``tuned`` and ``base`` put the adapter with the delta, or none, into ``model``.

    ``place``: what the draw of records depends on beside the site's seed.
    """

    model: LocalModel
    tuned: Callable[[], None]
    base: Callable[[], None]
    data: SiteData
    settings: SitePrivacySection
    patterns: Patterns
    place: tuple[str | int, ...]
    should_stop: Callable[[], bool]
    report: Callable[[int, int], None] = lambda _done, _of: None
    canaries: Canaries = field(default_factory=Canaries)

    def run(self) -> AuditReport:
        """All tests. Raises InterruptedRunError when ``should_stop()`` turns true."""
        began = time.monotonic()
        hits, figures = self._extraction()
        failpoint("audit.extracted")
        self.report(1, 3)
        figures.update(self._membership())
        self.report(2, 3)
        figures.update(self._canaries())
        self.report(3, 3)
        seconds = round(time.monotonic() - began, 3)
        measured = AuditFigures(
            verdict="passed", seed=self.settings.seed, seconds=seconds, **figures
        )
        findings = tuple(
            Finding(
                index=hit.index,
                personal=tuple(sorted({found.kind for found in hit.personal})),
                text=hit.text,
            )
            for hit in hits
        )
        return AuditReport(figures=judge(measured, self.settings), findings=findings)

    def _extraction(self) -> tuple[list[Hit], dict[str, Any]]:
        drawn = self._draw(self.data.train, "records")
        hits, records = self._reproduced(self.data.train, drawn)
        count = sum(hit.is_long for hit in hits)
        figures: dict[str, Any] = {
            "records": records,
            "hits": count,
            "hits_upper": upper_bound(count, records) if records else 1.0,
            "personal": sum(bool(hit.personal) for hit in hits),
        }
        if count >= self.settings.hits_block:
            drawn = self._draw(self.data.held_out, "controls")
            others, controls = self._reproduced(self.data.held_out, drawn)
            figures["controls"] = controls
            figures["control_hits"] = sum(hit.is_long for hit in others)
        return hits, figures

    def _reproduced(
        self, side: Sequence[TokenisedExample], drawn: Sequence[int]
    ) -> tuple[list[Hit], int]:
        """The hits among the drawn records of one side, and how many records could be tried."""
        ends = self.model.end_tokens()

        def is_personal(cut: Cut) -> bool:
            return bool(self.patterns.find(self._decode(cut.suffix)))

        tried = (cut_record(index, side[index], ends, is_personal) for index in drawn)
        cuts = [cut for cut in tried if cut is not None]
        hits = find_hits(
            cuts,
            lambda rows: self._continued(self.tuned, rows),
            lambda rows: self._continued(self.base, rows),
            self._decode,
            self.patterns,
        )
        return hits, len(cuts)

    def _membership(self) -> dict[str, Any]:
        inside = self._draw(self.data.train, "members")
        outside = self._draw(self.data.held_out, "held out")
        if min(len(inside), len(outside)) < membership.LEAST:
            return {}
        members = [self.data.train[index] for index in inside]
        others = [self.data.held_out[index] for index in outside]
        gains, deviations = self._scores([*members, *others])
        figures: dict[str, Any] = {"members": len(members), "held_out": len(others)}
        for name, scores in (("", gains), ("_min_k", deviations)):
            first, second = scores[: len(members)], scores[len(members) :]
            figures[f"auc{name}"] = round(membership.area_under_curve(first, second), 6)
            if len(others) >= membership.LEAST_FOR_TPR:
                found = membership.found_at(first, second, membership.FALSE_ALARMS)
                figures[f"tpr{name}"] = found
        return figures

    def _canaries(self) -> dict[str, Any]:
        inside, outside = self.canaries.inside, self.canaries.outside
        count = len(inside) + len(outside)
        if not count:
            return {}
        scores, _ = self._scores([*inside, *outside])
        right = guessed_rightly(scores[: len(inside)], scores[len(inside) :])
        bound = round(epsilon_lower(right, count), 6)
        return {"canaries": count, "canaries_right": right, "epsilon_lower": bound}

    def _scores(self, examples: Sequence[TokenisedExample]) -> tuple[list[float], list[float]]:
        """By example: loss of the base less the tuned model's, nats a token; Min-K%++ of it."""
        base, tuned = self._read(self.base, examples), self._read(self.tuned, examples)
        gains = [float(b.nats.mean() - t.nats.mean()) for b, t in zip(base, tuned, strict=True)]
        return gains, [membership.min_k(one.deviations) for one in tuned]

    def _read(
        self, load: Callable[[], None], examples: Sequence[TokenisedExample]
    ) -> list[Surprises]:
        load()
        read = []
        for batch in by_length(examples):
            self._check_stop()
            read += self.model.answer_surprises(batch)
        # Batches come in the order of this sort, which keeps equal lengths as they were.
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
        found = dict(zip(order, read, strict=True))
        return [found[place] for place in range(len(examples))]

    def _continued(
        self, load: Callable[[], None], rows: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        if not rows:
            return []
        load()
        return self.model.continuations(rows, MOST_SUFFIX, AT_ONCE, self.should_stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.model.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _draw(self, side: Sequence[TokenisedExample], what: str) -> list[int]:
        """Places of the records to look at, in order; canaries are none of them."""
        made = set(self.canaries.inside)
        usable = [at for at, one in enumerate(side) if one not in made and scored_tokens(one)]
        count = min(self.settings.records, len(usable))
        key = derive_seed(self.settings.seed, what, *self.place)
        drawn = np.random.Generator(np.random.Philox(key=key)).choice(
            len(usable), count, replace=False
        )
        return sorted(usable[at] for at in drawn)

    def _check_stop(self) -> None:
        if self.should_stop():
            raise InterruptedRunError("the audit of a delta was stopped; it begins again")
