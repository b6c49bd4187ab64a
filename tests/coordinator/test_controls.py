"""Pause, resume, stop, extend, exclude: what each means, also after a kill at any write."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from coordinator.deltas import Deltas
from coordinator.effects import Effects
from coordinator.round.controls import steer
from coordinator.runs.operating import order
from shared import topology
from shared.errors import (
    ConfigError,
    LedgerDamagedError,
    LedgerError,
    RunFailedError,
    RunNotFoundError,
    RunStuckError,
)
from shared.protocol.events import DeltaAnswered
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    FinishedRecord,
    OpenedRecord,
)
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.coordinator.test_rounds_machine import AnyOrder
from tests.numpy_learner import ANYTHING
from tests.steering import Crash, Mortal, ask, forget, records, store_of, verify


def control(number, action, **what) -> ControlRecord:
    return ControlRecord(number=number, action=action, reason=f"r{number}", by="me", **what)


def when(config, round_number, do, site="a"):
    """Learners, of which one does something at the start of its training in a round."""
    sites = federations.learners(config)

    def fault(task):
        if task.round == round_number:
            do()

    sites[site].fault = fault
    return sites


# Meaning -------------------------------------------------------------------------------------


def test_what_a_list_of_records_means():
    """Pauses toggle, extensions add up, a stop and an exclusion are for good."""
    controls = [
        control(1, "pause"),
        control(2, "extend", rounds=2),
        control(3, "resume"),
        control(4, "exclude", site="b"),
        control(5, "exclude", site="b"),
        control(6, "extend", rounds=3),
        control(7, "stop"),
        control(8, "stop"),
    ]
    assert steer([]) == steer(controls, 0)
    assert steer(controls, 1).paused == "r1"
    whole = steer(controls)
    assert (whole.number, whole.paused, whole.stopped, whole.more_rounds) == (8, None, "r7", 5)
    assert whole.excluded == {"b": "r4"}
    assert steer(controls, 2).more_rounds == 2
    assert whole.in_force(["c", "b", "a"]) == ("a", "c")


@pytest.mark.parametrize(
    "what", [{"action": "extend"}, {"action": "exclude"}, {"action": "pause", "rounds": 1}]
)
def test_a_record_that_says_half_is_none(what):
    """An extension says by how many rounds, an exclusion whom; nothing else says either."""
    with pytest.raises(ValueError, match="expected with"):
        ControlRecord(number=1, reason="", by="me", **what)


# Whole runs ----------------------------------------------------------------------------------


def test_a_pause_lets_the_open_round_end_and_a_resume_changes_no_byte(tmp_path):
    """The error names the reason and the command; afterwards the undisturbed digest."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    folder = tmp_path / "paused"
    sites = when(config, 2, lambda: ask(folder, "pause", "a holiday"))
    with pytest.raises(RunStuckError, match=r"paused after round 2: a holiday.*runs resume test"):
        federations.run(config, folder, sites)
    with pytest.raises(RunStuckError, match="paused after round 2"):
        federations.run(config, folder)
    assert [r.round for r in records(folder, ClosedRecord)] == [1, 2]
    ask(folder, "resume")
    assert federations.run(config, folder).adapter_sha == wanted
    assert verify(folder).findings == []


def test_a_pause_in_the_last_round_holds_the_end_so_that_it_can_be_extended(tmp_path):
    """What is paused is not finished behind the operator's back."""
    config = federations.config()
    sites = when(config, 3, lambda: ask(tmp_path, "pause"))
    with pytest.raises(RunStuckError, match="paused after round 3"):
        federations.run(config, tmp_path, sites)
    ask(tmp_path, "extend", rounds=1)
    ask(tmp_path, "resume")
    assert federations.run(config, tmp_path).last_round == 4
    assert verify(tmp_path).findings == []


def test_a_word_is_heard_before_every_decision(tmp_path):
    """Asked for a moment before a round would open, between two ticks: the round does not open."""
    folder = tmp_path

    class Asks(DirectoryStore):
        def create(self, key, data):
            if key.endswith("rounds/00002/closed.json"):
                ask(folder, "pause")
            return super().create(key, data)

    with pytest.raises(RunStuckError, match="paused after round 2"):
        federations.run(federations.config(), folder, store=Asks(folder / "store"))
    assert [r.round for r in records(folder, OpenedRecord)] == [1, 2]


