"""The ledger's records: what each JSON object of a run says. Immutable facts, one type each.

``writer`` and ``time`` are stamped when a record is written; nothing that changes a result may
depend on them. ``GenesisRecord`` and ``ClosedRecord`` carry neither: they are pure functions of the
records before them, so whoever computes them writes the same bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, StringConstraints, model_validator

from shared import topology
from shared.config import FederationConfig, Name, Sha256
from shared.errors import ConfigError
from shared.modes import Origin, require
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
from shared.protocol.record import (
    HEAD_FORM,
    MOST,
    ControlNumber,
    Names,
    Number,
    Record,
    RoundNumber,
    SaidRecord,
    Size,
    StampedRecord,
    delta_label,
)
from shared.protocol.secure import Exchange, MaskedWith, Revealed, SecureTerms
from shared.trust.keys import PublicText

Named = dict[Annotated[str, StringConstraints(max_length=300)], Sha256]


class FederationRecord(StampedRecord):
    """The resolved config: everything that can change the result."""

    newer = ("modes", "signed_by")
    config: dict[str, Any]
    """All settings but ``[store]`` and ``[simulation]``."""
    digest: Sha256
    """sha256 of the settings."""
    modes: Annotated[tuple[Origin, ...], Strict(False)] = ()
    """Modes of other packages that the settings name: kind, name, version and distribution. Not
    there where they name none.
    """
    signed_by: PublicText | None = None
    """The key that signs all that its coordinator says and records, and that demands as much of
    its sites. Not there where nobody signs.
    """

    def settings(self, run: str) -> FederationConfig:
        """The config. Raises ConfigError, or MissingPackageError if a mode of it is not here."""
        try:
            return FederationConfig.from_record(self.config, self.key(run))
        except ConfigError:
            require(self.modes, f"run {run}")
            raise

    def key(self, run: str) -> str:
        """One per run."""
        return topology.federation_key(run)


class MemberRecord(SaidRecord):
    """A site that is ready: what its adapter looks like and what it computes with."""

    decides = True
    newer = ("bases", "base_parameters", "said", "exchange")
    site: Name
    manifest: Manifest
    fingerprint: Sha256
    numerics: Numerics
    examples: Size
    from_round: RoundNumber = 0
    """The round from which it takes part."""
    bases: BasesFound | None = None
    """The bases that it holds. Not there where the adapter has none."""
    base_parameters: Size | None = None
    """Numbers in its base model, packed ones as what they stand for; not there if it did not say.
    """
    exchange: Exchange | None = None
    """With ``aggregation.secure``: by what it shares masks with other sites. Not there without."""

    @property
    def word(self) -> int:
        """Which answer of this site it is: the first one, unless the record says otherwise."""
        return 1

    def key(self, run: str) -> str:
        """One per site."""
        return topology.member_key(run, self.site)


class RejoinedRecord(MemberRecord):
    """A further answer of a site that did not fit at first. Its last one counts."""

    number: Annotated[int, Field(ge=2, le=MOST)]
    """Which answer of this site it is; its last one counts."""

    @property
    def word(self) -> int:
        """Its number."""
        return self.number

    def key(self, run: str) -> str:
        """Numbered from 2: the first answer is the member's record."""
        return topology.rejoined_key(run, self.site, self.number)


class DeclinedRecord(SaidRecord):
    """A site that does not take part, and why."""

    site: Name
    reason: str

    def key(self, run: str) -> str:
        """One per site."""
        return topology.declined_key(run, self.site)


class OriginRecord(StampedRecord):
    """A branch: the run begins with this adapter of another run, not with a drawn one."""

    parent: Name
    """The run it branches from."""
    parent_digest: Sha256
    """sha256 of that run's settings."""
    parent_round: RoundNumber
    """The round whose adapter it is."""
    adapter_sha: Sha256
    """Identity of the adapter that came out."""
    adapter_size: Size
    """Its bytes."""
    manifest: Manifest
    fingerprint: Sha256
    lora_alpha: float
    """The parent's ``lora.alpha``."""
    lora_scaling: Literal["classic", "rslora"] = "classic"
    """The parent's ``lora.scaling``."""

    @property
    def label(self) -> str:
        """``PARENT@ROUND``; no run's name holds an ``@``."""
        return f"{self.parent}@{self.parent_round}"

    def key(self, run: str) -> str:
        """One per run."""
        return topology.origin_key(run)


