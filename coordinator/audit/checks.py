"""What the records of a run say of each other: every gap and contradiction, with key and round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.downlink import sends_updates
from coordinator.audit.chain import MOST_LOST_ROUNDS, Finding
from coordinator.round.controls import steer
from coordinator.round.members import unfit
from shared import modes, topology
from shared.adapters import kind_of
from shared.errors import LedgerError, ObjectMissingError, RunNotFoundError
from shared.methods.policies import get_policy, weighting
from shared.methods.server_optimizers import get_server_optimizer
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    ClosedRecord,
    ClosingRecord,
    FinishedRecord,
    GenesisRecord,
    OpenedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coordinator.audit.chain import Chain
    from shared.adapters import AdapterSettings
    from shared.config import FederationConfig
    from shared.protocol.records import FailedRecord, MemberRecord, RefusedRecord


def check_records(chain: Chain, config: FederationConfig) -> None:
    """Note every contradiction and every gap between the records."""
    _check_modes(chain, config)
    _check_members(chain, config)
    _check_controls(chain)
    for number in sorted(chain.history.rounds.keys() - set(chain.numbers)):
        for record in chain.history.round(number).records:
            last = len(chain.numbers) - 1
            chain.find(number, record.key(chain.run), f"the last round on record is {last}")
    for number in chain.numbers:
        _check_places(chain, number)
        _check_opened(chain, config, number)
        _check_decision(chain, config, number)
        _check_server(chain, config, number)
        _check_down(chain, config, number)
        _check_evaluated(chain, number)
    _check_end(chain, config)


def _check_modes(chain: Chain, config: FederationConfig) -> None:
    first, here = chain.history.federation, modes.origins(config)
    if first.modes != here:
        wanted, got = (", ".join(map(str, found)) or "none" for found in (here, first.modes))
        chain.find(0, first.key(chain.run), f"modes: expected {wanted}, got {got}")


def _check_members(chain: Chain, config: FederationConfig) -> None:
    genesis = chain.history.genesis
    if genesis is None:
        return
    for site in genesis.members:
        if site not in chain.history.members:
            chain.miss(0, topology.member_key(chain.run, site), "the run began with this site")
    # Who did not fit at the start and was not waited for is in the run no more than who declined.
    joined = {
        site: member
        for site, member in chain.history.members.items()
        if site in genesis.members or member.from_round > 0
    }
    for member in joined.values():
        key = member.key(chain.run)
        if member.fingerprint != genesis.fingerprint:
            chain.find(
                0, key, f"fingerprint: expected {genesis.fingerprint}, got {member.fingerprint}"
            )
        if not _fits(member, genesis, config):
            chain.find(0, key, "manifest: is not the one that the run began with")
    fitting = {
        site: member
        for site, member in joined.items()
        if member.fingerprint == genesis.fingerprint and _fits(member, genesis, config)
    }
    for why in dict.fromkeys(unfit(fitting, config).values()):
        chain.find(0, f"{topology.run_prefix(chain.run)}members/", why)


def _fits(member: MemberRecord, genesis: GenesisRecord, config: FederationConfig) -> bool:
    begun = genesis.manifest
    return kind_of(begun).manifest_for(begun, config.lora, member.site) == member.manifest


def _check_controls(chain: Chain) -> None:
    known = {control.number for control in chain.history.controls}
    # Of those that are missing the first hundred say enough; a record may claim any number.
    most = len(known) + MOST_LOST_ROUNDS
    before = range(1, min(max(known, default=0), most + 1))
    wanted = dict.fromkeys(before, (0, "a later one is there"))
    for number, record in _decisions(chain):
        for n in range(1, min(record.controls, most) + 1):
            wanted[n] = (number, f"{record.key(chain.run)} was decided knowing it")
    for n, (number, why) in sorted(wanted.items()):
        if n not in known:
            chain.miss(number, topology.control_key(chain.run, n), why)


def _decisions(
    chain: Chain,
) -> Iterator[tuple[int, OpenedRecord | ClosingRecord | FinishedRecord]]:
    if chain.history.finished is not None:
        yield chain.history.finished.round, chain.history.finished
    for number in reversed(chain.numbers):
        there = chain.history.round(number)
        for record in (there.opened, there.closing):
            if record is not None:
                yield number, record


def _check_places(chain: Chain, number: int) -> None:
    """The records of a round that must be there because of what came after."""
    result = chain.needs_result(number) or chain.has_result(number)
    there = chain.history.round(number)
    key = topology.round_key(chain.run, number, "closed")
    if chain.needs_result(number) and not chain.has_result(number):
        chain.miss(number, key, "the run went on from this round's result")
    if number == 0:
        return
    decided = result or there.closing is not None
    if decided and there.opened is None:
        key = topology.round_key(chain.run, number, "opened")
        chain.miss(number, key, "the round has a result")
    if result and there.closing is None:
        key = topology.round_key(chain.run, number, "closing")
        chain.miss(number, key, "the round has a result")


def _check_opened(chain: Chain, config: FederationConfig, number: int) -> None:
    opened = chain.history.round(number).opened
    if opened is None or opened.rounds is None or not chain.knows(opened.controls):
        return
    steering = steer(chain.history.controls, opened.controls)
    key = opened.key(chain.run)
    total = config.run.rounds + steering.more_rounds
    if opened.rounds != total:
        chain.find(number, key, f"rounds: expected {total}, got {opened.rounds}")
    policy, got = config.policy, opened.deadline_seconds
    fits = get_policy(policy.kind).may_wait(policy, got)
    if not fits or opened.grace_seconds != policy.grace_seconds:
        wanted = f"{policy.deadline} {policy.deadline_seconds} s + {policy.grace_seconds} s"
        chain.find(number, key, f"deadline: expected {wanted}, got {got} + {opened.grace_seconds}")


def _check_decision(chain: Chain, config: FederationConfig, number: int) -> None:
    closing, opened = chain.history.round(number).closing, chain.history.round(number).opened
    if closing is None or not chain.knows(closing.controls):
        return
    key = closing.key(chain.run)
    steering = steer(chain.history.controls, closing.controls)
    counted = {item.site for item in closing.inputs if item.from_round == number}
    for site in sorted(counted & closing.excluded.keys()):
        chain.find(number, key, f"both counts {site} and leaves it out")
    selected = opened.selected if opened else ()
    for site, why in steering.excluded_among(selected).items():
        if closing.excluded.get(site) != why:
            chain.find(number, key, f"excluded: {site} was taken out by an operator ({why})")
    _check_inputs(chain, config, closing, steering.excluded)
    others = {s: why for s, why in closing.excluded.items() if s not in steering.excluded}
    for site, why in others.items():
        if get_policy(config.policy.kind).reasons_on_record:
            _check_reason(chain, number, site, why)
    if opened is not None:
        _check_policy(chain, config, opened, closing, others)


def _check_inputs(
    chain: Chain, config: FederationConfig, closing: ClosingRecord, excluded: Mapping[str, str]
) -> None:
    """No delta that is too old, or of a site that an operator had taken out."""
    number, key = closing.round, closing.key(chain.run)
    oldest = number - config.policy.late_rounds
    for item in closing.inputs:
        if item.site in excluded:
            chain.find(number, key, f"counts {item.site}, which an operator had taken out")
        if not oldest <= item.from_round <= number:
            chain.find(number, key, f"counts {item.site} of round {item.from_round}: too old")


def _check_server(chain: Chain, config: FederationConfig, number: int) -> None:
    """A state of the server's optimiser, and its step, where the run has one and nowhere else."""
    closed = chain.history.round(number).closed
    if closed is None:
        return
    optimizer = config.server.optimizer
    steps = get_server_optimizer(optimizer).rows > 0
    for name, value in (("server_sha", closed.server_sha), ("step_norm", closed.step_norm)):
        if (value is not None) != steps:
            wanted = "one" if steps else "none"
            key = closed.key(chain.run)
            chain.find(number, key, f"{name}: expected {wanted} with {optimizer}, got {value}")