def test_stop_ends_with_the_last_closed_round(tmp_path):
    """In the middle of round 2: the adapter of round 1, the reason on record, a clean chain."""
    config = federations.config()
    sites = when(config, 2, lambda: ask(tmp_path, "stop", "it is enough"), site="b")
    state = federations.run(config, tmp_path, sites)
    (closed,) = records(tmp_path, ClosedRecord)
    (finished,) = records(tmp_path, FinishedRecord)
    assert (finished.round, finished.reason) == (1, "stopped: it is enough")
    assert (finished.sha, finished.failed) == (closed.adapter_sha, False)
    assert state.evaluated == {"a", "b", "c"}
    assert verify(tmp_path).findings == []


def test_stop_before_the_start_is_a_failed_run(tmp_path):
    """There is no adapter to end with; the reason says so."""
    config = federations.config()
    ledger = Ledger(store_of(tmp_path), "test", "w", lambda: 0.0)
    ledger.begin(config)
    ask(tmp_path, "stop", "a mistake")
    with pytest.raises(RunFailedError, match="stopped: a mistake"):
        federations.run(config, tmp_path)
    (finished,) = records(tmp_path, FinishedRecord)
    assert (finished.failed, finished.sha, finished.round) == (True, None, 0)
    assert verify(tmp_path).findings == []


def test_a_decision_on_record_is_carried_out_before_a_stop(tmp_path):
    """Round 2 is decided and not added up: the stop comes after it."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole")
    folder = tmp_path / "stopped"
    federations.run(config, folder)
    store = store_of(folder)
    of_round_3 = [info.key for info in store.list("runs/test/rounds/00003/")]
    forget(
        store,
        *of_round_3,
        topology.round_key("test", 2, "closed"),
        topology.finished_key("test"),
    )
    ask(folder, "stop")
    state = federations.run(config, folder)
    assert state.last_round == 2
    assert state.adapter_sha == records(tmp_path / "whole", ClosedRecord)[1].adapter_sha
    assert state.adapter_sha != wanted.adapter_sha
    assert verify(folder).findings == []


def test_extensions_count_from_the_next_round_and_stand_in_its_record(tmp_path):
    """3 rounds, then 3 + 2: the span of a round is by the total when it opened."""
    config = federations.config()
    sites = when(config, 2, lambda: ask(tmp_path, "extend", rounds=2))
    state = federations.run(config, tmp_path, sites)
    assert state.last_round == 5
    opened = records(tmp_path, OpenedRecord)
    assert [r.rounds for r in opened] == [3, 3, 5, 5, 5]
    assert (opened[1].progress_from, opened[1].progress_to) == (1 / 3, 2 / 3)
    assert (opened[2].progress_from, opened[2].progress_to) == (2 / 5, 3 / 5)
    assert state.finished.reason == "all 5 rounds are closed"
    assert verify(tmp_path).findings == []


def test_a_site_that_accepts_fewer_rounds_is_not_trained_beyond_them(tmp_path):
    """It said so before the run was extended; the round waits for it, and says why."""
    config = federations.config(rounds=1)
    limited = ANYTHING.model_copy(update={"max_rounds": 1})
    sites = when(config, 1, lambda: ask(tmp_path, "extend", rounds=1))
    with pytest.raises(RunStuckError, match=r"accept.max_rounds: expected at most 1, got 2"):
        federations.run(config, tmp_path, sites, accept=limited)
    assert sites["b"].trained == [1]


def test_an_excluded_site_is_not_waited_for_and_not_selected_again(tmp_path):
    """Under on_failure = wait: the round that it held up closes without it, with the reason."""
    config = federations.config()
    sites = federations.learners(config)

    def fail(task):
        raise ConfigError("no GPU")

    sites["b"].fault = fail
    with pytest.raises(RunStuckError, match="no GPU"):
        federations.run(config, tmp_path, sites)
    ask(tmp_path, "exclude", "its GPU is broken", site="b")
    again = federations.learners(config)
    assert federations.run(config, tmp_path, again).last_round == 3
    closings = records(tmp_path, ClosingRecord)
    assert closings[0].excluded == {"b": "its GPU is broken"}
    assert [[i.site for i in c.inputs] for c in closings] == [["a", "c"]] * 3
    opened = records(tmp_path, OpenedRecord)
    assert [r.members for r in opened] == [("a", "b", "c"), ("a", "c"), ("a", "c")]
    assert again["b"].trained == []
    assert verify(tmp_path).findings == []


def test_the_delta_of_an_excluded_site_does_not_count_although_it_was_accepted(tmp_path):
    """A's delta of round 2 is in when the operator takes a out, while b trains."""
    config = federations.config()
    seen = []

    def take_out():
        seen.extend(r for r in records(tmp_path, AcceptedRecord) if (r.site, r.round) == ("a", 2))
        ask(tmp_path, "exclude", "poisoned", site="a")

    federations.run(config, tmp_path, when(config, 2, take_out, site="b"))
    assert len(seen) == 1
    closings = records(tmp_path, ClosingRecord)
    assert closings[1].excluded == {"a": "poisoned"}
    assert [[i.site for i in c.inputs] for c in closings] == [
        ["a", "b", "c"],
        ["b", "c"],
        ["b", "c"],
    ]
    assert verify(tmp_path).findings == []


