"""One run after another while faults fall, until so many have fired; then the tally."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
import urllib.error
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from shared.topology import coordinator_queue, mirror_queue
from tests.chaos import schedule
from tests.chaos.checks import check
from tests.chaos.kinds import KINDS
from tests.chaos.names import COORDINATORS, SITES
from tests.chaos.stand import Stand

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.chaos.schedule import Fault, Kind, RunShape

RUN_SECONDS = 300.0  # no run may take longer, whatever falls on it
TAIL = 4_000


class ChaosError(AssertionError):
    """Something that must hold did not; the text says all that is needed to see why."""


@dataclass
class Tally:
    """What came of it. Seconds are wall time; ``seconds``: of each run, from start to end."""

    seed: int
    faults: int  # that were asked for; a few more may fire before the last run ends
    fired: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    replaced: int = 0  # frozen coordinators that another one took over from
    runs: int = 0
    digests_equal: int = 0
    rounds: int = 0
    trainings: int = 0
    again: int = 0
    unfinished: int = 0
    finished_again: int = 0
    relearned: int = 0
    residuals_lost: int = 0  # runs with policy all in which a record says so
    carrying: int = 0  # runs in which late deltas are carried, which nothing is compared with
    carried: int = 0  # deltas that counted in a later round than their own
    exits: int = 0
    seconds: list[float] = field(default_factory=list)
    whole_seconds: float = 0.0


class Storm:
    """The faults' side: fires what the schedule says, each fault in a thread of its own."""

    def __init__(self, stand: Stand, tally: Tally, kinds: Sequence[Kind], out: TextIO) -> None:
        self.failure: BaseException | None = None
        self.lines: list[str] = []
        self._stand = stand
        self._tally = tally
        self._schedule = schedule.faults(tally.seed, kinds)
        self._out = out
        self._open = threading.Event()
        self._ended = threading.Event()
        self._acting: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """How many faults have fired."""
        return self._tally.fired.total()

    @contextlib.contextmanager
    def blowing(self) -> Iterator[None]:
        """Faults fall inside; at the end each has been mended."""
        self._open.set()
        try:
            yield
        finally:
            self.calm()

    def calm(self) -> None:
        """No new faults; wait until all are mended."""
        self._open.clear()
        with self._lock:
            acting, self._acting = self._acting, []
        for thread in acting:
            thread.join(120)

    def end(self) -> None:
        """No more faults."""
        self._ended.set()
        self._open.set()
        self._thread.join(10)
        self.calm()

    def say(self, text: str) -> None:
        """A line with the time."""
        line = f"{self._stand.now:7.1f} s  {text}"
        self.lines.append(line)
        print(line, file=self._out, flush=True)

    def _run(self) -> None:
        for fault in self._schedule:
            self._pause(fault.pause)
            with self._lock:
                if self._ended.is_set():
                    return
                if not self._open.is_set():
                    continue  # closed in this very instant: this one is not fired
                thread = threading.Thread(target=self._act, args=(fault,), daemon=True)
                thread.start()
                self._acting = [one for one in self._acting if one.is_alive()] + [thread]

    def _pause(self, seconds: float) -> None:
        """Only time in which faults may fall counts."""
        while seconds > 0 and not self._ended.is_set():
            self._open.wait()
            began = time.monotonic()
            self._ended.wait(min(seconds, 0.05))
            seconds -= time.monotonic() - began

    def _act(self, fault: Fault) -> None:
        name, began = fault.kind.name, self._stand.now
        try:
            evidence = fault.kind.act(self._stand, fault)
        except BaseException as error:  # noqa: BLE001 - pytest.fail is none of Exception
            self.failure = self.failure or error
            self.say(f"fault {fault.number}: {name}: could not be done: {error!r}")
            return
        with self._lock:
            if evidence is None:
                self._tally.missed[name] += 1
            else:
                self._tally.fired[name] += 1
                self._tally.replaced += evidence.endswith("replaced")
        took = f"from {began:.1f} s, drawn for {fault.seconds:.1f} s"
        self.say(f"fault {fault.number}: {name}: {evidence or 'nothing to hit'} ({took})")


def storm(
    folder: Path,
    seed: int,
    faults: int,
    kinds: Sequence[Kind] = KINDS,
    out: TextIO = sys.stderr,
) -> Tally:
    """Runs until ``faults`` have fired. Raises ChaosError with the schedule so far and the logs."""
    print(f"chaos: seed {seed}, {faults} faults", file=out, flush=True)
    tally = Tally(seed, faults)
    with Stand(folder) as stand:
        fury = Storm(stand, tally, kinds, out)
        try:
            for shape in schedule.runs(seed):
                _one_run(stand, fury, shape, tally)
                if fury.count >= faults:
                    break
        except BaseException as error:
            fury.end()
            raise ChaosError(_report(stand, fury, seed, error)) from error
        fury.end()
        tally.exits, tally.whole_seconds = len(stand.exits), stand.now
    return tally


def _one_run(stand: Stand, fury: Storm, shape: RunShape, tally: Tally) -> None:
    how = (
        f"{shape.rounds} rounds, {shape.codec} up, {shape.down} down, {shape.kind}, {shape.policy}"
    )
    fury.say(f"run {shape.name}: {how}, {' '.join(shape.sites)}")
    began, before = stand.now, fury.count
    stand.begin(shape)
    stand.copier.watch()
    with fury.blowing():
        while not stand.run_has_ended:
            assert fury.failure is None, f"a fault could not be done: {fury.failure!r}"
            assert stand.now - began < RUN_SECONDS, f"{shape.name}: not over in {RUN_SECONDS} s"
            time.sleep(0.05)
    seconds = stand.now - began
    verdict = check(stand, shape)
    trained = verdict.trainings
    assert not verdict.complaints, "\n".join(verdict.complaints)
    tally.runs += 1
    tally.digests_equal += verdict.digest_equal
    tally.rounds += shape.rounds
    tally.trainings += verdict.counted
    tally.again += trained.again
    tally.unfinished += trained.unfinished
    tally.finished_again += trained.finished_again
    tally.relearned += trained.relearned
    tally.residuals_lost += verdict.residual_lost and not shape.carries
    tally.carrying += shape.carries
    tally.carried += verdict.carried
    tally.seconds.append(seconds)
    outcome = f"{verdict.carried} deltas carried" if shape.carries else "as undisturbed"
    outcome = "a residual lost, on record" if verdict.residual_lost else outcome
    fury.say(
        f"run {shape.name}: {outcome}, in {seconds:.1f} s, {fury.count - before} faults "
        f"({fury.count} in all), {trained.again} trained again, {trained.unfinished} cut short"
    )
    _tidy(stand, shape.number - 1)


def _tidy(stand: Stand, number: int) -> None:
    """The queues of the run before the last one: nobody speaks of it any more."""
    for queue in (coordinator_queue(f"chaos-{number}"), mirror_queue(f"chaos-{number}")):
        with contextlib.suppress(urllib.error.HTTPError):
            stand.rabbit.api("DELETE", f"queues/{stand.vhost}/{queue}")


def _report(stand: Stand, fury: Storm, seed: int, error: BaseException) -> str:
    parts = [f"seed {seed}: {error}", "", "The schedule so far:", *fury.lines]
    for name in itertools.chain(COORDINATORS, SITES):
        parts += ["", f"The end of {name}'s log:", stand.log(name)[-TAIL:]]
    return "\n".join(parts)
