"""A broker may say something again, or late: a word on an old round changes nothing."""

from __future__ import annotations

import pytest

from participant.agenda import Agenda
from participant.handlers import Participant
from participant.site import Site
from participant.workspace import Workspace
from shared.protocol.events import (
    DeltaAnswered,
    RoundClosed,
    RoundStarted,
    UploadGranted,
    UploadRequested,
)
from shared.tensors.genesis import draw_adapter
from tests.numpy_learner import ANYTHING, MANIFEST, NumpyLearner
from tests.participant.test_asking import ANNOUNCED, Outbox, round_started


class Bringing:
    """Brings any adapter; notes what it sent."""

    def __init__(self, adapter):
        self.adapter, self.sent = adapter, []

    def download(self, url, path, sha256):
        path.write_bytes(self.adapter)
        return len(self.adapter)

    def upload(self, url, path, start, length):
        self.sent.append(url)


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter"
    return draw_adapter(MANIFEST, 1, path), path.read_bytes()


@pytest.fixture
def site(tmp_path, adapter):
    return Site(
        name="a",
        outbox=Outbox(),
        transfer=Bringing(adapter[1]),
        workspace=Workspace(tmp_path / "workspace"),
        learner=NumpyLearner("a"),
        clock=lambda: 1000.0,
        accept=ANYTHING,
    )


@pytest.fixture
def participant(site):
    made = Participant(site)
    made.on_run_announced(ANNOUNCED, "coordinator")
    made.work()
    return made


@pytest.fixture
def started(adapter):
    def make(number: int, said: float = 0.0) -> RoundStarted:
        update = {"round": number, "source_sha": adapter[0].sha256}
        return round_started(2000.0 + number + said).model_copy(update=update)

    return make


def train(participant, started, number):
    """One round, counted and closed."""
    participant.on_round_started(started(number), "coordinator")
    while participant.has_work:
        participant.work()
    closed = RoundClosed(run="r", round=number, result_sha=started(number).source_sha)
    participant.on_round_closed(closed, "coordinator")


def granted(site, number) -> UploadGranted:
    request = next(
        e for e in site.outbox.events if isinstance(e, UploadRequested) and e.round == number
    )
    return UploadGranted(
        run="r",
        round=number,
        sha=request.sha,
        chunk_size=1 << 24,
        urls={0: f"https://store/{number}"},
        expires_at=2000.0 + number,
    )


@pytest.mark.parametrize("again", [False, True])
def test_a_round_that_is_over_is_not_trained_again(participant, site, started, again):
    """Its delta is swept, so only the workspace's newest round tells; after a restart as well."""
    for number in (1, 2, 3):
        train(participant, started, number)
    if again:
        participant = Participant(site)
        participant.on_run_announced(ANNOUNCED, "coordinator")
        participant.work()
    participant.on_round_started(started(1), "coordinator")
    assert not participant.has_work
    assert site.learner.trained == [1, 2, 3]


def test_a_run_that_begins_anew_under_its_name_is_trained(participant, site, started):
    """The store was emptied, the workspace kept: a low round that is said later is a new one."""
    for number in (1, 2, 3):
        train(participant, started, number)
    participant.on_round_started(started(1, said=100.0), "coordinator")
    participant.work()
    participant.on_round_started(started(2, said=101.0), "coordinator")
    participant.work()
    assert site.learner.trained == [1, 2, 3, 1, 2]


def test_an_old_round_does_not_displace_the_open_one(participant, site, started):
    """Neither on the agenda nor before it."""
    train(participant, started, 1)
    participant.on_round_started(started(3), "coordinator")
    participant.on_round_started(started(2), "coordinator")
    while participant.has_work:
        participant.work()
    assert site.learner.trained == [1, 3]
    inbox = Agenda()
    for number in (3, 2):
        inbox.note(started(number))
    assert inbox.take(0.0).round == 3
    assert inbox.take(0.0) is None


def test_an_old_grant_does_not_displace_the_new_one(participant, site, started):
    """Or the upload would wait for the next time that the site says it is there."""
    for number in (1, 2):
        train(participant, started, number)
    participant.on_upload_granted(granted(site, 2), "coordinator")
    participant.on_upload_granted(granted(site, 1), "coordinator")
    while participant.has_work:
        participant.work()
    assert site.transfer.sent == ["https://store/2"]


def test_grants_of_two_deltas_do_not_displace_each_other(participant, site, started):
    """Where late deltas are carried, one may be under way beside the open round's: both are sent.

    So it is before they are looked at, while a training is in hand.
    """
    for number in (1, 2):
        participant.on_round_started(started(number), "coordinator")
        participant.work()
    grants = [granted(site, number) for number in (1, 2)]
    inbox = Agenda()
    for grant in grants:
        inbox.note(grant)
    assert [inbox.take(0.0), inbox.take(0.0)] == grants
    for grant in grants:
        participant.on_upload_granted(grant, "coordinator")
    while participant.has_work:
        participant.work()
    assert site.transfer.sent == ["https://store/1", "https://store/2"]


def test_the_residual_that_a_round_on_the_agenda_begins_from_is_not_swept(
    participant, site, started
):
    """Round 3 was told before round 2's late delta was taken: it begins from round 1's residual.

    Then a broker says once more that round 2 is closed.
    """
    feedback = {"codec": "int4", "feedback": True}
    for number in (1, 2):
        event = started(number).model_copy(update=feedback)
        participant.on_round_started(event, "coordinator")
        participant.work()
    first, second = (granted(site, number).sha for number in (1, 2))
    third = started(3).model_copy(update={**feedback, "last_accepted": first})
    participant.on_round_started(third, "coordinator")
    for number, sha in ((1, first), (2, second)):
        answer = DeltaAnswered(run="r", round=number, sha=sha, verdict="accepted")
        participant.on_delta_answered(answer, "coordinator")
    closed = RoundClosed(run="r", round=2, result_sha=third.source_sha, late_counts=True)
    participant.on_round_closed(closed, "coordinator")
    participant.work()
    assert participant.trained.round == 3
    assert participant.trained.residual == "kept"


def test_an_old_answer_does_not_call_off_an_upload(participant, site, started):
    """Only the answer about the very delta does."""
    for number in (1, 2):
        train(participant, started, number)
    participant.on_upload_granted(granted(site, 2), "coordinator")
    old = granted(site, 1).sha
    for sha, waits in ((old, True), (granted(site, 2).sha, False)):
        answer = DeltaAnswered(run="r", round=1, sha=sha, verdict="accepted")
        participant.on_delta_answered(answer, "coordinator")
        assert participant.has_work == waits


def test_only_the_training_in_hand_is_called_off(participant, site, started):
    """Not the same round of a run that begins anew under its name."""
    closed = RoundClosed(run="r", round=1, result_sha="0" * 64)
    site.learner.fault = lambda _: participant.hear(closed)  # the listener hears it meanwhile
    participant.on_round_started(started(1), "coordinator")
    participant.work()
    assert site.learner.trained == []
    assert not participant.has_work
    site.learner.fault = lambda _: None
    participant.on_round_started(started(1), "coordinator")
    while participant.has_work:
        participant.work()
    assert site.learner.trained == [1]


def test_the_newest_round_is_never_swept(participant, site, started):
    """A site that is not selected for a while needs its optimiser state afterwards."""
    train(participant, started, 1)
    kept = site.workspace.newest("r")
    for number in (2, 3):
        closed = RoundClosed(run="r", round=number, result_sha=started(number).source_sha)
        participant.on_round_closed(closed, "coordinator")
    assert site.workspace.committed("r", 1, kept.sha) == kept
