"""Every event on the bus: frozen, versioned, in the past tense. The sender is never in the body.

A reader of version n takes any message of version n: unknown fields are ignored, missing and
mistyped ones are a DecodeError (``wire.py``). A change that old readers cannot ignore gets
a new version number. ``word`` is the last part of the routing key. Everything has a bound.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
)

from shared.config import (
    BaseSection,
    LoraSection,
    Name,
    PrivacySection,
    Sha256,
    TrainingSection,
)
from shared.modes import Origin
from shared.protocol.bounds import Amount, Count, Figure, Most, Prose, Url, Within, Word
from shared.protocol.manifest import (
    AuditFigures,
    BasesFound,
    HeldOut,
    LocalMetrics,
    Manifest,
    Numerics,
    Schema,
    Traffic,
)
from shared.protocol.privacy import PrivacySpent
from shared.protocol.said import Said
from shared.protocol.secure import (
    Exchange,
    MaskedWith,
    Revealed,
    SecureTerms,
    ShaBySite,
    SharesBySite,
    Signature,
    SignatureBySite,
)
from shared.topology import REFUSED_BYTES

AWAITS_APPROVAL = "approval"  # an activity: nothing goes on until a person at the site says so
MOST_UPDATES = 32  # of one offer
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


class WirePrivacy(PrivacySection):
    """The privacy section as a site reads it. No setting of it may be ignored."""

    fewest: Count | None = None
    """With unit ``site``: no round counts fewer deltas, and each site's noise is made for so many.
    Not there for records.
    """

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if self.fewest is None:
            values.pop("fewest", None)
        return values


class Event(Schema):
    """Base of all events."""

    word: ClassVar[str]
    version: ClassVar[int] = 1
    _said: Said | None = PrivateAttr(default=None)

    @property
    def said(self) -> Said | None:
        """How its sender signed it, checked; None where nobody has to sign. It never travels."""
        return self._said

    def heard(self, said: Said) -> Self:
        """The event with its checked seal beside it."""
        mine = self.model_copy()
        mine._said = said  # noqa: SLF001 - its own class
        return mine


# coordinator -> site -------------------------------------------------------------------------


class BasesOffered(Schema):
    """Where a site fetches the bases of its core adapter, once."""

    sha: Sha256
    """What they are."""
    get_url: Url
    """Where they are."""
    expires_at: Time
    """When the URL ends, seconds since the epoch."""


class UpdateOffered(Schema):
    """Where a site that holds an adapter fetches what leads to the one after it."""

    round: Amount
    """The round that made it."""
    source_sha: Sha256
    """The adapter that it is added to."""
    sha: Sha256
    """What it is."""
    size: Count
    """Its bytes."""
    codec: Word
    """How it is written."""
    get_url: Url
    """Where it is."""


Updates = Annotated[tuple[UpdateOffered, ...], Strict(False), Most(MOST_UPDATES)]
Seed = Annotated[int, Within(0, 2**64)]


class RunAnnounced(Event):
    """Coordinator -> each listed site, when it comes online: here is a run, get ready."""

    word = "announced"
    run: Name
    """The run."""
    config_digest: Sha256
    """sha256 of the run's settings."""
    base: WireBase
    """``[base]`` of the run's settings."""
    lora: WireLora
    """``[lora]`` of the run's settings, as this site is to hold it: its rank may be its own."""
    training: WireTraining
    """``[training]`` of the run's settings."""
    rounds: Count
    """T of the run."""
    participants: Count
    """How many sites the run lists."""
    averaging: Word = "fedavg"
    """{averaging}. With ``round``: which tensors are trained and sent. With ``flora`` a site merges
    what an adapter holds beyond the site's own rank into its base.
    """
    modes: Annotated[tuple[Origin, ...], Strict(False), Most(20)] = ()
    """What a site runs of other packages for it: kind, name, version and distribution."""
    bases: BasesOffered | None = None
    """Where the bases that ``lora.bases`` names are."""
    secure: bool = False
    """Whether every round's deltas are masked: no other round of the run is to be trained."""
    privacy: WirePrivacy | None = None
    """``[privacy]`` of the run's settings; without it the run has none."""