def test_what_an_excluded_site_still_has_is_not_taken(tmp_path, monkeypatch):
    """It trained when it was taken out: the answer to its request is late, and says why."""
    config = federations.config()
    told = []
    tell, asked = Effects.tell, Deltas.on_upload_requested

    def noticed_before(self, event, sender):
        self._run.notice_controls()  # as a tick would that came before the request
        asked(self, event, sender)

    monkeypatch.setattr(Deltas, "on_upload_requested", noticed_before)
    monkeypatch.setattr(
        Effects, "tell", lambda self, events: (told.extend(events.items()), tell(self, events))
    )
    sites = when(config, 2, lambda: ask(tmp_path, "exclude", "moved away", site="c"), site="c")
    federations.run(config, tmp_path, sites)
    assert sites["c"].trained == [1, 2]
    assert [r.round for r in records(tmp_path, AcceptedRecord) if r.site == "c"] == [1]
    answers = [e for site, e in told if site == "c" and isinstance(e, DeltaAnswered)]
    assert answers[-1].verdict == "late"
    assert "taken out of the run: moved away" in answers[-1].reason
    assert verify(tmp_path).findings == []


def test_a_round_that_nobody_is_left_in_stays_open_until_the_run_is_stopped(tmp_path):
    """And so does a run without sites: the error says what can be done."""
    config = federations.config(("a", "b"))

    def everybody():
        for site in "ab":
            ask(tmp_path, "exclude", "gone", site=site)

    with pytest.raises(RunStuckError, match=r"no site is left.*a \(gone\).*runs stop test"):
        federations.run(config, tmp_path, when(config, 2, everybody))
    ask(tmp_path, "stop", "nobody left")
    assert federations.run(config, tmp_path).last_round == 1
    assert verify(tmp_path).findings == []


def test_random_selection_draws_among_those_that_are_left(tmp_path):
    """The recorded members are what anybody recomputes the draw from."""
    selection = {"method": "random", "fraction": 0.5}
    config = federations.config("abcde", selection=selection, rounds=4)
    sites = federations.learners(config)
    for learner in sites.values():

        def once(task):
            if task.round == 1 and not records(tmp_path, ControlRecord):
                ask(tmp_path, "exclude", site="e")

        learner.fault = once
    federations.run(config, tmp_path, sites)
    opened = records(tmp_path, OpenedRecord)
    assert [len(r.selected) for r in opened] == [3, 2, 2, 2]
    assert {site for r in opened[1:] for site in r.selected} <= set("abcd")
    assert verify(tmp_path).findings == []


# Kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_after_the_orders_ends_in_the_same_bytes(tmp_path, after):
    """Every write of the process that finds the orders may be its last one.

    Round 1 is closed, then: exclude c, extend by 1, resume. Decisions and digest stay the same.
    """
    config = federations.config(rounds=2)
    start = tmp_path / "start"
    with pytest.raises(RunStuckError, match="paused"):
        federations.run(config, start, when(config, 1, lambda: ask(start, "pause")))
    ask(start, "exclude", "broken", site="c")
    ask(start, "extend", rounds=1)
    ask(start, "resume")
    whole = shutil.copytree(start, tmp_path / "whole")
    wanted = federations.run(config, whole).adapter_sha
    killed = []
    for number in range(1, 200):
        folder = shutil.copytree(start, tmp_path / str(number))
        store = Mortal(folder / "store", number, after=after)
        try:
            federations.run(config, folder, store=store)
        except Crash as crash:
            killed.append(str(crash))
        assert federations.run(config, folder).adapter_sha == wanted
        assert plain(folder) == plain(whole)
        if not store.fired:
            break
    kinds = ("00002/opened", "00002/closing", "00002/closed", "adapters/", "00003/", "finished")
    assert [kind for kind in kinds if not any(kind in key for key in killed)] == []
    assert verify(folder).findings == []