def _check_down(chain: Chain, config: FederationConfig, number: int) -> None:
    """An update and the exact adapter beside it, where the run sends updates and nowhere else."""
    closed = chain.history.round(number).closed
    if closed is None:
        return
    for name in ("exact_sha", "update_sha", "update_size"):
        value = getattr(closed, name)
        if (value is not None) != sends_updates(config):
            wanted = "one" if sends_updates(config) else "none"
            problem = f'{name}: expected {wanted} with codec.down = "{config.codec.down}"'
            chain.find(number, closed.key(chain.run), f"{problem}, got {value}")


def _check_policy(
    chain: Chain,
    config: FederationConfig,
    opened: OpenedRecord,
    closing: ClosingRecord,
    others: dict[str, str],
) -> None:
    """What the policy says of the decision. ``others``: left out, and not by an operator."""
    policy, number, key = config.policy, closing.round, closing.key(chain.run)
    rule = weighting(policy, config.aggregation.weights)
    if closing.weighting not in {"", rule}:
        chain.find(number, key, f"weighting: expected {rule}, got {closing.weighting}")
    with modes.at_work("policies", policy.kind):
        for problem in get_policy(policy.kind).audit(policy, opened, closing, others):
            chain.find(number, key, problem)


def check_told(chain: Chain, closing: ClosingRecord, selected: tuple[str, ...]) -> None:
    """Where the policy tells of all, every selected site is counted or left out.

    ``selected``: as recomputed.
    """
    number = closing.round
    told = {item.site for item in closing.inputs if item.from_round == number}
    told |= closing.excluded.keys()
    if told != set(selected):
        both = f"expected {sorted(selected)}, got {sorted(told)}"
        chain.find(number, closing.key(chain.run), f"sites counted or left out: {both}")