class ControlRecord(StampedRecord):
    """What an operator asks of a run. ``coordinator.round.controls`` says what it means."""

    number: Number
    """Which one, from 1."""
    action: Literal["pause", "resume", "stop", "extend", "exclude"]
    """What is asked."""
    rounds: Number | None = None
    """With ``extend``: how many more."""
    site: Name | None = None
    """With ``exclude``: whom."""
    reason: str
    by: str
    """Who asked: account@machine."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.rounds is not None) != (self.action == "extend"):
            raise ValueError("rounds: expected with extend, and only there")
        if (self.site is not None) != (self.action == "exclude"):
            raise ValueError("site: expected with exclude, and only there")
        return self

    def key(self, run: str) -> str:
        """Numbered from 1."""
        return topology.control_key(run, self.number)


class PrunedRecord(StampedRecord):
    """Objects that an operator deleted. Written before the first of them is deleted."""

    newer = ("erased",)
    number: Number
    """Which one, from 1."""
    keep: str
    """What was to be kept: ``all``, ``adapters`` or ``last:N``; of an erasure ``records``."""
    erased: str = ""
    """What was to be gone: ``all``, ``round 3``, ``site north``, ``round 3 of site north``. Not
    there where objects were deleted to make room.
    """
    keys: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
    """The objects."""
    reason: str
    by: str
    """Who asked: account@machine."""

    @property
    def did(self) -> str:
        """What became of the objects, in a word."""
        return "erased" if self.erased else "pruned"

    def key(self, run: str) -> str:
        """Numbered from 1."""
        return topology.pruned_key(run, self.number)


class DeletingRecord(StampedRecord):
    """The whole run is being deleted, by an operator or to start over. Nothing of it counts."""

    by: str
    """Who asked: account@machine."""

    def key(self, run: str) -> str:
        """One per run."""
        return topology.deleting_key(run)


class GenesisRecord(Record):
    """Round 0: who is in, and the adapter drawn from the run's seed (or its origin's)."""

    round: Literal[0] = 0
    members: Names
    """The sites that are in."""
    manifest: Manifest
    fingerprint: Sha256
    adapter_sha: Sha256
    adapter_size: Size
    origin: str | None = None
    """What the run branches from: ``RUN@ROUND``; none if its adapter was drawn."""

    def key(self, run: str) -> str:
        """The result of round 0."""
        return topology.round_key(run, 0, "closed")


class OpenedRecord(StampedRecord):
    """A round begins: who trains from what, with which seed, on which span of the schedule.

    A masked round that is left with too few sites is opened again: what is on record of it then,
    but for its result, lies in a folder of its own below it, ``again/002/``.
    """

    decides = True
    newer = ("secure",)
    round: Number
    selected: Names
    """The sites that train."""
    source_sha: Sha256
    seed: int
    progress_from: float
    progress_to: float
    deadline_seconds: float | None = None
    """How long the coordinator waits for all sites."""
    grace_seconds: float = 0.0
    """How long it still waits for all sites after the deadline."""
    rounds: int | None = None
    """T when the round opened, with every extension."""
    members: Names = ()
    """The sites among which it was selected."""
    controls: ControlNumber = 0
    """How many control records were in force."""
    secure: SecureTerms | None = None
    """With ``aggregation.secure``: how its deltas are masked. Not there without."""

    @property
    def closes_at(self) -> float | None:
        """When a quorum is enough: seconds since the epoch; None without a deadline."""
        if self.deadline_seconds is None:
            return None
        return self.time + self.deadline_seconds + self.grace_seconds

    @property
    def number(self) -> int:
        """Which attempt at the round it is, from 1."""
        return self.secure.number if self.secure is not None else 1

    def key(self, run: str) -> str:
        """One per attempt at a round."""
        return topology.round_key(run, self.round, "opened", self.number)


class AcceptedRecord(SaidRecord):
    """A VALID delta (not yet a counted one): it is in the store and passed its checks."""

    decides = True
    newer = ("residual", "traffic", "said", "masked", "privacy", "audit", "number")
    round: Number
    site: Name
    sha: Sha256
    size: Size
    examples: Size
    tokens: Size
    norm: float
    """L2 norm of the delta as it was sent, feedback included; 0 where it is masked."""
    metrics: LocalMetrics
    state: Literal["fresh", "kept"]
    residual: Literal["none", "kept", "lost"] = "none"
    """What the site said of its residual. Not there where it is ``none``."""
    traffic: Traffic | None = None
    """Bytes that the site moved since its delta before, up to the word of this one. Not there if it
    did not say.
    """
    masked: MaskedWith | None = None
    """What goes with the delta where it is masked. Not there where it is not."""
    privacy: PrivacySpent | None = None
    """What its site's noise leaves to be learnt of a record, by the site's word. Not there in a run
    without ``[privacy]``.
    """
    audit: AuditFigures | None = None
    """What the site's audit of it came to, by its own word. Not there where it makes none."""
    number: Number = 1
    """Which attempt at the round it is masked for. Not there where it is the first."""

    @property
    def remark(self) -> str:
        """What whoever looks at the round is to know of this delta; nothing if all is as usual."""
        if self.residual != "lost":
            return ""
        return "what its codec left out of earlier deltas was lost with its workspace"

    def key(self, run: str) -> str:
        """One per site and attempt at a round."""
        return topology.accepted_key(run, self.round, self.site, self.number)


