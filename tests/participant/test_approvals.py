"""A site that wants a person's word on each run: nothing begins before, and only what was meant."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from participant.approvals import FILE, Approvals, terms_digest
from participant.guard import Guard
from participant.handlers import Participant
from participant.learner.port import Readiness
from participant.reporting import Reporter
from participant.workspace import Workspace
from shared.errors import ConfigError, NotAcceptedError, StoreError
from shared.protocol.events import (
    AWAITS_APPROVAL,
    BasesOffered,
    ParticipantReady,
    RunDeclined,
    RunFinished,
    WireTraining,
)
from tests.numpy_learner import ANYTHING, MANIFEST, NUMERICS
from tests.participant.test_asking import ANNOUNCED, round_started, site

__all__ = ["site"]  # a fixture
CAUTIOUS = ANYTHING.model_copy(update={"approval": True})
MORE_STEPS = ANNOUNCED.model_copy(
    update={"training": WireTraining(local_steps=2), "config_digest": "c" * 64}
)


@pytest.fixture
def cautious(site):
    """The same site, which wants a person's word."""
    return replace(site, accept=CAUTIOUS)


@pytest.fixture
def approvals(site):
    """What the person has in hand."""
    return Approvals(site.workspace.root / FILE)


def answer(approvals, word="approved", run="r", **more):
    return approvals.say(word, approvals.asked()[run], 2000.0, "ann@here", **more)


def told(site, kind):
    return [event for event in site.outbox.events if isinstance(event, kind)]


def announce(participant, run=ANNOUNCED):
    participant.on_run_announced(run, "coordinator")
    turn(participant)


def turn(participant):
    """All that there is to do now."""
    while participant.has_work:
        participant.work()


def test_nothing_begins_before_a_person_says_so(cautious, approvals):
    """No model is loaded, nobody is told that the site is ready; after the word it goes on."""
    loaded = []
    cautious.learner.prepare, prepare = (
        lambda *told: loaded.append(told) or prepare(*told),
        cautious.learner.prepare,
    )
    participant = Participant(cautious)
    announce(participant)
    announce(participant)
    assert (loaded, cautious.outbox.events) == ([], [])
    assert participant.held() == ["r"]
    (asked,) = approvals.asked().values()
    assert (asked.word, asked.time, asked.rounds) == ("asked", 1000.0, 1)
    answer(approvals)
    turn(participant)
    assert len(loaded) == 1
    assert len(told(cautious, ParticipantReady)) == 1
    assert participant.held() == []


def test_a_site_that_wants_no_word_asks_for_none(site, approvals):
    """Off by default: no file is written."""
    announce(Participant(site))
    assert len(told(site, ParticipantReady)) == 1
    assert approvals.asked() == {}


def test_the_word_is_kept_across_restarts(cautious, approvals):
    """A participant that was killed meanwhile finds it."""
    announce(Participant(cautious))
    answer(approvals)
    announce(Participant(cautious))
    announce(Participant(cautious))
    assert len(told(cautious, ParticipantReady)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"training": WireTraining(local_steps=2)},
        {"rounds": 2},
        {"config_digest": "c" * 64},
        {"participants": 2},
        {"averaging": "ffa"},
        {"base": ANNOUNCED.base.model_copy(update={"fingerprint": "f" * 64})},
        {"lora": ANNOUNCED.lora.model_copy(update={"rank": 4})},
    ],
)
def test_a_changed_term_asks_again(cautious, approvals, change):
    """Whatever it is; and the old terms stay approved."""
    announce(Participant(cautious))
    answer(approvals)
    participant = Participant(cautious)
    announce(participant, ANNOUNCED.model_copy(update=change))
    assert participant.held() == ["r"]
    assert told(cautious, ParticipantReady) == []
    announce(participant)
    assert len(told(cautious, ParticipantReady)) == 1


def test_where_the_bases_lie_is_no_term(cautious, approvals):
    """A URL is signed anew with each announcement, also for who remembers what was announced."""
    offers = [
        BasesOffered(sha="e" * 64, get_url=f"https://store/{n}", expires_at=float(n))
        for n in (1, 2)
    ]
    one, two = (ANNOUNCED.model_copy(update={"bases": offer}) for offer in offers)
    assert terms_digest(one) == terms_digest(two) != terms_digest(ANNOUNCED)
    guard = Guard(ANYTHING, cautious.workspace)
    ready = Readiness(MANIFEST, "f" * 64, NUMERICS, 21)
    guard.check_run(one, ready)
    guard.check_run(two, ready)


