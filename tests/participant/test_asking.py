"""A site that is refused asks again, and does not spin."""

from __future__ import annotations

import pytest

from participant.handlers import ASKS, Participant
from participant.site import Site
from participant.workspace import Workspace
from shared.errors import GrantError
from shared.protocol import wire
from shared.protocol.events import (
    DeltaSubmitted,
    RoundStarted,
    RunAnnounced,
    SiteOnline,
    UploadGranted,
    UploadRequested,
    WireBase,
    WireLora,
    WireTraining,
)
from shared.tensors.genesis import draw_adapter
from tests.numpy_learner import ANYTHING, MANIFEST, NumpyLearner

TRAINING = WireTraining(local_steps=1)
ANNOUNCED = RunAnnounced(
    run="r",
    config_digest="b" * 64,
    base=WireBase(model="m"),
    lora=WireLora(),
    training=TRAINING,
    rounds=1,
    participants=1,
)


class Outbox:
    """Keeps what is published."""

    def __init__(self):
        self.events = []

    def publish(self, messages):
        self.events += [wire.decode(message.body).event for message in messages]


class Refusing:
    """A store that takes no URL: another host was signed for, or a clock is wrong."""

    def download(self, url, path, sha256):
        raise GrantError("signed URL: refused")

    upload = download


@pytest.fixture
def site(tmp_path):
    return Site(
        name="a",
        outbox=Outbox(),
        transfer=Refusing(),
        workspace=Workspace(tmp_path),
        learner=NumpyLearner("a"),
        clock=lambda: 1000.0,
        accept=ANYTHING,
    )


def round_started(expires_at: float) -> RoundStarted:
    return RoundStarted(
        run="r",
        round=1,
        source_sha="a" * 64,
        get_url="https://store/k",
        expires_at=expires_at,
        training=TRAINING,
        progress_from=0.0,
        progress_to=1.0,
        seed=1,
        codec="fp32",
    )


def asked(site: Site) -> int:
    return sum(isinstance(event, SiteOnline) for event in site.outbox.events)


def test_a_round_whose_url_is_over_is_asked_for_a_few_times_a_minute(site):
    """However often the coordinator answers with another: this clock may be wrong."""
    participant = Participant(site)
    for _ in range(20):
        participant.on_round_started(round_started(999.0), "coordinator")
    assert asked(site) == ASKS
    assert not participant.has_work


class Sending:
    """Brings any adapter, takes no chunk the first time."""

    def __init__(self, adapter):
        self.adapter, self.refused = adapter, 0

    def download(self, url, path, sha256):
        path.write_bytes(self.adapter)
        return len(self.adapter)

    def upload(self, url, path, start, length):
        if not self.refused:
            self.refused += 1
            raise GrantError("signed URL: expired")


def test_an_expired_upload_is_granted_anew(tmp_path):
    """The round is announced again at once, and the same delta is asked for, not trained, again."""
    adapter = tmp_path / "adapter"
    digest = draw_adapter(MANIFEST, 1, adapter)
    outbox = Outbox()
    learner = NumpyLearner("a")
    site = Site(
        name="a",
        outbox=outbox,
        transfer=Sending(adapter.read_bytes()),
        workspace=Workspace(tmp_path / "w"),
        learner=learner,
        clock=lambda: 1000.0,
        accept=ANYTHING,
    )
    participant = Participant(site)
    participant.on_run_announced(ANNOUNCED, "coordinator")
    participant.work()
    started = round_started(2000.0).model_copy(update={"source_sha": digest.sha256})
    participant.on_round_started(started, "coordinator")
    participant.work()
    for _ in range(2):
        (wanted,) = [e for e in outbox.events if isinstance(e, UploadRequested)]
        outbox.events.clear()
        participant.on_round_started(started, "coordinator")  # again, while it is under way
        assert outbox.events == []
        granted = UploadGranted(
            run="r",
            round=1,
            sha=wanted.sha,
            chunk_size=2**24,
            urls={0: "https://store/0"},
            expires_at=2000.0,
        )
        participant.on_upload_granted(granted, "coordinator")
        participant.work()
        if asked(site):
            participant.on_round_started(started, "coordinator")
    assert site.transfer.refused == 1
    assert learner.trained == [1]
    assert [type(e) for e in outbox.events] == [DeltaSubmitted]


def test_a_store_that_refuses_every_url_is_not_asked_on_and_on(site):
    """Twenty grants, twenty refusals, three questions."""
    participant = Participant(site)
    participant.on_run_announced(ANNOUNCED, "coordinator")
    participant.work()
    for _ in range(20):
        participant.on_round_started(round_started(2000.0), "coordinator")
        participant.work()
    assert asked(site) == ASKS
