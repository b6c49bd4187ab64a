"""What the coordinator says to sites: the events of each notification, with signed URLs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from coordinator.aggregation.downlink import sends_updates
from coordinator.round.state import (
    AnnounceClosed,
    AnnounceFinished,
    AnnounceRound,
    AnnounceRun,
    AnswerDelta,
    AskUnmask,
)
from shared import modes, topology
from shared.adapters import kind_of
from shared.config.privacy_rules import fewest_deltas
from shared.methods.averaging import get_averaging
from shared.protocol.events import (
    BasesOffered,
    DeltaAnswered,
    Event,
    RoundClosed,
    RoundStarted,
    RunAnnounced,
    RunFinished,
    UnmaskRequested,
    UpdateOffered,
    WireBase,
    WireLora,
    WirePrivacy,
    WireTraining,
)
from shared.protocol.records import AcceptedRecord, RefusedRecord
from shared.tensors.codecs import get_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.round.state import Notification, RunState, Update
    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore

UNMASKED_CODEC = "fp32"  # what a training writes before its site quantises and masks it


class Announcer:
    """Makes one run's events."""

    def __init__(
        self, config: FederationConfig, store: ObjectStore, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._store = store
        self._clock = clock

    def events(self, notification: Notification, state: RunState) -> Iterator[tuple[str, Event]]:
        """What each site is told, made as it is asked for: a large federation's is never whole."""
        run = self._config.run.name
        match notification:
            case AnnounceRun(sites):
                bases = self._offered_bases()
                yield from ((site, self._run_for(site, bases)) for site in sites)
            case AnnounceRound(sites):
                yield from ((site, self._round_for(site, state)) for site in sites)
            case AnswerDelta(record):
                yield record.site, answer_of(run, record)
            case AskUnmask(sites):
                yield from ((site, self._unmasking_for(site, state)) for site in sites)
            case AnnounceClosed(closed, sites):
                event = RoundClosed(
                    run=run,
                    round=closed.round,
                    result_sha=closed.adapter_sha,
                    late_counts=self._config.policy.carries,
                    by_update=sends_updates(self._config),
                )
                yield from ((site, event) for site in sites)
            case AnnounceFinished(sites):
                yield from ((site, self._finish_for(site, state)) for site in sites)

    @cached_property
    def _announced(self) -> RunAnnounced:
        """As one of the sites is told: its digest is of a config that names all of them."""
        return announcement(self._config, self._config.run.participants[0])

    def _run_for(self, site: str, bases: BasesOffered | None) -> RunAnnounced:
        lora = _lora_of(self._config, site)
        return self._announced.model_copy(update={"lora": lora, "bases": bases})

    def _round_for(self, site: str, state: RunState) -> RoundStarted:
        opened = state.opened
        assert opened is not None  # this is only sent while a round is open
        url, expires_at = self._sign_adapter(opened.source_sha)
        trouble = state.troubles.get(site)
        feedback = has_feedback(self._config)
        updates = self._updates_for(site, state)
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
            codec=self._config.codec.name if opened.secure is None else UNMASKED_CODEC,
            packed=self._config.codec.packed,
            attempt=trouble.attempts + 1 if trouble else 1,
            last_counted=state.last_counted.get(site),
            averaging=self._config.aggregation.averaging,
            feedback=feedback,
            last_accepted=state.last_accepted(site) if feedback else None,
            updates=updates,
            genesis_seed=self._genesis_seed(site, state, opened.source_sha, updates),
            secure=opened.secure,
            privacy=_privacy_of(self._config),
        )

    def _unmasking_for(self, site: str, state: RunState) -> UnmaskRequested:
        survivors = state.survivors
        assert survivors is not None  # this is only sent while a sum waits for answers
        attempt = survivors.cohort.attempt
        told = {
            other: state.uncounted[other, attempt.round].masked
            for other in survivors.cohort.neighbours(site)
            if other in survivors.shas
        }
        return UnmaskRequested(
            run=attempt.run,
            round=attempt.round,
            attempt=attempt.number,
            survivors=dict(survivors.shas),
            sealed={other: masked.sealed[site] for other, masked in told.items() if masked},
            signatures=dict(state.signatures) if state.may_unmask else {},
        )

    def _finish_for(self, site: str, state: RunState) -> RunFinished:
        finished = state.finished
        assert finished is not None  # this is only sent at the end
        url, expires_at = None, None
        updates: tuple[UpdateOffered, ...] = ()
        seed = None
        mode = get_averaging(self._config.aggregation.averaging)
        if finished.sha is not None and site not in state.evaluated and not mode.makes_bases:
            url, expires_at = self._sign_adapter(finished.sha)
            updates = self._updates_for(site, state)
            seed = self._genesis_seed(site, state, finished.sha, updates)
        return RunFinished(
            run=self._config.run.name,
            round=finished.round,
            sha=finished.sha,
            reason=finished.reason,
            get_url=url,
            expires_at=expires_at,
            updates=updates,
            genesis_seed=seed,
        )

    def _updates_for(self, site: str, state: RunState) -> tuple[UpdateOffered, ...]:
        """From the adapter that the site trained from last, or from the first, if it can draw that.

        At least from the one before. None where they are too many, or no fewer bytes than the
        adapter.
        """
        if state.closed is None:
            return ()
        newest, trained = state.closed.round, state.last_trained(site)
        if trained:
            firsts = [min(trained, newest)]
        else:
            firsts = [1, newest] if self._draws(site, state) else [newest]
        wanted = next(filter(None, (_since(state, first) for first in firsts)), ())
        run = self._config.run.name
        return tuple(
            UpdateOffered(
                round=update.round,
                source_sha=update.source_sha,
                sha=update.sha,
                size=update.size,
                codec=self._config.codec.down,
                get_url=self._sign(topology.update_key(run, update.sha))[0],
            )
            for update in wanted
        )

    def _genesis_seed(
        self, site: str, state: RunState, adapter_sha: str, updates: tuple[UpdateOffered, ...]
    ) -> int | None:
        """The run's seed, if what the site is to begin with can be drawn from it."""
        assert state.genesis is not None  # no adapter comes before it
        begins_with = updates[0].source_sha if updates else adapter_sha
        first = begins_with == state.genesis.adapter_sha and self._draws(site, state)
        return self._config.run.seed if first else None

    def _draws(self, site: str, state: RunState) -> bool:
        """Whether the run's seed and the site's own tensors give the run's first adapter.

        A branch begins with its parent's, and a site of another rank would draw one of that rank.
        """
        kind, lora = kind_of(self._config.lora), self._config.lora
        return state.origin is None and kind.rank(lora, site) == kind.rank(lora)

    def _offered_bases(self) -> BasesOffered | None:
        sha = self._config.lora.bases_sha
        if sha is None:
            return None
        url, expires_at = self._sign(topology.bases_key(self._config.run.name, sha))
        return BasesOffered(sha=sha, get_url=url, expires_at=expires_at)

    def _sign_adapter(self, adapter_sha: str) -> tuple[str, float]:
        return self._sign(topology.adapter_key(self._config.run.name, adapter_sha))

    def _sign(self, key: str) -> tuple[str, float]:
        expires_at = self._clock() + self._config.limits.read_url_seconds
        return self._store.sign_get(key, expires_at), expires_at


