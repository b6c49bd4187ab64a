"""The coordinator's handlers of deltas: what a site may upload, what becomes of what it submits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.server_optimizer import wants_more_than_zeros
from coordinator.announcing import answer_of
from coordinator.arrivals import Upload
from coordinator.round.state import Aggregate
from shared.errors import DeltaRefusedError, ObjectMissingError, ProtocolError
from shared.log import get_logger
from shared.methods.averaging import delta_manifest
from shared.protocol.records import AcceptedRecord, RefusedRecord
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader
from shared.topology import accepted_key

if TYPE_CHECKING:
    from coordinator.live_run import LiveRun
    from shared.protocol.events import DeltaSubmitted, UploadRequested
    from shared.protocol.records import OpenedRecord


class Deltas:
    """What one run's sites upload and submit, each checked, recorded and answered."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run

    def on_upload_requested(self, event: UploadRequested, sender: str) -> None:
        """Sign a URL for each missing piece. Idempotent: an upload in parts is found again."""
        upload = self._upload(event, sender)
        if upload in self._run.lost:  # what is damaged at its key is replaced, not created
            self._run.effects.grant(upload)
            return
        opened = self._takes(sender, event.round)
        if opened is None or (sender, event.round) in self._run.state.uncounted:
            self._answer_closed(upload, record=False)
            return
        present = self._present(upload, opened, direct=event.creates)
        if not self._run.limits.grants(self._run.state, sender, event.round, event.sha, present):
            reason = f"limits.uploads: {sender} may upload no more deltas for round {event.round}"
            verdict = RefusedRecord(round=event.round, site=sender, sha=event.sha, reason=reason)
            self._run.effects.tell({sender: answer_of(upload.run, verdict)})
            return
        self._run.effects.grant(upload, direct=event.creates, seen=upload.sha in present)

    def _present(self, upload: Upload, opened: OpenedRecord, *, direct: bool) -> set[str]:
        """The shas of which this site's bytes may be at the store for the round."""
        granted = self._run.limits.granted(upload.site, upload.round)
        if opened.writer == self._run.ledger.writer and upload.sha not in granted:
            return set()  # whatever was granted since the round was opened, this process granted
        return self._run.intake.arrivals.shas(upload, direct=direct)

    def on_delta_submitted(self, event: DeltaSubmitted, sender: str) -> None:
        """Check the delta, record the verdict. Idempotent: same bytes, same record, one count."""
        upload = self._upload(event, sender)
        if upload in self._run.lost:
            self._restore(upload)
            return
        opened = self._takes(sender, event.round)
        if opened is None or (sender, event.round) in self._run.state.uncounted:
            self._answer_closed(upload)
            return
        codec = get_codec(self._run.config.codec.name)
        expected = DeltaHeader(
            run=upload.run,
            round=upload.round,
            site=sender,
            source_sha=opened.source_sha,
            codec=codec.name,
            codec_version=codec.version,
        )
        if event.source_sha != opened.source_sha:
            self._refuse(
                upload,
                f"source_sha: expected {opened.source_sha[:12]}, got {event.source_sha[:12]}; "
                "the delta was trained from another adapter",
            )
            return
        limit = self._run.config.aggregation.max_delta_norm
        try:
            manifest = delta_manifest(
                self._run.genesis().manifest, self._run.config, sender, event.round
            )
            not_zero = wants_more_than_zeros(self._run.config, opened)
            norm = self._run.intake.take(upload, manifest, expected, limit, not_zero)
        except DeltaRefusedError as error:
            self._refuse(upload, str(error))
            return
        get_logger().info("delta.accepted", norm=norm)
        self._run.record(
            AcceptedRecord(
                round=event.round,
                site=sender,
                sha=event.sha,
                size=event.size,
                examples=event.examples,
                tokens=event.tokens,
                norm=norm,
                metrics=event.metrics,
                state=event.state,
                residual=event.residual,
                traffic=event.traffic,
            )
        )

    def _restore(self, upload: Upload) -> None:
        """Store what a site sent again. Idempotent: it is the same bytes, or nothing."""
        try:
            self._run.intake.restore(upload)
        except DeltaRefusedError as error:  # it is asked for again
            get_logger().warning("delta.refused", reason=str(error))
            self._run.intake.arrivals.clear_chunks(upload)
            return
        get_logger().info("delta.restored", site=upload.site, round=upload.round)
        del self._run.lost[upload]
        if self._run.state.closing is not None:
            self._run.carry_out((Aggregate(self._run.state.closing),))

    def _refuse(self, upload: Upload, reason: str) -> None:
        get_logger().warning("delta.refused", reason=reason)
        self._answer(
            RefusedRecord(round=upload.round, site=upload.site, sha=upload.sha, reason=reason)
        )

    def _answer(self, verdict: RefusedRecord) -> None:
        """Record a verdict, from which the answer follows; or only answer a site with too many."""
        if self._run.limits.records_verdict(
            self._run.state, verdict.site, verdict.round, verdict.sha
        ):
            self._run.record(verdict)
        else:
            self._run.effects.tell({verdict.site: answer_of(self._run.config.run.name, verdict)})

    def _answer_closed(self, upload: Upload, *, record: bool = True) -> None:
        """Answer a delta that the open round does not wait for: counted already, or too late.

        Without ``record`` nothing is kept of it: a request is not a delta, and costs nothing.
        """
        key = accepted_key(upload.run, upload.round, upload.site)
        try:
            accepted = self._run.ledger.read(AcceptedRecord, key)
        except ObjectMissingError:
            accepted = None
        if accepted is not None and accepted.sha == upload.sha:
            self._run.effects.tell({upload.site: answer_of(upload.run, accepted)})
            return
        if upload.round in self._run.state.openings:  # of one to come, no record says no yet
            self._run.intake.discard(upload)
        out = self._run.state.steering.excluded.get(upload.site)
        reason = f"round {upload.round} is not open for this site"
        if accepted is not None:
            reason = f"round {upload.round} holds this site's delta {accepted.sha[:12]} already"
        elif out is not None:
            reason = f"this site was taken out of the run: {out}"
        late = RefusedRecord(
            round=upload.round, site=upload.site, sha=upload.sha, verdict="late", reason=reason
        )
        if record:
            self._answer(late)
        else:
            self._run.effects.tell({upload.site: answer_of(upload.run, late)})

    def _takes(self, site: str, number: int) -> OpenedRecord | None:
        """The round, if a delta of this site for it may still count; operators may say no."""
        opened = self._run.state.takes(site, number)
        if opened is None or site not in self._run.state.steering.in_force(opened.selected):
            return None
        return opened

    def _upload(self, event: UploadRequested | DeltaSubmitted, sender: str) -> Upload:
        """What a site says it sends. Raises ProtocolError for what cannot be of this run.

        Refused as a message and not as a delta: a made-up round or size must leave no trace in
        the ledger, and no loop over its chunks.
        """
        newest, limit = self._run.state.last_round + 1, self._size_limit()
        if not 1 <= event.round <= newest:
            raise ProtocolError(f"round: expected 1 to {newest}, got {event.round} from {sender}")
        if event.size > limit:
            raise ProtocolError(
                f"size: expected at most {limit} bytes for this run's adapter, got {event.size} "
                f"from {sender}"
            )
        return Upload(self._run.config.run.name, event.round, sender, event.sha, event.size)

    def _size_limit(self) -> int:
        """No codec here needs more than fp32 does; the rest is room for the file's header."""
        tensors = self._run.genesis().manifest.tensors
        return sum(4 * spec.elements for spec in tensors) + 1_000 * len(tensors) + 65_536
