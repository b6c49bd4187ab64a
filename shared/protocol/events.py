"""Every event on the bus: frozen, versioned, in the past tense. The sender is never in the body.

A reader of version n takes any message of version n: unknown fields are ignored, missing and
mistyped ones are a DecodeError (``wire.py``). A change that old readers cannot ignore gets
a new version number. ``word`` is the last part of the routing key. Everything has a bound.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, Strict

from shared.config import AveragingName, BaseSection, LoraSection, Name, Sha256, TrainingSection
from shared.protocol.bounds import Amount, Count, Figure, Most, Prose, Url, Within, Word
from shared.protocol.manifest import HeldOut, LocalMetrics, Manifest, Numerics, Schema
from shared.topology import REFUSED_BYTES

Time = Annotated[float, Within(0, 1e11)]  # seconds since the epoch


class WireBase(BaseSection):
    """The base section as a site reads it: settings of a newer release are ignored."""

    model_config = ConfigDict(extra="ignore")


class WireLora(LoraSection):
    """The lora section as a site reads it."""

    model_config = ConfigDict(extra="ignore")


class WireTraining(TrainingSection):
    """The training section as a site reads it."""

    model_config = ConfigDict(extra="ignore")


class Event(Schema):
    """Base of all events."""

    word: ClassVar[str]
    version: ClassVar[int] = 1


# coordinator -> site -------------------------------------------------------------------------


class RunAnnounced(Event):
    """Coordinator -> each listed site, when it comes online: here is a run, get ready.

    ``lora``: as this site is to hold it; its rank may be its own. ``averaging``: with ``flora`` the
    site merges what an adapter holds beyond that rank into its base.
    """

    word = "announced"
    run: Name
    config_digest: Sha256
    base: WireBase
    lora: WireLora
    training: WireTraining
    rounds: Count
    participants: Count
    averaging: AveragingName = "fedavg"


class RoundStarted(Event):
    """Coordinator -> each selected site, when a round opens (and again whenever it asks).

    ``averaging`` and ``round`` say which tensors are trained and sent.
    """

    word = "started"
    run: Name
    round: Amount
    source_sha: Sha256
    get_url: Url
    expires_at: Time
    training: WireTraining
    progress_from: Figure
    progress_to: Figure
    seed: Annotated[int, Within(0, 2**64)]
    codec: Word
    attempt: Count = 1
    last_counted: Sha256 | None = None
    averaging: AveragingName = "fedavg"


class UploadGranted(Event):
    """Coordinator -> site, on UploadRequested: one signed PUT per chunk not yet present."""

    word = "granted"
    run: Name
    round: Amount
    sha: Sha256
    chunk_size: Count
    urls: Annotated[dict[Amount, Url], Most(10_000)]
    expires_at: Time


class DeltaAnswered(Event):
    """Coordinator -> site, after its delta was checked (and again whenever it asks)."""

    word = "answered"
    run: Name
    round: Amount
    sha: Sha256
    verdict: Literal["accepted", "refused", "late"]
    reason: Prose = ""


class RoundClosed(Event):
    """Coordinator -> every member, when a round's result is on record.

    ``late_counts``: a delta of a closed round is still taken, so a site that trains it continues.
    """

    word = "closed"
    run: Name
    round: Amount
    result_sha: Sha256
    late_counts: bool = False


class RunFinished(Event):
    """Coordinator -> every member, at the end. With a URL if the site's evaluation is pending."""

    word = "finished"
    run: Name
    round: Amount
    sha: Sha256 | None
    reason: Prose
    get_url: Url | None = None
    expires_at: Time | None = None


# site -> coordinator -------------------------------------------------------------------------


class SiteOnline(Event):
    """Site -> every coordinator, at start and after each reconnect: send what is pending for me."""

    word = "online"
    run: Name | None = None
    round: Amount | None = None
    first: bool = True


class ParticipantReady(Event):
    """Site -> coordinator, on RunAnnounced: the base model is loaded, this is the adapter."""

    word = "ready"
    run: Name
    config_digest: Sha256
    manifest: Manifest
    fingerprint: Sha256
    numerics: Numerics
    examples: Count


class RunDeclined(Event):
    """Site -> coordinator, on RunAnnounced: I cannot or may not take part, and why."""

    word = "declined"
    run: Name
    reason: Prose


class UploadRequested(Event):
    """Site -> coordinator, after training: I hold this delta, say where to put it."""

    word = "requested"
    run: Name
    round: Amount
    sha: Sha256
    size: Count


class DeltaSubmitted(Event):
    """Site -> coordinator, after the last chunk is up: check and count it."""

    word = "submitted"
    run: Name
    round: Amount
    source_sha: Sha256
    sha: Sha256
    size: Count
    examples: Count
    tokens: Count
    metrics: LocalMetrics
    state: Literal["fresh", "kept"] = "fresh"


class TrainingFailed(Event):
    """Site -> coordinator: the local training of a round ended without a delta, and why."""

    word = "failed"
    run: Name
    round: Amount
    attempt: Annotated[int, Field(ge=1, le=1_000_000)]
    reason: Prose
    retryable: bool = False


class TrainingProgressed(Event):
    """Site -> coordinator, every few seconds while it works; expires unread within seconds.

    ``activity``: load, evaluate, train or upload; ``step`` of ``of``. ``tokens_per_second`` is of
    the training, bytes are of this process. No record is made of it.
    """

    word = "progressed"
    run: Name
    round: Amount
    activity: Annotated[str, Most(20)]
    step: Amount
    of: Amount
    seconds: Annotated[Figure, Field(ge=0)]
    tokens_per_second: Figure | None = None
    bytes_down: Amount = 0
    bytes_up: Amount = 0


class AdapterEvaluated(Event):
    """Site -> coordinator, on RunFinished: the held-out loss of the final adapter."""

    word = "evaluated"
    run: Name
    round: Amount
    sha: Sha256
    held_out: HeldOut


class MessageRefused(Event):
    """Whoever could not use a message -> the refused queue: its bytes, its sender and why.

    ``reported_by``: a site that told the coordinator; queue and sender are then its word alone.
    """

    word = "refused"
    run: Name | None = None
    reported_by: Name | None = None
    queue: Prose
    routing_key: Prose | None = None
    sender: Prose | None
    reason: Prose
    data: Annotated[bytes, Strict(True), Most(REFUSED_BYTES)]


# coordinator -> itself -----------------------------------------------------------------------


class CoordinatorTick(Event):
    """Coordinator -> its own queue, every few seconds: time passed. Old ticks expire."""

    word = "tick"
    run: Name
    writer: Word
    now: Time


EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunAnnounced,
        RoundStarted,
        UploadGranted,
        DeltaAnswered,
        RoundClosed,
        RunFinished,
        SiteOnline,
        ParticipantReady,
        RunDeclined,
        UploadRequested,
        DeltaSubmitted,
        TrainingFailed,
        TrainingProgressed,
        AdapterEvaluated,
        MessageRefused,
        CoordinatorTick,
    )
}
