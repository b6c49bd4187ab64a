"""How far this site is, for people who watch: the newest state only, made when asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shared.protocol.events import AWAITS_APPROVAL, TrainingProgressed

if TYPE_CHECKING:
    from collections.abc import Callable

    from participant.handlers import Participant
    from participant.learner.port import Progress


class Reporter:
    """Takes every report of the working thread; gives the newest to the listening one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.participant: Participant | None = None
        self._newest: TrainingProgressed | None = None
        self._activity: tuple[str, int, str] | None = None
        self._activity_began = 0.0
        self._last_report = clock()
        self._held_since: dict[str, float] = {}
        self._turn = 0

    def report(self, site: str, round_number: int | None, progress: Progress) -> None:
        """The working thread's side."""
        del site
        if self.participant is None or self.participant.in_hand is None:
            return
        in_hand, meter = self.participant.in_hand, self.participant.meter
        now = self._clock()
        activity = (in_hand.run, round_number or 0, progress.activity)
        if activity != self._activity:
            # The first report comes after the first step: it began when the one before ended.
            self._activity, self._activity_began = activity, self._last_report
        self._last_report = now
        seconds = max(now - self._activity_began, 0.0) + progress.seconds_before
        rate = progress.tokens / seconds if progress.tokens and seconds > 0 else None
        self._newest = TrainingProgressed(
            run=in_hand.run,
            round=round_number or 0,
            activity=progress.activity,
            step=progress.done,
            of=progress.total,
            seconds=round(seconds, 3),
            tokens_per_second=None if rate is None else round(rate, 1),
            bytes_down=meter.down,
            bytes_up=meter.up,
        )

    def newest(self) -> TrainingProgressed | None:
        """What was not given out before; None when nothing moved.

        While a run waits for a person at the site, that: of several in turn.
        """
        newest, self._newest = self._newest, None
        return newest or self._awaited()

    def _awaited(self) -> TrainingProgressed | None:
        held = self.participant.held() if self.participant else []
        self._held_since = {run: self._held_since.get(run, self._clock()) for run in held}
        if not held:
            return None
        self._turn += 1
        run = held[self._turn % len(held)]
        return TrainingProgressed(
            run=run,
            round=0,
            activity=AWAITS_APPROVAL,
            step=0,
            of=0,
            seconds=round(self._clock() - self._held_since[run], 3),
        )
