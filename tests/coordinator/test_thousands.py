"""What a coordinator does for one of thousands of sites costs the same as for one of few.

Nothing is timed: each test counts, or forbids, what would look at all sites for each of them.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.announcing import Announcer
from coordinator.batching import MOST_AT_ONCE, Outbox
from coordinator.limits import Limits
from coordinator.liveness import Liveness, read_status
from coordinator.round.machine import apply, pending, replay
from coordinator.round.selection import is_among
from coordinator.round.state import AnnounceRun, RunState
from shared.config import FederationConfig
from shared.disk.durable_files import file_errors
from shared.disk.files import OTHER_FILES, allow_open_files
from shared.errors import StoreUnavailableError
from shared.protocol.records import ClosedRecord, FederationRecord, GenesisRecord, MemberRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS, manifest_of

SITES = tuple(f"site-{number:05d}" for number in range(50))


def member(site, manifest=MANIFEST):
    """A site's word, equal to the others' and yet no object of theirs, as it comes off the wire."""
    record = MemberRecord(
        site=site, manifest=manifest, fingerprint="f" * 64, numerics=NUMERICS, examples=1
    )
    return MemberRecord.model_validate_json(record.model_dump_json())


@pytest.fixture
def state():
    config = federations.config(SITES)
    return replay(config, [FederationRecord(config={}, digest=config.digest)])


@given(st.lists(st.text("ab-1", min_size=1, max_size=3)), st.text("ab-1", min_size=1, max_size=3))
def test_whether_a_site_is_among_names_is_what_looking_at_all_of_them_says(names, site):
    """In name order, as a round's selection is on record."""
    assert is_among(site, sorted(names)) == (site in names)


def test_who_joins_does_not_make_anybody_look_for_the_silent_ones(state, monkeypatch):
    """They are counted; the last one's word is what the run waits for."""
    looked = []
    asked = RunState.silent.fget
    monkeypatch.setattr(RunState, "silent", property(lambda s: looked.append(1) or asked(s)))
    for site in SITES[:-1]:
        assert state.is_incomplete
        state, effects = apply(state, member(site))
        assert effects == ()
    assert not looked
    state, effects = apply(state, member(SITES[-1]))
    assert len(effects) == 1
    assert looked


def test_a_site_that_spoke_and_was_taken_out_counts_once(state):
    """Counting only says when somebody must be silent; else the names say it."""
    state = apply(state, member(SITES[0]))[0]
    assert state.is_incomplete
    assert SITES[0] not in state.silent
    assert len(state.silent) == len(SITES) - 1


def test_what_all_members_say_alike_is_held_once(state):
    """A manifest of hundreds of tensors, thousands of times, takes gigabytes; another one stays."""
    other = manifest_of(16)
    for site in SITES[:3]:
        state = apply(state, member(site))[0]
    state = apply(state, member(SITES[3], other))[0]
    first, second, third, odd = (state.members[site] for site in SITES[:4])
    assert first.manifest is second.manifest is third.manifest
    assert first.numerics is third.numerics is odd.numerics
    assert third == member(SITES[2])
    assert odd == member(SITES[3], other)


def test_all_sites_are_announced_with_one_digest(state, tmp_path, monkeypatch):
    """It is over a config that names all of them. Each is told what it would be told alone."""
    made = []
    asked = FederationConfig.digest.fget
    monkeypatch.setattr(FederationConfig, "digest", property(lambda c: made.append(1) or asked(c)))
    announcer = Announcer(state.config, DirectoryStore(tmp_path), lambda: 1.0)
    told = dict(announcer.events(AnnounceRun(SITES), state))
    assert len(made) == 1
    assert list(told) == list(SITES)
    for site in SITES[:2]:
        fresh = Announcer(state.config, DirectoryStore(tmp_path), lambda: 1.0)
        assert dict(fresh.events(AnnounceRun((site,)), state)) == {site: told[site]}


def test_a_member_that_comes_online_is_found_without_the_list_of_all(state):
    """It says so every minute; whoever is no participant is owed nothing."""
    state = apply(state, member(SITES[7]))[0]
    assert pending(state, SITES[7]) == (AnnounceRun((SITES[7],)),)
    assert pending(state, SITES[8]) == (AnnounceRun((SITES[8],)),)
    assert pending(state, "stranger") == ()


class _Broker:
    """Notes how many messages are in memory at a publish."""

    def __init__(self):
        self.batches = []

    def publish(self, messages):
        self.batches.append(list(messages))