def _check_reason(chain: Chain, number: int, site: str, why: str) -> None:
    """The site failed, or its delta was refused: with that reason."""
    there = chain.history.round(number)
    words: list[RefusedRecord | FailedRecord] = [*there.refused, *there.failed]
    told = [record for record in words if record.site == site]
    if any(record.reason == why for record in told):
        return
    if told:
        for record in told:
            chain.find(
                number, record.key(chain.run), f"reason: expected {why}, got {record.reason}"
            )
        return
    prefix = topology.round_prefix(chain.run, number)
    places = (f"{prefix}failed/{site}-", f"{prefix}refused/{site}-")
    if not any(key.startswith(places) for key in chain.reported):
        problem = f"no record below failed/ or refused/ says why {site} was left out"
        chain.find(number, f"{prefix}failed/{site}-001.json", f"is missing: {problem}")


def _check_evaluated(chain: Chain, number: int) -> None:
    """Sites evaluate the last adapter when they are told of the end, and no other."""
    result = chain.history.round(number).result
    for record in chain.history.round(number).evaluated.values():
        if chain.history.finished is None:
            why = "sites evaluated the last adapter"
            chain.miss(number, topology.finished_key(chain.run), why)
        words = {chain.history.finished.sha} if chain.history.finished else set()
        # Where the two words for the last adapter differ, that is found; it is not the site's.
        if result is not None and record.sha not in {result.adapter_sha, *words}:
            key = record.key(chain.run)
            chain.find(number, key, f"sha: expected {result.adapter_sha}, got {record.sha}")


def _check_end(chain: Chain, config: FederationConfig) -> None:
    done = chain.history.finished
    if done is None or not chain.knows(done.controls):
        return
    steering = steer(chain.history.controls, done.controls)
    total = config.run.rounds + steering.more_rounds
    expected = None
    if steering.stopped is not None:
        expected = f"stopped: {steering.stopped}"
    elif done.round >= total and not done.failed:
        expected = f"all {total} rounds are closed"
    elif not done.failed and not done.reason.startswith("converged"):
        expected = "why it ended before all rounds were closed"
    if expected is not None and done.reason != expected:
        chain.find(
            done.round, done.key(chain.run), f"reason: expected {expected}, got {done.reason}"
        )


def check_origin(
    ledger: Ledger, chain: Chain, genesis: GenesisRecord, settings: AdapterSettings
) -> list[Finding]:
    """Origin and genesis against each other, and against the parent as far as it is in this store.

    Findings go into the chain; the notes say what could not be compared.
    """
    origin = chain.history.origin
    assert origin is not None  # the caller looked
    key, mine = origin.key(chain.run), genesis.key(chain.run)
    claims: list[tuple[str, str, object, object]] = [
        (key, "fingerprint", genesis.fingerprint, origin.fingerprint),
        (key, "manifest", genesis.manifest.digest, origin.manifest.digest),
    ]
    scale = kind_of(settings).scale(settings)
    claims += [(key, name, value, getattr(origin, name)) for name, value in scale.items()]
    notes: list[Finding] = []
    result: GenesisRecord | ClosedRecord | None = None
    try:
        digest, found = _parent(ledger, origin.parent, origin.parent_round)
    except (RunNotFoundError, ObjectMissingError):
        notes.append(Finding(0, key, f"{origin.label} is not in this store: taken as recorded"))
    except LedgerError as error:
        notes.append(Finding(0, key, f"{origin.label}: taken as recorded, since: {error}"))
    else:
        result = found
        claims += [
            (key, "parent_digest", digest, origin.parent_digest),
            (key, "adapter_sha", found.adapter_sha, origin.adapter_sha),
            (key, "adapter_size", found.adapter_size, origin.adapter_size),
        ]
    # Of origin and genesis, the one that the parent or the next round contradicts is wrong.
    truth = result or origin
    sha = truth.adapter_sha if result else chain.result_after(0) or truth.adapter_sha
    claims += [
        (key, "adapter_sha", sha, origin.adapter_sha),
        (mine, "adapter_sha", sha, genesis.adapter_sha),
        (mine, "adapter_size", truth.adapter_size, genesis.adapter_size),
        (mine, "origin", origin.label, genesis.origin),
    ]
    for where, name, expected, got in dict.fromkeys(claims):
        if expected != got:
            chain.find(0, where, f"{name}: expected {expected}, got {got}")
    return notes


def _parent(ledger: Ledger, run: str, number: int) -> tuple[str, GenesisRecord | ClosedRecord]:
    """The parent's config digest and the result of one of its rounds."""
    parent = Ledger(ledger.store, run, ledger.writer, float)
    digest, key = parent.federation().digest, topology.round_key(run, number, "closed")
    if number == 0:
        return digest, parent.read(GenesisRecord, key)
    return digest, parent.read(ClosedRecord, key)