class RefusedRecord(SaidRecord):
    """A delta that was not taken, and why."""

    round: RoundNumber
    site: Name
    sha: Sha256
    verdict: Literal["refused", "late"] = "refused"
    reason: str

    def key(self, run: str) -> str:
        """One per site, round and sha."""
        return topology.refused_key(run, self.round, self.site, self.sha)


class FailedRecord(SaidRecord):
    """A local training that ended without a delta, and why."""

    round: Number
    site: Name
    attempt: Number
    reason: str
    retryable: bool

    def key(self, run: str) -> str:
        """One per site, round and attempt."""
        return topology.failed_key(run, self.round, self.site, self.attempt)


class Input(Schema):
    """One delta that counts."""

    site: Name
    """The site."""
    from_round: Number
    """The round it was trained in, which may be an earlier one."""
    sha: Sha256
    weight: float
    """Its share of the mean; the shares of a round sum to 1."""
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What its values are multiplied by first; below 1 where its norm was clipped."""

    def label(self, round_number: int) -> str:
        """What it is called in round ``round_number``'s figures: ``site``, or ``site@round``."""
        return delta_label(self.site, self.from_round, round_number)


class ClosingRecord(StampedRecord):
    """THE DECISION, durable before any arithmetic: which deltas count, with which weight."""

    decides = True
    newer = ("number",)
    round: Number
    source_sha: Sha256
    inputs: Annotated[tuple[Input, ...], Strict(False), Field(min_length=1)]
    """The deltas that count, in order, with their weights."""
    excluded: dict[str, str] = Field(default_factory=dict)
    """Sites left out, each with the reason."""
    weighting: str = ""
    """The rule that gave the weights."""
    controls: ControlNumber = 0
    number: Number = 1
    """Which attempt at the round it decides. Not there where it is the first."""

    def key(self, run: str) -> str:
        """One per attempt at a round."""
        return topology.round_key(run, self.round, "closing", self.number)


class UnmaskedRecord(SaidRecord):
    """What a survivor revealed once the decision was on record: never a word on one delta."""

    newer = ("said", "number")
    round: Number
    site: Name
    revealed: Revealed
    """What it revealed."""
    number: Number = 1
    """In which attempt at the round. Not there where it is the first."""

    def key(self, run: str) -> str:
        """One per site and attempt at a round."""
        return topology.unmasked_key(run, self.round, self.site, self.number)