def test_what_thousands_are_told_goes_out_in_parts_as_it_is_made():
    """In order, all of it, and never more in memory than one part."""
    broker = _Broker()
    heads = iter("123")
    outbox, made = Outbox(broker, lambda: next(heads)), []

    def messages():
        for number in range(2 * MOST_AT_ONCE + 3):
            made.append(number)
            assert len(made) - sum(map(len, broker.batches)) <= MOST_AT_ONCE
            yield lambda head, number=number: (number, head)

    outbox.put([lambda head: ("before", head)])
    outbox.put(messages())
    outbox.flush()
    assert [len(batch) for batch in broker.batches] == [MOST_AT_ONCE, MOST_AT_ONCE, 4]
    assert [one for batch in broker.batches for one, _ in batch] == ["before", *made]
    assert [{head for _, head in batch} for batch in broker.batches] == [{"1"}, {"2"}, {"3"}]


@pytest.mark.parametrize("late_rounds", [0, 2])
def test_what_was_granted_for_rounds_that_take_nothing_more_is_forgotten(late_rounds):
    """Else a coordinator holds a set for each site and round of the run."""
    carry = {
        "kind": "quorum", "quorum": 2, "deadline_seconds": 9.0, "late": "carry",
        "max_staleness": late_rounds,
    }  # fmt: skip
    config = federations.config(SITES, policy=carry if late_rounds else {"kind": "all"})
    limits = Limits(config.limits)
    for number in range(1, 10):
        state = RunState(config, genesis=_genesis(), closed=_closed(number - 1))
        for site in SITES:
            assert limits.grants(state, site, number, "a" * 64, ())
    there = [number for number in range(1, 10) if limits.granted(SITES[0], number)]
    assert there == list(range(9 - late_rounds, 10))


def _genesis():
    return GenesisRecord(
        members=SITES, manifest=MANIFEST, fingerprint="f" * 64, adapter_sha="a" * 64, adapter_size=1
    )


def _closed(number):
    if number == 0:
        return None
    return ClosedRecord(
        round=number, adapter_sha="a" * 64, adapter_size=1, mean_norm=1.0, delta_norms={},
        cosines={}, source_held_out=None,
    )  # fmt: skip


def test_the_status_asks_once_whom_the_run_waits_for(state, tmp_path, monkeypatch):
    """And not for each site whose queue nobody reads."""
    asked, waits = [], RunState.waiting_for.fget
    monkeypatch.setattr(RunState, "waiting_for", property(lambda s: asked.append(1) or waits(s)))
    store = DirectoryStore(tmp_path)
    liveness = Liveness(store, "test", "w", {})
    liveness.counted(dict.fromkeys(SITES, 0), SITES, 5.0)
    liveness.write(state, 6.0)
    assert len(asked) == 1
    assert read_status(store, "test").absent == dict.fromkeys(SITES, 5.0)


_CLOSE = """
import resource, sys
from pathlib import Path
import numpy as np
from coordinator.aggregation.closing import aggregate
from shared.methods.inputs import WeightedDelta
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.tensor_file import TensorLayout, write_tensors
from tests.numpy_learner import MANIFEST

folder, count = Path(sys.argv[1]), int(sys.argv[2])
layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in MANIFEST.tensors]
write_tensors(folder / "source", layouts, [np.zeros(s.shape, np.float32) for s in MANIFEST.tensors])
deltas = []
for number in range(count):
    site = f"site-{number:05d}"
    header = DeltaHeader.of("fp32", run="r", number=1, site=site, source_sha="0" * 64)
    path = folder / site
    write_delta(path, MANIFEST, "fp32", header, lambda spec: np.ones(spec.shape, np.float32), 1)
    deltas.append(WeightedDelta(site, path, 1 / count))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (count // 2, hard))
print(aggregate(folder / "source", deltas, MANIFEST, folder / "target").mean_norm)
"""


def test_a_round_of_more_deltas_than_files_may_be_open_is_closed(tmp_path):
    """Systems begin with 1,024, which a process may raise; each delta is held open."""
    command = [sys.executable, "-c", _CLOSE, str(tmp_path), "80"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(8.0)  # 64 ones


def test_where_so_many_files_may_never_be_open_it_says_what_to_raise(tmp_path, monkeypatch):
    """The system's hard limit is nothing that a process may change."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("nothing is to be raised"))
    with pytest.raises(
        OSError, match=f"at least {10_000 + OTHER_FILES} open files, got 4096"
    ) as it:
        allow_open_files(10_000)
    assert it.value.errno == errno.EMFILE
    with pytest.raises(StoreUnavailableError, match="LimitNOFILE"), file_errors(tmp_path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_the_limit_of_open_files_is_raised_only_when_it_is_too_low(monkeypatch):
    """To what is needed, and no limit is no limit."""
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    for soft, wanted in ((1024, 10_000), (20_000, 10_000), (resource.RLIM_INFINITY, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, 1_048_576))
        allow_open_files(wanted)
    assert raised == [(10_000 + OTHER_FILES, 1_048_576)]