def plain(folder):
    """All decisions, without who wrote them when."""
    stamps = {"writer": "", "time": 0.0}
    kinds = (OpenedRecord, ClosingRecord, FinishedRecord)
    return [r.model_copy(update=stamps) for kind in kinds for r in records(folder, kind)]


class AnyOrderSteered(AnyOrder):
    """Pauses and resumes, noticed or found at a restart, at any moment: the same adapter."""

    @rule(action=st.sampled_from(["pause", "resume"]), noticed=st.booleans())
    def steer(self, action: str, noticed: bool) -> None:
        number = sum("/control/" in key for key in self.ledger.records) + 1
        record = self.ledger.write(control(number, action), "operator")
        if noticed:
            known = len(self.state.controls)
            for key in sorted(k for k in self.ledger.records if "/control/" in k)[known:]:
                self.feed(self.ledger.records[key])
            assert self.state.controls[-1] == record

    def finish(self) -> None:
        self.steer("resume", noticed=True)
        super().finish()


AnyOrderSteered.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestAnyOrderSteered = AnyOrderSteered.TestCase


# What may be asked ---------------------------------------------------------------------------


def test_nothing_is_asked_of_a_finished_run(tmp_path):
    """The error names the command that goes on from it."""
    federations.run(federations.config(), tmp_path)
    for action, what in (("pause", {}), ("extend", {"rounds": 1}), ("exclude", {"site": "a"})):
        with pytest.raises(LedgerError, match=r"finished.*runs branch test --at 3 --name NEW"):
            ask(tmp_path, action, **what)
    assert list(store_of(tmp_path).list(topology.control_prefix("test"))) == []


def test_what_is_in_force_already_is_not_recorded_again(tmp_path):
    """Pausing twice, resuming what runs, taking out who is out; and nothing after a stop."""
    Ledger(store_of(tmp_path), "test", "w", lambda: 0.0).begin(federations.config())
    assert ask(tmp_path, "resume") is None
    assert ask(tmp_path, "pause").number == 1
    assert ask(tmp_path, "pause") is None
    assert ask(tmp_path, "exclude", site="a").number == 2
    assert ask(tmp_path, "exclude", site="a") is None
    assert ask(tmp_path, "stop", "enough").number == 3
    with pytest.raises(LedgerError, match="stopped by an operator"):
        ask(tmp_path, "resume")


def test_a_wrong_name_is_named(tmp_path):
    """A run that is not there, a site that is none of it."""
    Ledger(store_of(tmp_path), "test", "w", lambda: 0.0).begin(federations.config())
    with pytest.raises(RunNotFoundError, match="nobody"):
        ask(tmp_path, "pause", run="nobody")
    with pytest.raises(ConfigError, match=r"expected one of a, b, c, got z"):
        ask(tmp_path, "exclude", site="z")


def test_two_operators_at_once_take_two_numbers(tmp_path):
    """Whoever is second at a number takes the next; no word is lost."""
    store = store_of(tmp_path)
    Ledger(store, "test", "w", lambda: 0.0).begin(federations.config())
    raced = []

    class Slow(type(store)):
        def create(self, key, data):
            if "/control/" in key and not raced:
                raced.append(ask(tmp_path, "extend", "the first", rounds=1))
            return super().create(key, data)

    mine = order(
        Ledger(Slow(tmp_path / "store"), "test", "second", lambda: 0.0),
        "extend",
        "the second",
        rounds=2,
    )
    assert (raced[0].number, mine.number) == (1, 2)
    assert [r.rounds for r in records(tmp_path, ControlRecord)] == [1, 2]


def test_a_torn_control_record_stops_the_run_and_is_named(tmp_path):
    """As any other record: nobody guesses what an operator meant."""
    Ledger(store_of(tmp_path), "test", "w", lambda: 0.0).begin(federations.config())
    store_of(tmp_path).put(topology.control_key("test", 1), b'{"action": "sto')
    with pytest.raises(LedgerDamagedError, match=r"control/00001\.json"):
        federations.run(federations.config(), tmp_path)