class ClosedRecord(Record):
    """THE RESULT: a pure function of closing.json and the objects that it names."""

    newer = ("exact_sha", "update_sha", "update_size", "reaches")
    round: Number
    adapter_sha: Sha256
    adapter_size: Size
    mean_norm: float
    """L2 norm of what the rule made of the deltas (their weighted mean, by default)."""
    delta_norms: dict[str, float]
    """By site: L2 norm of its delta as sent, before any scale."""
    cosines: dict[str, float]
    """By site: cosine between its delta and what was made of all (the mean, by default)."""
    source_held_out: HeldOut | None
    """Loss of the adapter the round began with, over all sites."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """By delta: why the rule did not take it."""
    exactness_gap: float | None = None
    """Frobenius norm of mean(BA) - mean(B) mean(A), the factors before their scaling; for ``svd``
    of what rank r leaves of mean(BA), for ``flora`` 0. Null with a rule other than the mean.
    """
    server_sha: Sha256 | None = None
    """State of the server optimiser after this round; none if it has no state."""
    step_norm: float | None = None
    """L2 norm of what the server optimiser added; none if the mean was added as it is."""
    gradient_energy: dict[str, Annotated[tuple[float, ...], Strict(False)]] = Field(
        default_factory=dict
    )
    """With ``range-finder``: by layer, squared norms of parts of the mean gradient. In round 1 an
    estimate of what no direction found holds; in even rounds what the first 8, 16, 32 ..., the
    wanted and all directions hold.
    """
    exact_sha: Sha256 | None = None
    """With ``codec.down``: the coordinator's exact adapter, of which the sites' is what the updates
    gave so far. Not there without.
    """
    update_sha: Sha256 | None = None
    """With ``codec.down``: what led from the adapter before to this one. Not there without."""
    update_size: Size | None = None
    """Its bytes. Not there without."""
    reaches: Annotated[tuple[float, ...], Strict(False)] | None = None
    """With ``aggregation.secure``: by tensor of the adapter, in the order of their names, the
    largest value that will pass uncut in the next round that trains it. Not there without.
    """

    def key(self, run: str) -> str:
        """One per round."""
        return topology.round_key(run, self.round, "closed")


class EvaluatedRecord(SaidRecord):
    """A site's held-out loss of the adapter that round ``round`` produced."""

    newer = ("traffic", "said")
    round: RoundNumber
    site: Name
    sha: Sha256
    """Identity of the adapter that was measured."""
    held_out: HeldOut
    traffic: Traffic | None = None
    """Bytes that the site moved since its last delta. Not there if it did not say."""

    def key(self, run: str) -> str:
        """One per site and round."""
        return topology.evaluated_key(run, self.round, self.site)


class FinishedRecord(StampedRecord):
    """The end."""

    decides = True
    round: RoundNumber
    sha: Sha256 | None
    """Identity of the run's final adapter; none if it failed before there was one."""
    reason: str
    failed: bool = False
    """Whether the run ended without a result."""
    controls: ControlNumber = 0

    def key(self, run: str) -> str:
        """One per run."""
        return topology.finished_key(run)


class LinkRecord(StampedRecord):
    """One link of the chain: it names the link before and each record since, by their bytes.

    Written once these are durable and before anything of them is said. So whoever holds the digest
    of one link holds that of every record before it.
    """

    decides = True
    newer = ("found", "keys")
    run: Name
    """The run: a link is worth nothing in another one."""
    number: Number
    """Which one, from 1."""
    previous: Sha256 | None
    """sha256 of the link before; none for the first."""
    records: Named
    """What its writer recorded since the link before: name below the run, sha256 of the bytes."""
    found: Named = Field(default={})
    """What its writer met on record, and no link named: of operators, of a coordinator that was
    killed before its link, of an earlier release. Not there where it is nothing.
    """
    keys: Annotated[str, StringConstraints(pattern=HEAD_FORM)] | None = None
    """The newest of the sites' enrolled keys that its writer knew: number and sha256 of that
    record. Not there where nobody signs, or no key was enrolled yet.
    """

    def key(self, run: str) -> str:
        """Numbered from 1, in the run that it names."""
        del run  # a link of another run does not belong where it was found
        return topology.link_key(self.run, self.number)
