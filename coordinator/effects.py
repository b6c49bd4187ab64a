"""Carries out what the state machine asks for: records, adapters, announcements.

Durable steps return the record that came of them, to be folded in. Each may be repeated: objects
are content-addressed and records conditional, so the second time meets the first one's result.
Notifications are published and forgotten: a restart sends them again from the ledger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.closing import Method, aggregate
from coordinator.aggregation.genesis import draw_adapter
from coordinator.aggregation.server_optimizer import StateFiles
from coordinator.round.state import (
    Aggregate,
    AnnounceClosed,
    AnnounceFinished,
    AnnounceRound,
    AnnounceRun,
    AnswerDelta,
    MakeGenesis,
    WriteRecord,
)
from shared import modes, topology
from shared.adapters import kind_of
from shared.disk.durable_files import file_errors
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.methods.averaging import delta_manifest, get_averaging
from shared.methods.inputs import WeightedDelta
from shared.protocol.events import (
    BasesOffered,
    DeltaAnswered,
    Event,
    MessageRefused,
    RoundClosed,
    RoundStarted,
    RunAnnounced,
    RunFinished,
    UploadGranted,
    WireBase,
    WireLora,
    WireTraining,
)
from shared.protocol.manifest import pool_held_out
from shared.protocol.messages import to_refused, to_site
from shared.protocol.records import AcceptedRecord, ClosedRecord, GenesisRecord, RefusedRecord
from shared.tensors.codecs import get_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from coordinator.arrivals import Upload
    from coordinator.intake import Intake
    from coordinator.round.state import Notification, RunState, Step
    from shared.adapters import AdapterSettings
    from shared.brokers.port import Broker
    from shared.config import FederationConfig
    from shared.protocol.ledger import Ledger
    from shared.protocol.record import Record
    from shared.protocol.records import ClosingRecord, FinishedRecord, OpenedRecord

URL_SECONDS = 6 * 3600.0
# A chunk of 16 MiB gets through in that time at 150 kbit/s; the rest is asked for again.
GRANT_SECONDS = 900.0


class Effects:
    """The coordinator's hands: store, broker and spool of one run."""

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        broker: Broker,
        intake: Intake,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._broker = broker
        self._intake = intake
        self._clock = clock
        self._method = Method.of(config)

    # Durable steps -----------------------------------------------------------------------------

    def perform(self, step: Step, state: RunState) -> Record:
        """Do one durable step; the record to fold in. Raises StoreError, LedgerError."""
        with file_errors(self._intake.spool):
            match step:
                case MakeGenesis():
                    return self._make_genesis(step, state)
                case WriteRecord(record):
                    return self._write(record)
                case Aggregate(closing):
                    return self._aggregate(closing, state)

    def _write(self, record: OpenedRecord | ClosingRecord | FinishedRecord) -> Record:
        written = self._ledger.write(record)
        word = type(written).__name__.removesuffix("Record").lower()
        get_logger().info(f"{word}.recorded", run=self._config.run.name, round=written.round)
        return written

    def _make_genesis(self, step: MakeGenesis, state: RunState) -> GenesisRecord:
        first = state.members[step.members[0]]
        manifest = kind_of(first.manifest).manifest_for(first.manifest, self._config.lora)
        origin = state.origin
        if origin is None:
            path = self._intake.scratch("genesis.safetensors")
            digest = draw_adapter(manifest, self._config.run.seed, path)
            failpoint("genesis.drawn")
            adapter_sha, size = digest.sha256, digest.size
            self._store_adapter(adapter_sha, path, state)
        else:  # the branch brought the tensors; what stands beside them is this run's own
            adapter_sha, size = origin.adapter_sha, origin.adapter_size
            self._intake.local_adapter(self._config.run.name, adapter_sha)
            self._store_adapter_config(adapter_sha, state, self._config.lora)
        record = GenesisRecord(
            members=step.members,
            manifest=manifest,
            fingerprint=first.fingerprint,
            adapter_sha=adapter_sha,
            adapter_size=size,
            origin=origin.label if origin else None,
        )
        get_logger().info(
            "run.began", members=list(step.members), adapter=adapter_sha, origin=record.origin
        )
        return self._ledger.write(record)

    def _aggregate(self, closing: ClosingRecord, state: RunState) -> ClosedRecord:
        assert state.genesis is not None  # a round cannot be closing before genesis
        run, manifest = self._config.run.name, state.genesis.manifest
        source = self._intake.local_adapter(run, closing.source_sha)
        deltas = [
            WeightedDelta(
                item.label(closing.round),
                self._intake.local_delta(run, item.from_round, item.site, item.sha),
                item.weight,
                item.scale,
                delta_manifest(manifest, self._config, item.site, item.from_round),
            )
            for item in closing.inputs
        ]
        target = self._intake.scratch(f"closing-{closing.round:05d}.safetensors")
        files = self._state_files(state)
        result = aggregate(source, deltas, manifest, target, method=self._method, state=files)
        failpoint("round.aggregated")
        server_sha = result.stepped.state.sha256 if result.stepped else None
        if server_sha is not None:
            self._store_state(server_sha, files.after)
        self._store_adapter(result.digest.sha256, target, state)
        counted = [state.uncounted[item.site, item.from_round] for item in closing.inputs]
        record = ClosedRecord(
            round=closing.round,
            adapter_sha=result.digest.sha256,
            adapter_size=result.digest.size,
            mean_norm=result.mean_norm,
            delta_norms=result.delta_norms,
            cosines=result.cosines,
            source_held_out=pool_held_out(r.metrics.held_out for r in counted),
            left_out=result.left_out,
            exactness_gap=result.exactness_gap,
            server_sha=server_sha,
            step_norm=result.stepped.norm if result.stepped else None,
            gradient_energy=result.gradient_energy,
        )
        closed = self._ledger.write(record)
        # Where late deltas are taken, an upload may be under way for rounds to come.
        self._intake.clear_round(
            run,
            closed.round - self._config.policy.late_rounds,
            self._clock(),
            keep_adapter=closed.adapter_sha,
            keep_state=closed.server_sha,
        )
        get_logger().info("round.closed", round=closed.round, adapter=closed.adapter_sha)
        return closed

    def _state_files(self, state: RunState) -> StateFiles:
        """The server optimiser's state after the last closed round, and where the next one goes.

        A run begins without one, also a branch: its settings may be others than its parent's.
        """
        before = None
        if state.closed is not None and state.closed.server_sha is not None:
            before = self._intake.local_state(self._config.run.name, state.closed.server_sha)
        return StateFiles(before, self._intake.scratch("state-next"))

    def _store_state(self, sha: str, path: Path) -> None:
        """Store it under its name, and keep the file for the next round."""
        failpoint("server_state.before")
        key = topology.server_state_key(self._config.run.name, sha)
        self._ledger.store.put_file(key, path)
        failpoint("server_state.after")
        self._intake.adopt_state(sha, path)

    def _store_adapter(self, adapter_sha: str, path: Path, state: RunState) -> None:
        """Both files of a PEFT directory; the tensors last, since their presence means complete.

        Their file is kept: the next round is added to it.
        """
        mode = get_averaging(self._config.aggregation.averaging)
        self._store_adapter_config(adapter_sha, state, mode.settings_in(path, self._config.lora))
        failpoint("adapter.before", "tensors")
        self._ledger.store.put_file(topology.adapter_key(self._config.run.name, adapter_sha), path)
        failpoint("adapter.after", "tensors")
        self._intake.adopt_adapter(adapter_sha, path)

    def _store_adapter_config(
        self, adapter_sha: str, state: RunState, settings: AdapterSettings
    ) -> None:
        run = self._config.run.name
        manifest = next(iter(state.members.values())).manifest  # all name the same layers
        config = kind_of(settings).peft_config(self._config.base, settings, manifest)
        failpoint("adapter.before", "config")
        self._ledger.store.put(
            topology.adapter_key(run, adapter_sha, "adapter_config.json"), config
        )
        failpoint("adapter.after", "config")

    # Notifications ----------------------------------------------------------------------------

    def notify(self, notification: Notification, state: RunState) -> None:
        """Publish one announcement to all it concerns, confirmed as one batch."""
        events = self._events(notification, state)
        if events:
            self.tell(events)

    def tell(self, events: Mapping[str, Event]) -> None:
        """Publish one event to each site. Raises UnroutableError naming a site without a queue."""
        now = self._clock()
        self._broker.publish([to_site(site, event, now) for site, event in events.items()])

    def grant(self, upload: Upload, *, direct: bool = False, seen: bool = True) -> None:
        """Let a site upload what is missing; see :meth:`coordinator.arrivals.Arrivals.grant`."""
        expires_at = self._clock() + GRANT_SECONDS
        given = self._intake.arrivals.grant(upload, expires_at, direct=direct, seen=seen)
        grant = UploadGranted(
            run=upload.run,
            round=upload.round,
            sha=upload.sha,
            chunk_size=given.piece_bytes,
            urls=given.urls,
            expires_at=expires_at,
        )
        self.tell({upload.site: grant})

    def keep_refused(self, event: MessageRefused) -> None:
        """Put a site's refusal into the refused queue, beside the coordinator's own."""
        self._broker.publish([to_refused(event, self._clock())])

    def _events(self, notification: Notification, state: RunState) -> dict[str, Event]:
        run = self._config.run.name
        match notification:
            case AnnounceRun(sites):
                bases = self._offered_bases()
                return {site: announcement(self._config, site, bases) for site in sites}
            case AnnounceRound(sites):
                return {site: self._round_for(site, state) for site in sites}
            case AnswerDelta(record):
                return {record.site: answer_of(run, record)}
            case AnnounceClosed(closed, sites):
                event = RoundClosed(
                    run=run,
                    round=closed.round,
                    result_sha=closed.adapter_sha,
                    late_counts=self._config.policy.carries,
                )
                return dict.fromkeys(sites, event)
            case AnnounceFinished(sites):
                return {site: self._finish_for(site, state) for site in sites}

    def _round_for(self, site: str, state: RunState) -> RoundStarted:
        opened = state.opened
        assert opened is not None  # this is only sent while a round is open
        url, expires_at = self._sign_adapter(opened.source_sha)
        trouble = state.troubles.get(site)
        feedback = has_feedback(self._config)
        return RoundStarted(
            run=self._config.run.name,
            round=opened.round,
            source_sha=opened.source_sha,
            get_url=url,
            expires_at=expires_at,
            training=WireTraining(**self._config.training.model_dump(exclude_none=True)),
            progress_from=opened.progress_from,
            progress_to=opened.progress_to,
            seed=opened.seed,
            codec=self._config.codec.name,
            attempt=trouble.attempts + 1 if trouble else 1,
            last_counted=state.last_counted.get(site),
            averaging=self._config.aggregation.averaging,
            feedback=feedback,
            last_accepted=state.last_accepted(site) if feedback else None,
        )

    def _finish_for(self, site: str, state: RunState) -> RunFinished:
        finished = state.finished
        assert finished is not None  # this is only sent at the end
        url, expires_at = None, None
        mode = get_averaging(self._config.aggregation.averaging)
        if finished.sha is not None and site not in state.evaluated and not mode.makes_bases:
            url, expires_at = self._sign_adapter(finished.sha)
        return RunFinished(
            run=self._config.run.name,
            round=finished.round,
            sha=finished.sha,
            reason=finished.reason,
            get_url=url,
            expires_at=expires_at,
        )

    def _offered_bases(self) -> BasesOffered | None:
        sha = self._config.lora.bases_sha
        if sha is None:
            return None
        url, expires_at = self._sign(topology.bases_key(self._config.run.name, sha))
        return BasesOffered(sha=sha, get_url=url, expires_at=expires_at)

    def _sign_adapter(self, adapter_sha: str) -> tuple[str, float]:
        return self._sign(topology.adapter_key(self._config.run.name, adapter_sha))

    def _sign(self, key: str) -> tuple[str, float]:
        expires_at = self._clock() + URL_SECONDS
        return self._ledger.store.sign_get(key, expires_at), expires_at