def _since(state: RunState, first: int) -> tuple[Update, ...]:
    """The updates of round ``first`` and all later ones; none if they are no fewer bytes."""
    assert state.closed is not None
    wanted = tuple(update for update in state.updates if update.round >= first)
    size = sum(update.size for update in wanted)
    whole = wanted and wanted[0].round == first and size < state.closed.adapter_size
    return wanted if whole else ()


def has_feedback(config: FederationConfig) -> bool:
    """Whether sites make up for what the codec leaves out of a delta.

    Not where factors are made anew in each round: a residual belongs to those that it was left of.
    """
    averaging = get_averaging(config.aggregation.averaging)
    return config.codec.feedback and averaging.by_value and not get_codec(config.codec.name).exact


def announcement(config: FederationConfig, site: str) -> RunAnnounced:
    """The run as a site is told of it, but for where its bases are."""
    return RunAnnounced(
        run=config.run.name,
        config_digest=config.digest,
        base=WireBase(**config.base.model_dump()),
        lora=_lora_of(config, site),
        training=WireTraining(**config.training.model_dump(exclude_none=True)),
        rounds=config.run.rounds,
        participants=len(config.run.participants),
        averaging=config.aggregation.averaging,
        secure=config.aggregation.secure,
        privacy=_privacy_of(config),
        modes=tuple(one for one in modes.origins(config) if modes.KINDS[one.kind].at_sites),
    )


def _privacy_of(config: FederationConfig) -> WirePrivacy | None:
    if config.privacy is None:
        return None
    fewest = fewest_deltas(config) if config.privacy.of_sites else None
    return WirePrivacy(**config.privacy.model_dump(), fewest=fewest)


def _lora_of(config: FederationConfig, site: str) -> WireLora:
    return WireLora(**kind_of(config.lora).for_site(config.lora, site).model_dump())


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
