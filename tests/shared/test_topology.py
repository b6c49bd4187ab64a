"""Names on the broker and in the store: they fit together, and a site reaches only its own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import topology
from shared.brokers.embedded_state import topic_matches
from shared.config import NAME_PATTERN
from shared.protocol.events import EVENTS
from shared.topology import (
    ANY_RUN,
    COORDINATOR,
    EVENTS_EXCHANGE,
    MIRRORED,
    MIRRORED_ANY,
    REFUSED_EXCHANGE,
    SITES_EXCHANGE,
    coordinator_queue,
    coordinator_rights,
    event_key,
    mirror_queue,
    run_topology,
    site_of_key,
    site_queue,
    site_rights,
)

NAMES = st.from_regex(NAME_PATTERN.replace("$", r"\Z"), fullmatch=True)
WORDS = sorted({kind.word for kind in EVENTS.values()})
SHA = "0123456789abcdef" * 4


def test_every_binding_joins_what_is_declared():
    """No exchange or queue is missing, none is unused, no name is there twice."""
    declared = run_topology("r1", ("a", "b"))
    exchanges = [exchange.name for exchange in declared.exchanges]
    queues = [queue.name for queue in declared.queues]
    assert len(set(exchanges)) == len(exchanges)
    assert len(set(queues)) == len(queues)
    assert {binding.exchange for binding in declared.bindings} == set(exchanges)
    assert {binding.queue for binding in declared.bindings} == set(queues)


def test_two_runs_agree_on_what_they_share():
    """Else the second coordinator could not declare: a site in two runs has one queue."""
    first, second = run_topology("r1", ("a", "b")), run_topology("r2", ("b", "c"))
    queues = {queue.name: queue for queue in first.queues}
    for queue in second.queues:
        assert queues.get(queue.name, queue) == queue
    assert first.exchanges == second.exchanges


def test_only_the_coordinators_queue_has_a_single_active_consumer_and_only_it_drops_nothing():
    """It refuses what it has no room for, and the sender says it again; others drop the oldest."""
    for queue in run_topology("r1", ("a",)).queues:
        is_coordinators = queue.name == coordinator_queue("r1")
        assert queue.single_active_consumer == is_coordinators
        assert queue.refuses == is_coordinators
        assert queue.max_length is not None


@given(run=NAMES, site=NAMES, word=st.sampled_from(WORDS))
def test_an_events_key_comes_apart_as_it_was_made(run, site, word):
    """And its site may publish it, and its run's queue takes it."""
    key = event_key(run, site, word)
    assert site_of_key(key) == site
    assert site_rights(site).topic_write.fullmatch(key)
    assert takers(run_topology(run, (site,)), key) - {mirror_queue(run)} == {coordinator_queue(run)}


def test_what_sites_say_is_mirrored_but_for_progress():
    """All of it, once; what the coordinator tells itself is not."""
    words = {kind.word for kind in EVENTS.values() if (kind.__doc__ or "").startswith("Site ->")}
    assert words - {"progressed"} == {*MIRRORED, "online"}
    for word in WORDS:
        run = ANY_RUN if word in MIRRORED_ANY else "r1"
        found = takers(run_topology("r1", ("a",)), event_key(run, "a", word))
        assert (mirror_queue("r1") in found) == (word in {*MIRRORED, *MIRRORED_ANY})


@pytest.mark.parametrize("key", ["", "a", "a.b", "a.b.c.d", "...", "r1..online"])
def test_a_key_of_another_form_speaks_for_nobody(key):
    """'' is no site's name, so such a message is refused."""
    assert not re.fullmatch(NAME_PATTERN, site_of_key(key))


@given(site=NAMES, other=NAMES, run=NAMES)
def test_a_site_reaches_only_its_own(site, other, run):
    """Its queue, its keys, one exchange; it configures nothing."""
    rights = site_rights(site)
    assert rights.read.fullmatch(site_queue(site))
    assert bool(rights.read.fullmatch(site_queue(other))) == (site == other)
    assert bool(rights.topic_write.fullmatch(event_key(run, other, "online"))) == (site == other)
    assert rights.write.fullmatch(EVENTS_EXCHANGE)
    for name in (SITES_EXCHANGE, REFUSED_EXCHANGE, "", "gradualdiff-events", site_queue(site)):
        assert not rights.write.fullmatch(name)
    for name in (coordinator_queue(run), site_queue(site), EVENTS_EXCHANGE):
        assert not rights.configure.fullmatch(name)
    assert not rights.read.fullmatch(coordinator_queue(run))


