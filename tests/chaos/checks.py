"""What must hold after every run, whatever fell on it. Each check returns its complaints.

A run that carries late deltas cannot be compared with an undisturbed one: who is late depends on
what fell on whom. What must hold all the same: the coordinators end in one adapter, ``runs verify``
recomputes every round to it, no delta is counted twice, and one that was accepted before the last
round began is counted. A site may leave out a round that closed without it, and its training in
hand is called off when the run ends.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.history import read_history
from shared.errors import AccessRefusedError, BrokerError
from tests.chaos.names import COORDINATORS, LOST, SITES, TRACE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coordinator.history import History
    from shared.protocol.records import ClosingRecord
    from tests.chaos.schedule import RunShape
    from tests.chaos.stand import Exit, Stand

NOT_THERE = (BrokerError.exit_code, AccessRefusedError.exit_code)
UNFORESEEN = re.compile(r"^.*(?:\.crashed|Traceback \(most recent).*$", re.MULTILINE)


@dataclass
class Trainings:
    """What a trace says of one run at one site.

    ``again``: trainings that had written their delta once before and were killed before the rename
    that commits it. ``unfinished``: trainings that a kill ended in the middle. ``finished_again``:
    trainings of a round that was finished; there must be none. ``relearned``: trainings of a round
    that was finished in a workspace that was lost since.
    """

    again: int = 0
    unfinished: int = 0
    finished_again: int = 0
    relearned: int = 0
    complaints: list[str] = field(default_factory=list)


def account_for(
    trace: Sequence[str],
    run: str,
    rounds: int,
    killed: set[int],
    site: str = "",
    *,
    carries: bool = False,
) -> Trainings:
    """Each round trained to its commit once; what was trained twice, a kill accounts for exactly.

    An attempt may only end without its commit where its process was killed, and that must be the
    last that this process said. After a commit there is no further attempt, unless the kill fell
    into the commit itself: then there is at most one. A lost workspace begins anew. ``carries``: a
    round may close without this site, and a training that nobody takes any more is called off.
    """
    found = Trainings()
    attempts = _attempts(trace, run)
    by_round: dict[int, list[_Attempt]] = defaultdict(list)
    for attempt in attempts:
        called_off = carries and attempt.stage == "begun"
        by_kill = attempt.is_last and attempt.pid in killed
        if not (attempt.stage == "committed" or by_kill or called_off):
            found.complaints.append(
                f"{site}: {run} round {attempt.round}: process {attempt.pid} came to "
                f"'{attempt.stage}' and no further, and no kill of ours explains it"
            )
        if attempt.stage == "begun":
            found.unfinished += by_kill
        else:
            by_round[attempt.round].append(attempt)
    for number in range(1, rounds + 1):
        tried = by_round.pop(number, [])
        for one, other in itertools.pairwise(tried):
            if one.losses != other.losses:
                found.relearned += 1
                continue
            found.again += 1
            if one.stage == "committed":
                found.finished_again += 1
                found.complaints.append(
                    f"{site}: {run} round {number}: trained after it was finished"
                )
        # The last one before each loss: one that ended in its commit is enough.
        ends = {one.losses: one.stage for one in tried}
        if all(stage == "trained" for stage in ends.values()) and not carries:
            stages = [one.stage for one in tried]
            found.complaints.append(f"{site}: {run} round {number}: never finished: {stages}")
    if by_round:
        found.complaints.append(f"{site}: {run}: rounds that there are not: {sorted(by_round)}")
    return found


@dataclass
class _Attempt:
    pid: int
    stage: str
    round: int
    losses: int = 0  # how often the workspace had been lost when it began
    is_last: bool = False  # whether its process said nothing more, in this run or another


def _attempts(trace: Sequence[str], run: str) -> list[_Attempt]:
    """One for each ``begun``, with the last stage that it came to."""
    attempts: list[_Attempt] = []
    newest: dict[int, _Attempt] = {}  # by process
    losses = 0
    for line in trace:
        pid, stage, name, number = line.split()
        if stage == LOST:
            losses += 1
        elif stage == "begun":
            newest[int(pid)] = _Attempt(int(pid), stage, 0, losses)
            if name == run:
                attempts.append(newest[int(pid)])
        else:
            newest[int(pid)].stage, newest[int(pid)].round = stage, int(number)
    for attempt in newest.values():
        attempt.is_last = True
    return attempts


def counted_once(
    closings: Iterable[ClosingRecord], sites: Sequence[str], *, carries: bool = False
) -> list[str]:
    """Each site's delta of each round counts in exactly one closing, with all others of it.

    ``carries``: in at most one, with whatever others are there.
    """
    complaints, counts = [], Counter()
    for closing in closings:
        counts.update((item.site, item.from_round) for item in closing.inputs)
        wanted = [(site, closing.round) for site in sorted(sites)]
        got = sorted((item.site, item.from_round) for item in closing.inputs)
        if got != wanted and not carries:
            complaints.append(f"round {closing.round}: expected inputs {wanted}, got {got}")
        if abs(sum(item.weight for item in closing.inputs) - 1.0) > 1e-12:
            complaints.append(f"round {closing.round}: its weights do not sum to 1")
    return complaints + [f"{key}: counted {n} times" for key, n in counts.items() if n > 1]


def left_over(history: History) -> list[str]:
    """With carry, what was accepted before the last round began is counted in some round."""
    last = max(there.opened.time for there in history.rounds.values() if there.opened)
    return [
        f"{site}: its delta of round {number} was in before the last round, and never counted"
        for (site, number), one in history.accepted.items()
        if (site, number) not in history.counted and one.time < last
    ]


def explained(exits: Sequence[Exit], wipes: Sequence[tuple[float, float]]) -> list[str]:
    """A process may end by itself only if it began while the broker did not know its account."""
    complaints = []
    for one in exits:
        met = any(one.started < end + 5.0 and one.ended > began for began, end in wipes)
        if one.code not in NOT_THERE or not met:
            complaints.append(f"{one.name} ended by itself with code {one.code}: {one.said}")
    return complaints


def unforeseen(log: str) -> list[str]:
    """Lines about errors that nobody foresaw."""
    return UNFORESEEN.findall(log)


@dataclass
class Verdict:
    """What one run came to. ``residual_lost``: and it is on record; such a run is another one.

    ``digest_equal``: to the undisturbed run's, where that can be asked. ``counted``: how many
    deltas, ``carried``: how many of them in a later round than their own.
    """

    digest_equal: bool
    residual_lost: bool
    counted: int
    carried: int
    trainings: Trainings
    complaints: list[str]


def check(stand: Stand, shape: RunShape) -> Verdict:
    """All of the above, the digests, and ``runs verify``.

    Where a record says that a site lost what its codec had left out, the digest is another one than
    the undisturbed run's, and the coordinators have to agree on it. So it is where late deltas are
    carried.
    """
    history = read_history(stand.store, shape.name)
    losers = {site for (site, _), one in history.accepted.items() if one.residual == "lost"}
    comparable = not losers and not shape.carries
    got = {name: stand.digest(shape, name) for name in COORDINATORS}
    wanted = stand.wanted(shape) if comparable else got[COORDINATORS[0]]
    complaints = [
        f"{name}: expected adapter {wanted}, got {sha}"
        for name, sha in got.items()
        if sha != wanted
    ]
    equal = not complaints and comparable
    closings = [there.closing for there in history.rounds.values() if there.closing]
    complaints += counted_once(closings, shape.sites, carries=shape.carries)
    complaints += left_over(history) if shape.carries else ()
    staleness = [one.round - item.from_round for one in closings for item in one.inputs]
    counted, carried = len(staleness), sum(late > 0 for late in staleness)
    verified = stand.command("runs", "verify", shape.name, "--store", str(stand.federation(shape)))
    if verified.returncode:
        complaints.append(f"runs verify: {verified.stderr}")
    total = Trainings()
    for site in shape.sites:
        trace = (stand.kit(site) / TRACE).read_text().splitlines()
        if site in losers and not any(f" {LOST} " in line for line in trace):
            complaints.append(f"{site}: says that it lost a residual, and nobody took it")
        found = account_for(
            trace, shape.name, shape.rounds, stand.killed, site, carries=shape.carries
        )
        total.again += found.again
        total.unfinished += found.unfinished
        total.finished_again += found.finished_again
        total.relearned += found.relearned
        complaints += found.complaints
    complaints += explained(stand.exits, stand.wipes)
    for name in (*COORDINATORS, *SITES):
        complaints += [f"{name}: {line}" for line in unforeseen(stand.log(name))]
    return Verdict(equal, bool(losers), counted, carried, total, complaints)