def test_a_person_who_declines_is_heard_with_the_reason(cautious, approvals):
    """The run goes on without the site; a later yes lets it in."""
    participant = Participant(cautious)
    announce(participant)
    answer(approvals, "declined", reason="no ethics vote yet")
    turn(participant)
    (declined,) = told(cautious, RunDeclined)
    assert "a person there declined run r: no ethics vote yet" in declined.reason
    announce(participant, MORE_STEPS)
    assert len(told(cautious, RunDeclined)) == 2  # a no is of the run, whatever its terms
    with pytest.raises(ConfigError, match="other terms"):
        approvals.say(
            "approved", approvals.asked()["r"].model_copy(update={"terms": "d" * 64}), 1.0, "x"
        )
    answer(approvals)
    announce(participant)
    assert len(told(cautious, ParticipantReady)) == 1


def test_an_approval_ends_with_its_rounds_and_when_it_is_taken_back(cautious, approvals):
    """A run that is extended, or that a person changed his mind about, is left from then on."""
    guard = Guard(CAUTIOUS, cautious.workspace)
    assert not guard.is_approved(ANNOUNCED, 1.0)
    answer(approvals)
    assert guard.is_approved(ANNOUNCED, 1.0)
    guard.check_run(ANNOUNCED, Readiness(MANIFEST, "f" * 64, NUMERICS, 21))
    guard.check_round(round_started(9.0))
    later = round_started(9.0).model_copy(update={"round": 2})
    with pytest.raises(NotAcceptedError, match="approved 1 rounds"):
        guard.check_round(later)
    answer(approvals, rounds=2)
    guard.check_round(later)
    answer(approvals, "declined", reason="withdrawn")
    with pytest.raises(NotAcceptedError, match="declined run r: withdrawn"):
        guard.check_round(later)


def test_what_waits_is_told_again_and_again(cautious):
    """In turn where several runs wait; not once they are over."""
    participant = Participant(cautious)
    times = iter(range(100))
    reporter = Reporter(lambda: float(next(times)))
    reporter.participant = participant
    assert reporter.newest() is None
    announce(participant)
    announce(participant, ANNOUNCED.model_copy(update={"run": "s"}))
    words = [reporter.newest() for _ in range(4)]
    assert {word.activity for word in words} == {AWAITS_APPROVAL}
    assert sorted(word.run for word in words) == ["r", "r", "s", "s"]
    assert words[-1].seconds > words[0].seconds
    for run in "rs":
        over = RunFinished(run=run, round=0, sha=None, reason="stopped")
        participant.on_run_finished(over, "coordinator")
    assert reporter.newest() is None


def test_a_line_that_a_kill_cut_off_was_never_said(cautious, approvals):
    """The next one takes its place; at every byte of it."""
    announce(Participant(cautious))
    file = cautious.workspace.root / FILE
    asked = file.read_bytes()
    answer(approvals)
    whole = file.read_bytes()
    for end in range(len(asked), len(whole)):
        file.write_bytes(whole[:end])
        assert approvals.answer("r", terms_digest(ANNOUNCED)) is None
        answer(approvals)
        assert file.read_bytes() == whole


def test_a_damaged_file_lets_nothing_begin(cautious, approvals):
    """Whoever edits it by hand takes part in nothing; the site's log says why."""
    announce(Participant(cautious))
    answer(approvals)
    file = cautious.workspace.root / FILE
    file.write_bytes(b"no word\n" + file.read_bytes())
    with pytest.raises(StoreError, match=FILE):
        approvals.asked()
    announce(Participant(cautious))
    assert told(cautious, ParticipantReady) == []
    (declined,) = told(cautious, RunDeclined)
    assert declined.reason.startswith("StoreError")


def test_participant_and_person_may_write_at_once(tmp_path):
    """No line is lost or torn."""
    workspace = Workspace(tmp_path)
    runs = [ANNOUNCED.model_copy(update={"run": f"r{n}"}) for n in range(20)]
    path = workspace.root / FILE

    def write(some):
        for run in some:
            Approvals(path).ask(run, 1.0)

    writers = [threading.Thread(target=write, args=(runs[n::4],)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(Approvals(path).asked()) == sorted(run.run for run in runs)


def test_a_coordinator_cannot_fill_the_disk_by_asking(cautious, monkeypatch):
    """With other terms again and again: from some size on nothing more is noted."""
    monkeypatch.setattr("participant.approvals.MOST_BYTES", 4000)
    participant = Participant(cautious)
    for rounds in range(1, 20):
        announce(participant, ANNOUNCED.model_copy(update={"rounds": rounds}))
    assert (cautious.workspace.root / FILE).stat().st_size < 8000
    assert told(cautious, RunDeclined)[-1].reason.startswith("StoreError")
    assert told(cautious, ParticipantReady) == []