class RoundStarted(Event):
    """Coordinator -> each selected site, when a round opens (and again whenever it asks)."""

    word = "started"
    run: Name
    round: Amount
    """The round."""
    source_sha: Sha256
    """The training source: the adapter that the round begins with and deltas are measured from."""
    get_url: Url
    """Where to fetch the adapter."""
    expires_at: Time
    """When the URLs end, seconds since the epoch."""
    training: WireTraining
    progress_from: Figure
    """Where the round begins on the schedule, 0 to 1."""
    progress_to: Figure
    """Where it ends."""
    seed: Seed
    """The round's seed, derived from the run's."""
    codec: Word
    """How the delta is to travel."""
    attempt: Count = 1
    """Which try of this round, from 1."""
    last_counted: Sha256 | None = None
    """This site's delta that was counted last."""
    averaging: Word = "fedavg"
    feedback: bool = False
    """Whether the site adds what its codec left out of earlier deltas, and keeps what is left."""
    last_accepted: Sha256 | None = None
    """This site's newest delta that was accepted: with feedback, its residual is added. None: there
    is none yet.
    """
    updates: Updates = ()
    """What leads, one after another, from an adapter that the site may hold to the source; together
    fewer bytes than it. The URLs end with the others.
    """
    packed: bool = False
    """Whether the delta's file is to be packed; else it is a safetensors file."""
    privacy: WirePrivacy | None = None
    genesis_seed: Seed | None = None
    """The run's seed, where the run's first adapter, drawn from it, is what the updates start from,
    or without updates the source: the site can draw that itself.
    """
    secure: SecureTerms | None = None
    """How the delta is masked; none: it is not."""

    @property
    def adapter_sha(self) -> str:
        """The adapter to be fetched."""
        return self.source_sha

    @property
    def fetched_sha(self) -> str:
        """The transfer check: sha256 of what ``get_url`` gives, today the source itself."""
        return self.source_sha


class UploadGranted(Event):
    """Coordinator -> site, on UploadRequested: one signed PUT per piece not yet present."""

    word = "granted"
    run: Name
    round: Amount
    sha: Sha256
    """sha256 of the bytes in question."""
    chunk_size: Count
    """Bytes in a piece; the last may be shorter."""
    urls: Annotated[dict[Amount, Url], Most(10_000)]
    """Signed URL by the piece's number, from 0. Where a URL binds ``If-None-Match``, it creates."""
    expires_at: Time


class DeltaAnswered(Event):
    """Coordinator -> site, after its delta was checked (and again whenever it asks)."""

    word = "answered"
    run: Name
    round: Amount
    sha: Sha256
    verdict: Literal["accepted", "refused", "late"]
    """What became of the delta."""
    reason: Prose = ""
    """Why."""


class UnmaskRequested(Event):
    """Coordinator -> each survivor, once it is on record whose masked deltas are summed."""

    word = "unmask"
    run: Name
    round: Amount
    attempt: Count = 1
    """Which try of this round, from 1."""
    survivors: ShaBySite
    """Whose deltas are summed: by site the sha256 of its masked delta."""
    sealed: SharesBySite
    """By surviving neighbour: the shares that it sealed for this site."""
    signatures: SignatureBySite = Field(default_factory=dict)
    """Who signed this very set; none where sites are asked to sign it first."""


class RoundClosed(Event):
    """Coordinator -> every member, when a round's result is on record."""

    word = "closed"
    run: Name
    round: Amount
    result_sha: Sha256
    """Identity of the adapter that came out."""
    late_counts: bool = False
    """Whether a delta of a closed round is still taken, so that a site that trains it continues."""
    by_update: bool = False
    """Whether an update will lead from the adapter before to the next one, so that it is kept."""


class RunFinished(Event):
    """Coordinator -> every member, at the end. With a URL if the site's evaluation is pending."""

    word = "finished"
    run: Name
    round: Amount
    sha: Sha256 | None
    """Identity of the final adapter; none if the run failed before there was one."""
    reason: Prose
    get_url: Url | None = None
    expires_at: Time | None = None
    updates: Updates = ()
    """What leads to the adapter from one that the site may hold, as in ``RoundStarted``."""
    genesis_seed: Seed | None = None
    """As in ``RoundStarted``."""

    @property
    def adapter_sha(self) -> str | None:
        """The adapter to be fetched."""
        return self.sha

    @property
    def fetched_sha(self) -> str | None:
        """The transfer check: sha256 of what ``get_url`` gives, today the adapter itself."""
        return self.sha


# site -> coordinator -------------------------------------------------------------------------


class SiteOnline(Event):
    """Site -> every coordinator, at start and after each reconnect: send what is pending for me."""

    word = "online"
    run: Name | None = None
    round: Amount | None = None
    first: bool = True
    """Whether this process says it for the first time."""