@given(site=NAMES, run=NAMES)
def test_the_coordinator_reaches_all_that_is_ours_and_nothing_else(site, run):
    """What it declares, it may configure, write and read; no name of anybody else's."""
    rights = coordinator_rights()
    declared = run_topology(run, (site,))
    for what in (*declared.queues, *declared.exchanges):
        for right in (rights.configure, rights.write, rights.read):
            assert right.fullmatch(what.name)
    assert rights.topic_write.fullmatch(event_key(run, COORDINATOR, "tick"))
    for foreign in (
        "",
        "amq.default",
        "amq.topic",
        "orders",
        "gradualdiff",
        "x.gradualdiff.site.a",
    ):
        for right in (rights.configure, rights.write, rights.read):
            assert not right.fullmatch(foreign)


def test_a_site_that_comes_online_is_heard_by_every_run():
    """It need not know which runs there are."""
    key = event_key(ANY_RUN, "a", "online")
    for run in ("r1", "r2"):
        found = takers(run_topology(run, ("a",)), key)
        assert found == {coordinator_queue(run), mirror_queue(run)}


def test_the_coordinators_own_events_reach_its_own_queue_only():
    """A tick of one run is no business of another."""
    key = event_key("r1", COORDINATOR, "tick")
    assert takers(run_topology("r1", ("a",)), key) == {coordinator_queue("r1")}
    assert takers(run_topology("r2", ("a",)), key) == set()


def takers(declared: topology.Topology, key: str) -> set[str]:
    """The queues that the events exchange leads this key to."""
    return {
        binding.queue
        for binding in declared.bindings
        if binding.exchange == EVENTS_EXCHANGE and topic_matches(binding.routing_key, key)
    }


# Object keys ----------


def object_keys(run: str, site: str, number: int) -> list[str]:
    """One key of each kind."""
    return [
        topology.federation_key(run),
        topology.member_key(run, site),
        topology.declined_key(run, site),
        topology.adapter_key(run, SHA),
        topology.adapter_key(run, SHA, "adapter_config.json"),
        topology.delta_key(run, number, site, SHA),
        *(topology.round_key(run, number, name) for name in ("opened", "closing", "closed")),
        topology.accepted_key(run, number, site),
        topology.refused_key(run, number, site, SHA),
        topology.failed_key(run, number, site, 1),
        topology.evaluated_key(run, number, site),
        topology.finished_key(run),
        topology.inbox_key(run, number, site, SHA, 0),
        topology.status_key(run),
        topology.account_key(site),
    ]


@given(run=NAMES, site=NAMES, number=st.integers(0, 99_999))
def test_object_keys_are_the_stores_and_distinct(run, site, number):
    """Each fits the port's rule for keys; no two records share one."""
    keys = object_keys(run, site, number)
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", part) for part in key.split("/"))
        assert not {".", "..", ""} & set(key.split("/"))


@given(first=st.integers(0, 99_999), second=st.integers(0, 99_999))
def test_rounds_sort_as_numbers(first, second):
    """A listing in key order is a history in time order."""
    keys = [topology.round_prefix("r1", number) for number in (first, second)]
    assert (keys[0] < keys[1]) == (first < second)


@given(run=NAMES, other=NAMES)
def test_one_runs_prefix_holds_nothing_of_another(run, other):
    """Run ``a`` and run ``a-1`` do not mix."""
    key = topology.federation_key(other)
    assert key.startswith(topology.run_prefix(run)) == (run == other)


def test_the_inbox_is_outside_the_run():
    """What a site may write is nothing that the ledger's readers list."""
    key = topology.inbox_key("r1", 1, "a", SHA, 0)
    assert not key.startswith(topology.run_prefix("r1"))