def has_feedback(config: FederationConfig) -> bool:
    """Whether sites make up for what the codec leaves out of a delta.

    Not where factors are made anew in each round: a residual belongs to those that it was left of.
    """
    averaging = get_averaging(config.aggregation.averaging)
    return config.codec.feedback and averaging.by_value and not get_codec(config.codec.name).exact


def announcement(
    config: FederationConfig, site: str, bases: BasesOffered | None = None
) -> RunAnnounced:
    """The run as a site is told of it. ``bases``: where they are, if the settings name a file."""
    return RunAnnounced(
        run=config.run.name,
        config_digest=config.digest,
        base=WireBase(**config.base.model_dump()),
        lora=WireLora(**kind_of(config.lora).for_site(config.lora, site).model_dump()),
        training=WireTraining(**config.training.model_dump(exclude_none=True)),
        rounds=config.run.rounds,
        participants=len(config.run.participants),
        averaging=config.aggregation.averaging,
        modes=tuple(one for one in modes.origins(config) if modes.KINDS[one.kind].at_sites),
        bases=bases,
    )


def answer_of(run: str, record: AcceptedRecord | RefusedRecord) -> DeltaAnswered:
    """The answer to a site about its delta."""
    if isinstance(record, AcceptedRecord):
        return DeltaAnswered(run=run, round=record.round, sha=record.sha, verdict="accepted")
    return DeltaAnswered(
        run=run,
        round=record.round,
        sha=record.sha,
        verdict=record.verdict,
        reason=record.reason,
    )