class ParticipantReady(Event):
    """Site -> coordinator, on RunAnnounced: the base model is loaded, this is the adapter."""

    word = "ready"
    run: Name
    config_digest: Sha256
    manifest: Manifest
    """The tensors of the adapter."""
    fingerprint: Sha256
    """Which base model the site holds."""
    numerics: Numerics
    """What the bytes depend on in addition to settings and text."""
    examples: Count
    """How many examples."""
    bases: BasesFound | None = None
    """The bases that it holds, where the adapter has any."""
    base_parameters: Count | None = None
    """Numbers in its base model, packed ones as what they stand for."""
    exchange: Exchange | None = None
    """By what it shares masks with other sites."""
    private: bool = False
    """Whether it trains with the run's ``[privacy]``; an older release does not know of any."""


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
    """Bytes."""
    creates: bool = False
    """Whether this site can use a URL that creates: it sends the headers that a URL binds."""


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
    """Answer tokens."""
    metrics: LocalMetrics
    """What the site tells of its training."""
    state: Literal["fresh", "kept"] = "fresh"
    """Whether the optimiser started fresh or kept its state."""
    residual: Literal["none", "kept", "lost"] = "none"
    """Whether the residual of ``last_accepted`` was added; ``lost``: the site no longer has it."""
    traffic: Traffic | None = None
    """Bytes that the site moved since its delta before, up to this word."""
    attempt: Count | None = None
    """Which try of the round this is of, from 1."""
    fingerprint: Sha256 | None = None
    """Which base model it was trained over."""
    codec: Word | None = None
    """How the delta travels."""
    masked: MaskedWith | None = None
    """What goes with the delta where it is masked."""
    number: Count = 1
    """For which attempt at the round it is masked, from 1."""
    privacy: PrivacySpent | None = None
    """What its noise leaves to be learnt of a record; none in a run without ``[privacy]``."""
    audit: AuditFigures | None = None
    """What the site's audit of the delta came to; none where it makes none."""


class UnmaskAnswered(Event):
    """Site -> coordinator, on UnmaskRequested: the one answer, kept at the site before it goes."""

    word = "unmasked"
    run: Name
    round: Amount
    attempt: Count = 1
    revealed: Revealed
    """What it reveals."""


class SurvivorsSigned(Event):
    """Site -> coordinator, on UnmaskRequested without signatures: it stands by this set alone."""

    word = "signed"
    run: Name
    round: Amount
    attempt: Count = 1
    signature: Signature
    """Of the cohort and the set of survivors, by the site's own key."""


class TrainingFailed(Event):
    """Site -> coordinator: the local training of a round ended without a delta, and why."""

    word = "failed"
    run: Name
    round: Amount
    attempt: Annotated[int, Field(ge=1, le=1_000_000)]
    reason: Prose
    retryable: bool = False
    """Whether trying again may help."""


class TrainingProgressed(Event):
    """Site -> coordinator, every few seconds while it works; expires unread within seconds.

    ``activity``: load, evaluate, train or upload, or approval while a person at the site is to
    approve the run; ``step`` of ``of``. ``tokens_per_second`` is of
    the training, bytes are of this process. No record is made of it.
    """

    word = "progressed"
    run: Name
    round: Amount
    activity: Annotated[str, Most(20)]
    """What it is doing: ``load``, ``evaluate``, ``train`` or ``upload``; or ``approval``: it waits.
    """
    step: Amount
    """How many steps are done."""
    of: Amount
    """How many steps there are."""
    seconds: Annotated[Figure, Field(ge=0)]
    """Since this activity began."""
    tokens_per_second: Figure | None = None
    """Answer tokens trained on in a second."""
    bytes_down: Amount = 0
    """Bytes fetched by this process."""
    bytes_up: Amount = 0
    """Bytes sent by this process."""


class AdapterEvaluated(Event):
    """Site -> coordinator, on RunFinished: the held-out loss of the final adapter."""

    word = "evaluated"
    run: Name
    round: Amount
    sha: Sha256
    """Identity of the adapter that was measured."""
    held_out: HeldOut
    """Loss on text that no participant trained on."""
    traffic: Traffic | None = None
    """Bytes that the site moved since its last delta."""


class MessageRefused(Event):
    """Whoever could not use a message -> the refused queue: its bytes, its sender and why.

    ``reported_by``: a site that told the coordinator; queue and sender are then its word alone.
    """

    word = "refused"
    run: Name | None = None
    reported_by: Name | None = None
    """The site that could not use it; none if the coordinator could not."""
    queue: Prose
    """The queue it came from."""
    routing_key: Prose | None = None
    """The key that it came by; a site's names the site."""
    sender: Prose | None
    """The account that sent it."""
    reason: Prose
    data: Annotated[bytes, Strict(True), Most(REFUSED_BYTES)]
    """The message as it came."""


# coordinator -> itself -----------------------------------------------------------------------


class CoordinatorTick(Event):
    """Coordinator -> its own queue, every few seconds: time passed. Old ticks expire."""

    word = "tick"
    run: Name
    writer: Word
    """The process that wrote it."""
    now: Time
    """Seconds since the epoch."""


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
        UnmaskRequested,
        UnmaskAnswered,
        SurvivorsSigned,
        CoordinatorTick,
    )
}
