"""Stragglers and absence over real servers: what closing.json fixed is kept through kills."""

from __future__ import annotations

import math
import signal

import pytest

from tests.patience import wait_until
from tests.servers.deployment import Deployment

pytestmark = pytest.mark.slow

QUORUM = '[policy]\nkind = "quorum"\nquorum = 1\ndeadline_seconds = 2.0\n'
CARRY = QUORUM + 'late = "carry"\n'
BUFFERED = '[policy]\nkind = "buffered"\nbuffer = 1\n'


@pytest.fixture
def deploy(tmp_path, rabbit_server, vhost, s3_server):
    """Makes the deployment; all of its processes are ended at the end."""
    made = []

    def make(policy: str, **settings) -> Deployment:
        made.append(
            Deployment(tmp_path, None, rabbit_server, vhost, s3_server, extra=policy, **settings)
        )
        return made[0]

    yield make
    for deployment in made:
        deployment.close()


def verified(deployment: Deployment) -> list[tuple[str, int, int, float]]:
    """(site, from_round, round, weight) of all that counted; ``runs verify`` must agree first."""
    option = ("--federation", str(deployment.federation))
    assert "verified" in deployment.command("runs", "verify", "tiny", *option).stdout
    counted = [
        (item.site, item.from_round, closing.round, item.weight)
        for closing in deployment.closings()
        for item in closing.inputs
    ]
    pairs = [(site, number) for site, number, _, _ in counted]
    assert len(pairs) == len(set(pairs)), "a delta was counted twice"
    return counted


def test_a_quorum_goes_on_without_a_straggler_and_drops_what_it_sends_later(deploy):
    """The coordinator is killed after the decision: the same decision stands."""
    deployment = deploy(QUORUM, rounds=2)
    deployment.start_participant("a")
    deployment.start_participant("b", slow=600.0)
    deployment.start_coordinator()
    deployment.wait_for("closing.recorded", "coordinator")
    deployment.kill("coordinator")
    first = deployment.closings()
    deployment.start_coordinator("coordinator", "--linger", "1")
    sha = deployment.finish()
    assert deployment.closings()[0] == first[0]
    assert first[0].excluded == {"b": "no delta within 2 s"}
    assert "round.called_off" in deployment.log("b")
    assert deployment.trained("b") == []
    assert [(site, number) for site, number, _, _ in verified(deployment)] == [("a", 1), ("a", 2)]
    assert (
        sha
        in deployment.command(
            "runs", "show", "tiny", "--json", "--federation", str(deployment.federation)
        ).stdout
    )


def test_a_late_delta_is_carried_into_a_later_round_for_less(deploy):
    """A slow site's deltas count later, each once; a kill of the coordinator changes nothing."""
    deployment = deploy(CARRY, rounds=5)
    deployment.start_participant("a", slow=1.5)
    deployment.start_participant("b", slow=5.0)
    deployment.start_coordinator()
    deployment.wait_for("closing.recorded", "coordinator", count=2)
    deployment.kill("coordinator")
    deployment.start_coordinator("coordinator", "--linger", "1")
    deployment.finish()
    counted = verified(deployment)
    carried = [entry for entry in counted if entry[1] < entry[2]]
    assert carried, counted
    for site, from_round, number, weight in carried:
        assert site == "b"
        old = 1 / math.sqrt(1 + number - from_round)
        others = [e for e in counted if e[2] == number and e != (site, from_round, number, weight)]
        total = old + sum(1 / math.sqrt(1 + number - e[1]) for e in others)
        assert math.isclose(weight, old / total)


def test_a_buffer_has_no_barrier(deploy):
    """The fast site commits round after round; the slow one's deltas count when they come."""
    deployment = deploy(BUFFERED, rounds=8)
    deployment.start_participant("a", slow=0.7)
    deployment.start_participant("b", slow=2.0)
    deployment.start_coordinator()
    deployment.wait_for("closing.recorded", "coordinator", count=3)
    deployment.kill("coordinator")
    deployment.start_coordinator("coordinator", "--linger", "1")
    deployment.finish()
    counted = verified(deployment)
    assert len([e for e in counted if e[0] == "a"]) > len([e for e in counted if e[0] == "b"]) > 0
    assert [e for e in counted if e[0] == "b" and e[1] < e[2]]


@pytest.mark.parametrize(("policy", "counts"), [(CARRY, True), (QUORUM, False)])
def test_a_site_comes_back_after_days_with_an_old_round_in_its_workspace(deploy, policy, counts):
    """It offers what it holds. Carried: it counts once. Dropped: it is told so and forgets it."""
    deployment = deploy(policy, rounds=4)
    coordinator = deployment.start_coordinator("coordinator", "--linger", "1")
    deployment.start_participant("a", slow=1.0)
    deployment.start_participant("b", slow=3.0)
    wait_until(lambda: deployment.begun("b"), "b trains")
    coordinator.send_signal(signal.SIGSTOP)  # so that nobody takes the delta
    deployment.wait_for("round.trained", "b")
    deployment.kill("b")
    coordinator.send_signal(signal.SIGCONT)
    deployment.wait_for("round.closed", "coordinator", count=2)
    deployment.start_participant("b", slow=1.0)
    deployment.finish()
    mine = [(e[1], e[2]) for e in verified(deployment) if e[0] == "b"]
    assert deployment.trained("b").count("tiny 1") == 1
    if counts:
        assert [pair for pair in mine if pair[0] == 1 < pair[1]], mine
    else:
        assert all(from_round == number > 1 for from_round, number in mine)
        assert "round 1 is not open for this site" in deployment.log("b")


def test_a_site_joins_in_the_middle_and_another_leaves_for_good(deploy):
    """With too few at the start; who joins trains from the next round on, who left is left out."""
    deployment = deploy(QUORUM, rounds=6, run="min_participants = 1\nstart_timeout_seconds = 1.0\n")
    deployment.start_participant("a", slow=1.0)
    deployment.start_coordinator("coordinator", "--linger", "1")
    deployment.wait_for("round.closed", "coordinator")
    deployment.start_participant("b", slow=0.2)
    wait_until(
        lambda: [i for c in deployment.closings() for i in c.inputs if i.site == "b"], "b counts"
    )
    deployment.kill("a")
    deployment.finish()
    counted = verified(deployment)
    sites = {number: {e[0] for e in counted if e[2] == number} for number in range(1, 7)}
    assert sites[1] == {"a"}
    assert {"a", "b"} in sites.values()
    assert sites[6] == {"b"}
