"""Carries out what the state machine asks for: records, adapters, announcements.

Durable steps return the record that came of them, to be folded in. Each may be repeated: objects
are content-addressed and records conditional, so the second time meets the first one's result.
Notifications are published and forgotten: a restart sends them again from the ledger.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coordinator.accounts.standing import Standing
from coordinator.aggregation.downlink import RoundFiles, close_round
from coordinator.aggregation.server_optimizer import StateFiles
from coordinator.aggregation.unmasking import next_reaches, open_sum, sum_deltas
from coordinator.announcing import Announcer
from coordinator.round.state import Aggregate, MakeGenesis, WriteRecord
from shared import topology
from shared.adapters import kind_of
from shared.disk.durable_files import file_errors
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.methods.averaging import delta_manifest, get_averaging
from shared.methods.inputs import WeightedDelta
from shared.protocol.events import Event, MessageRefused, UploadGranted
from shared.protocol.manifest import pool_held_out
from shared.protocol.messages import to_refused, to_site
from shared.protocol.records import ClosedRecord, GenesisRecord
from shared.tensors.genesis import draw_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from coordinator.aggregation.unmasking import Summed
    from coordinator.arrivals import Upload
    from coordinator.batching import Outbox
    from coordinator.intake import Intake
    from coordinator.round.state import Notification, RunState, Step
    from shared.adapters import AdapterSettings
    from shared.config import FederationConfig
    from shared.protocol.ledger import Ledger
    from shared.protocol.manifest import Manifest
    from shared.protocol.record import Record
    from shared.protocol.records import ClosingRecord, FinishedRecord, Input, OpenedRecord


class Effects:
    """The coordinator's hands: store, broker and spool of one run."""

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        outbox: Outbox,
        intake: Intake,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._outbox = outbox
        self._intake = intake
        self._clock = clock
        self._announcer = Announcer(config, ledger.store, clock)
        self.standing = Standing(ledger.store, config.run.participants, clock)

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
        summed = self._sum(closing, state, manifest)
        deltas = [summed.delta] if summed else self._deltas(closing, manifest)
        files = self._round_files(closing, state)
        result = close_round(self._config, closing, deltas, manifest, files)
        failpoint("round.aggregated")
        server_sha = result.stepped.state.sha256 if result.stepped else None
        if server_sha is not None:
            self._store_state(server_sha, files.state.after, "optimizer")
        sent = result.sent_down
        if sent is not None:
            self._store_state(sent.exact.sha256, files.exact.after, "exact")
            self._store_update(sent.update.sha256, files.update)
        self._store_adapter(result.digest.sha256, files.target, state)
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
            exact_sha=sent.exact.sha256 if sent else None,
            update_sha=sent.update.sha256 if sent else None,
            update_size=sent.update.size if sent else None,
            reaches=self._next_reaches(summed, state, manifest) if summed else None,
        )
        closed = self._ledger.write(record)
        # Where late deltas are taken, an upload may be under way for rounds to come.
        self._intake.clear_round(
            run,
            closed.round - self._config.policy.late_rounds,
            self._clock(),
            keep_adapter=closed.adapter_sha,
            keep_states=(closed.server_sha, closed.exact_sha),
        )
        get_logger().info("round.closed", round=closed.round, adapter=closed.adapter_sha)
        return closed

    def _deltas(self, closing: ClosingRecord, manifest: Manifest) -> list[WeightedDelta]:
        return [
            WeightedDelta(
                item.label(closing.round),
                self._local(item),
                item.weight,
                item.scale,
                delta_manifest(manifest, self._config, item.site, item.from_round),
            )
            for item in closing.inputs
        ]

    def _local(self, item: Input) -> Path:
        run = self._config.run.name
        return self._intake.local_delta(run, item.from_round, item.site, item.sha)

    def _sum(self, closing: ClosingRecord, state: RunState, manifest: Manifest) -> Summed | None:
        """What the masked deltas come to; None where they are not masked."""
        survivors = state.survivors
        if survivors is None or state.opened is None or state.opened.secure is None:
            return None
        accepted = {item.site: state.uncounted[item.site, closing.round] for item in closing.inputs}
        opened = open_sum(survivors, accepted, state.unmasked)
        failpoint("sum.opened")
        paths = {item.site: self._local(item) for item in closing.inputs}
        return sum_deltas(
            survivors,
            state.opened.secure,
            opened,
            paths,
            closing.source_sha,
            delta_manifest(manifest, self._config, closing.inputs[0].site, closing.round),
            self._intake.scratch("sum.safetensors"),
        )

    def _next_reaches(
        self, summed: Summed, state: RunState, manifest: Manifest
    ) -> tuple[float, ...]:
        before = state.closed.reaches if state.closed else None
        return next_reaches(manifest, before, summed, self._config.aggregation.secure_reach)

    def _round_files(self, closing: ClosingRecord, state: RunState) -> RoundFiles:
        """What the last closed round left, and where the next one's files go.

        A run begins without any state, also a branch: its settings may be others than its parent's,
        and it has the parent's adapter as the sites have it.
        """
        run, scratch = self._config.run.name, self._intake.scratch
        shas = (state.closed.server_sha, state.closed.exact_sha) if state.closed else (None, None)
        server, exact = (self._intake.local_state(run, sha) if sha else None for sha in shas)
        return RoundFiles(
            source=self._intake.local_adapter(run, closing.source_sha),
            target=scratch(f"closing-{closing.round:05d}.safetensors"),
            state=StateFiles(server, scratch("state-next")),
            exact=StateFiles(exact, scratch("exact-next")),
            update=scratch("update-next"),
        )

    def _store_state(self, sha: str, path: Path, whose: str) -> None:
        """Store what the coordinator alone goes on from, and keep the file for the next round."""
        failpoint("server_state.before", whose)
        key = topology.server_state_key(self._config.run.name, sha)
        self._ledger.store.put_file(key, path)
        failpoint("server_state.after", whose)
        self._intake.adopt_state(sha, path)

    def _store_update(self, sha: str, path: Path) -> None:
        """Store what leads to the round's adapter, before there is word of it."""
        failpoint("update.before")
        self._ledger.store.put_file(topology.update_key(self._config.run.name, sha), path)
        failpoint("update.after")
        path.unlink()

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
        """Have one announcement published to all it concerns."""
        self._tell(self._announcer.events(notification, state))

    def tell(self, events: Mapping[str, Event]) -> None:
        """Have one event published to each site."""
        self._tell(events.items())

    def _tell(self, events: Iterable[tuple[str, Event]]) -> None:
        now, voice = self._clock(), self._ledger.voice
        self._outbox.put(
            partial(to_site, site, event, now, voice)
            for site, event in events
            if not self.standing.ended(site)
        )

    def grant(self, upload: Upload, *, direct: bool = False, seen: bool = True) -> None:
        """Let a site upload what is missing; see :meth:`coordinator.arrivals.Arrivals.grant`."""
        self.tell({upload.site: self.granted(upload, direct=direct, seen=seen)})

    def granted(self, upload: Upload, *, direct: bool = False, seen: bool = True) -> UploadGranted:
        """The word by which a site may upload what is missing. Raises StoreError."""
        expires_at = self._clock() + self._config.limits.write_url_seconds
        given = self._intake.arrivals.grant(upload, expires_at, direct=direct, seen=seen)
        return UploadGranted(
            run=upload.run,
            round=upload.round,
            sha=upload.sha,
            chunk_size=given.piece_bytes,
            urls=given.urls,
            expires_at=expires_at,
        )

    def say(self) -> None:
        """Publish what there is to say, as one, and return once it is confirmed.

        Raises UnroutableError naming a site without a queue, BrokerUnavailableError.
        """
        self._outbox.flush()

    def keep_refused(self, event: MessageRefused) -> None:
        """Have a refusal put into the refused queue."""
        refused = to_refused(event, self._clock())
        self._outbox.put([lambda _head: refused])
