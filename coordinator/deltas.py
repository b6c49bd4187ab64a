"""The coordinator's handlers of deltas: what a site may upload, what becomes of what it submits."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from coordinator.aggregation.server_optimizer import wants_more_than_zeros
from coordinator.announcing import answer_of
from coordinator.arrivals import Upload
from coordinator.batching import BATCH, BATCH_BYTES, THREADS, at_once
from coordinator.round.machine import next_step
from shared.errors import DeltaRefusedError, ObjectMissingError, ProtocolError
from shared.log import get_logger
from shared.methods.averaging import delta_manifest
from shared.protocol.events import DeltaSubmitted, UploadRequested
from shared.protocol.records import AcceptedRecord, RefusedRecord
from shared.tensors.delta_file import DeltaHeader
from shared.tensors.masked_file import MASKED, masked_header, ring_of
from shared.topology import accepted_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from coordinator.live_run import LiveRun
    from shared.config import FederationConfig
    from shared.protocol.events import Event
    from shared.protocol.records import OpenedRecord
    from shared.protocol.said import Said


class Deltas:
    """What one run's sites upload and submit, each checked, recorded and answered."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._ahead: dict[Upload, Future[float]] = {}  # of this batch, until its turn comes

    def on_upload_requested(self, event: UploadRequested, sender: str) -> None:
        """Sign a URL for each missing piece. Idempotent: an upload in parts is found again."""
        upload = self._upload(event, sender)
        if upload in self._run.lost:  # what is damaged at its key is replaced, not created
            self._run.effects.grant(upload)
            return
        opened = self._waits_for(upload)
        if opened is None:
            self._answer_closed(upload, record=False)
            return
        present = self._present(upload, opened, direct=event.creates)
        if not self._run.limits.grants(self._run.state, sender, event.round, event.sha, present):
            reason = f"limits.uploads: {sender} may upload no more deltas for round {event.round}"
            verdict = RefusedRecord(round=event.round, site=sender, sha=event.sha, reason=reason)
            self._run.effects.tell({sender: answer_of(upload.run, verdict)})
            return
        grant = partial(
            self._run.effects.granted,
            upload,
            direct=event.creates,
            seen=upload.sha in present,
        )
        self._run.later(sender, grant, lambda granted: self._run.effects.tell({sender: granted}))

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
        opened = self._waits_for(upload)
        if opened is None or opened.number != event.number:
            self._answer_closed(upload, event.said)
            return
        against = self._against(event, sender, opened)
        if against is not None:
            self._refuse(upload, against, event.said)
            return
        ahead = self._ahead.pop(upload, None)
        try:
            norm = self._norm(upload, opened) if ahead is None else ahead.result()
        except DeltaRefusedError as error:
            self._refuse(upload, str(error), event.said)
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
                said=event.said,
                masked=event.masked if opened.secure is not None else None,
                number=event.number,
                privacy=event.privacy,
                audit=event.audit,
            )
        )

    def _against(self, event: DeltaSubmitted, sender: str, opened: OpenedRecord) -> str | None:
        """What the site says of its delta against what is on record; None where all agrees.

        An earlier try is no contradiction: its delta may have been done when the failure was said.
        """
        if event.source_sha != opened.source_sha:
            return (
                f"source_sha: expected {opened.source_sha[:12]}, got {event.source_sha[:12]}; "
                "the delta was trained from another adapter"
            )
        base, codec = self._run.genesis().fingerprint, self._run.config.codec.name
        codec = codec if opened.secure is None else MASKED
        if event.fingerprint not in (None, base):
            return (
                f"fingerprint: expected {base[:12]}, got {event.fingerprint[:12]}; the delta was "
                "trained over another base model"
            )
        if event.codec not in (None, codec):
            return f"codec: expected {codec}, got {event.codec}; start the site again"
        if less := _without_privacy(self._run.config, event):
            return less
        trouble = self._run.state.troubles.get(sender)
        tries = trouble.attempts + 1 if trouble else 1
        is_open = opened is self._run.state.open_round  # of a round before, nobody counts any more
        if is_open and event.attempt is not None and event.attempt > tries:
            return f"attempt: expected at most {tries}, got {event.attempt}"
        return _mask_problem(event, sender, opened)

    def most(self) -> int:
        """How many may be read before the first is answered."""
        return max(THREADS, min(BATCH, BATCH_BYTES // self._size_limit()))

    def check_ahead(self, told: Sequence[tuple[Event, str]]) -> None:
        """Read and check what is submitted, each beside the others, before its turn comes.

        One delta a site: what becomes of a second one follows from the first.
        """
        submitted: dict[str, DeltaSubmitted] = {}
        for event, sender in told:
            if isinstance(event, DeltaSubmitted):
                submitted.setdefault(sender, event)
        checks: dict[Upload, Callable[[], float]] = {}
        for sender, event in submitted.items():
            with contextlib.suppress(ProtocolError):  # its turn says so
                upload = self._upload(event, sender)
                opened = self._waits_for(upload)
                same = opened is not None and opened.number == event.number
                if opened is not None and same and self._against(event, sender, opened) is None:
                    checks[upload] = partial(self._norm, upload, opened)
        self._ahead = dict(zip(checks, at_once(list(checks.values())), strict=True))

    def _norm(self, upload: Upload, opened: OpenedRecord) -> float:
        """The norm of a delta that is as it should be. Raises DeltaRefusedError, StoreError."""
        config = self._run.config
        manifest = delta_manifest(self._run.genesis().manifest, config, upload.site, upload.round)
        if opened.secure is not None:
            header = masked_header(upload.run, upload.round, upload.site, opened.source_sha)
            self._run.intake.take_masked(upload, manifest, header, ring_of(opened.secure))
            return 0.0
        expected = DeltaHeader.of(
            config.codec.name,
            run=upload.run,
            number=upload.round,
            site=upload.site,
            source_sha=opened.source_sha,
        )
        limit = config.aggregation.max_delta_norm
        not_zero = wants_more_than_zeros(config, opened)
        return self._run.intake.take(upload, manifest, expected, limit, not_zero)

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
            self._run.carry_out(filter(None, [next_step(self._run.state)]))

    def _refuse(self, upload: Upload, reason: str, said: Said | None) -> None:
        get_logger().warning("delta.refused", reason=reason)
        self._answer(
            RefusedRecord(
                round=upload.round, site=upload.site, sha=upload.sha, reason=reason, said=said
            )
        )

    def _answer(self, verdict: RefusedRecord) -> None:
        """Record a verdict, from which the answer follows; or only answer a site with too many."""
        if self._run.limits.records_verdict(
            self._run.state, verdict.site, verdict.round, verdict.sha
        ):
            self._run.record(verdict)
        else:
            self._run.effects.tell({verdict.site: answer_of(self._run.config.run.name, verdict)})

    def _answer_closed(
        self, upload: Upload, said: Said | None = None, *, record: bool = True
    ) -> None:
        """Answer a delta that the open round does not wait for: counted already, or too late.

        Without ``record`` nothing is kept of it: a request is not a delta, and costs nothing.
        """
        opened = self._run.state.openings.get(upload.round)
        number = opened.number if opened is not None else 1
        key = accepted_key(upload.run, upload.round, upload.site, number)
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
            round=upload.round,
            site=upload.site,
            sha=upload.sha,
            verdict="late",
            reason=reason,
            said=said,
        )
        if record:
            self._answer(late)
        else:
            self._run.effects.tell({upload.site: answer_of(upload.run, late)})

    def _waits_for(self, upload: Upload) -> OpenedRecord | None:
        """The round, if it still waits for a delta of this site; operators may say no."""
        state, site, number = self._run.state, upload.site, upload.round
        opened = state.takes(site, number)
        if opened is None or site in state.steering.excluded or (site, number) in state.uncounted:
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


def _mask_problem(event: DeltaSubmitted, sender: str, opened: OpenedRecord) -> str | None:
    """What is wrong with what a masked delta came with; None if nothing is."""
    if opened.secure is None:
        return None
    wanted = {*opened.secure.cohort(event.run, event.round).neighbours(sender)}
    masked = event.masked
    if masked is not None and {*masked.pairs} == {*masked.sealed} == wanted:
        return None
    got = "none" if masked is None else f"those of {len(masked.pairs)} and {len(masked.sealed)}"
    return (
        f"masked: expected commitments and shares for its {len(wanted)} neighbours in round "
        f"{event.round}, got {got}; update the site"
    )


def _without_privacy(config: FederationConfig, event: DeltaSubmitted) -> str:
    """Why a delta has less noise than the run asks for, by its site's word; empty if it has not."""
    if config.privacy is None:
        return ""
    if event.privacy is None:
        return "privacy: expected what the site spent, got nothing; update the site's release"
    return event.privacy.problem(config.privacy)
