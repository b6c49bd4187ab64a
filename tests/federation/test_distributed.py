"""Real servers, real processes: the same digest as the embedded run, through kills and stops."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error

import pytest

from participant.learner.port import RESIDUAL_FILE
from shared import topology
from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.config import load_federation, load_site
from shared.credentials import broker_address
from shared.errors import UnroutableError
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, EvaluatedRecord
from shared.stores.opening import open_s3
from tests.patience import PATIENCE_SECONDS
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

COARSE = '[codec]\nname = "uniform4"\n'


@pytest.mark.model
def test_three_processes_end_where_one_does(deploy, tmp_path):
    """A real model at two sites, over RabbitMQ and S3: the embedded run's very bytes."""
    deployment = deploy(model=make_tiny_model(tmp_path / "model"))
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    sha = deployment.finish()
    embedded = deployment.command("simulate", str(deployment.federation))
    assert sha in embedded.stdout
    deployment.command("runs", "verify", "tiny", "--federation", str(deployment.federation))


def test_any_process_may_be_killed(deploy):
    """SIGKILL of each in turn, in the middle of a round; nothing finished is trained again.

    Under a coarse codec: what it left out outlives the kills too.
    """
    deployment = deploy(extra=COARSE)
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.kill_in_turn("coordinator", "a", "b", slow=1.0)
    assert deployment.finish() == deployment.wanted()
    for site in "ab":
        assert deployment.trained(site) == ["tiny 1", "tiny 2", "tiny 3"]


def test_a_site_that_lost_its_workspace_says_so_and_the_run_goes_on(deploy):
    """What its codec left out of earlier deltas is gone: on record, in log and table."""
    deployment = deploy(extra=COARSE)
    deployment.start_coordinator()
    deployment.start_participant("a", slow=5.0)  # so that it is still at round 2 when it is killed
    deployment.start_participant("b")
    deployment.wait_for("opened.recorded", "coordinator", count=2)
    deployment.kill("a")
    workspace = deployment.site_toml("a").parent / "workspace"
    assert list(workspace.glob(f"tiny/trained/00001-*/{RESIDUAL_FILE}"))
    shutil.rmtree(workspace)
    deployment.start_participant("a")
    assert deployment.finish() != deployment.wanted()
    said = {
        (record.site, record.round): record.residual
        for record in deployment.ledger().history()
        if isinstance(record, AcceptedRecord)
    }
    assert [key for key, word in said.items() if word == "lost"] == [("a", 2)]
    assert deployment.log("a").count("residual.lost") == 1
    place = ("--federation", str(deployment.federation))
    shown = deployment.command("rounds", "show", "tiny", "2", *place).stdout
    assert "a: what its codec left out of earlier deltas was lost with its workspace" in shown
    deployment.command("runs", "verify", "tiny", *place)


def test_a_standby_takes_over(deploy):
    """The second coordinator only waits, until the first is killed; then it is the active one."""
    deployment = deploy()
    deployment.start_coordinator()
    deployment.wait_for("coordinator.active", "coordinator")
    deployment.start_coordinator("standby")
    deployment.wait_for("coordinator.connected", "standby")
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.wait_for("round.closed", "coordinator")
    assert "coordinator.active" not in deployment.log("standby")
    deployment.kill("coordinator")
    deployment.wait_for("coordinator.active", "standby")
    assert deployment.finish("standby") == deployment.wanted()


def test_a_frozen_coordinator_is_replaced_and_changes_nothing_when_it_wakes(deploy):
    """SIGSTOP in the middle: the other takes over; woken up, the first one stands by."""
    deployment = deploy()
    active = deployment.start_coordinator()
    deployment.wait_for("coordinator.active", "coordinator")
    deployment.start_coordinator("standby")
    deployment.wait_for("coordinator.connected", "standby")
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.wait_for("round.closed", "coordinator")
    active.send_signal(signal.SIGSTOP)
    deployment.wait_for("coordinator.active", "standby")
    active.send_signal(signal.SIGCONT)
    deployment.wait_for("coordinator.waits", "coordinator")
    assert deployment.finish("standby") == deployment.wanted()
    for site in "ab":
        assert deployment.trained(site) == ["tiny 1", "tiny 2", "tiny 3"]


def test_a_finished_run_leaves_no_queue_to_fill(deploy):
    """Gone with its coordinator; a site's late word ends nothing; a restart says the same end."""
    deployment = deploy(rounds=1)
    queue = topology.coordinator_queue("tiny")
    deployment.start_coordinator("coordinator", "--linger", "30")
    for site in "ab":
        deployment.start_participant(site)
    deployment.wait_for("opened.recorded", "coordinator")
    store = open_s3(load_federation(deployment.federation).store, deployment.folder)
    store.put(topology.inbox_key("tiny", 7, "a", "0" * 64, 0), b"never submitted")
    digest = deployment.finish()
    assert list(store.list(topology.INBOX)) == []
    with pytest.raises(urllib.error.HTTPError, match="404"):
        deployment.rabbit.api("GET", f"queues/{deployment.vhost}/{queue}")
    asked = ("queues", "list", "--federation", str(deployment.federation))
    (row, *_) = json.loads(deployment.command(*asked, "--json").stdout)["queues"]
    assert (row["queue"], row["ready"], row["consumers"]) == (queue, None, None)
    assert "no queue" in deployment.command(*asked).stdout
    kit = deployment.site_toml("a")
    with connect(broker_address(load_site(kit).broker, kit.parent)) as line:
        for word in topology.MIRRORED:  # only the mirror takes them, which drops its oldest
            late = topology.event_key("tiny", "a", word)
            line.publish([Message(topology.EVENTS_EXCHANGE, late, b"too late")])
        unheard = topology.event_key("tiny", "a", "progressed")
        with pytest.raises(UnroutableError, match=unheard):
            line.publish([Message(topology.EVENTS_EXCHANGE, unheard, b"too late")])
    deployment.kill("a")
    site = deployment.start_participant("a")  # comes online, and speaks to nobody
    deployment.wait_for("broker.connected", "a", count=2)
    deployment.start_coordinator("again", "--linger", "30")
    assert deployment.finish("again") == digest
    assert site.poll() is None
    with pytest.raises(urllib.error.HTTPError, match="404"):
        deployment.rabbit.api("GET", f"queues/{deployment.vhost}/{queue}")


def test_nobody_waits_for_a_loss_from_a_site_that_tells_none(deploy):
    """The coordinator is gone as soon as b's is there, and not after ten minutes."""
    deployment = deploy(rounds=1)
    toml = deployment.site_toml("a")
    toml.write_text(toml.read_text().replace("[accept]\n", "[accept]\nsend_metrics = false\n"))
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site)
    deployment.finish()
    store = open_s3(load_federation(deployment.federation).store, deployment.folder)
    history = list(Ledger(store, "tiny", "test", time.time).history())
    assert {r.site for r in history if isinstance(r, AcceptedRecord)} == {"a", "b"}
    assert [r.site for r in history if isinstance(r, EvaluatedRecord)] == ["b"]


def test_cron_takes_the_rounds_one_by_one(deploy):
    """``--once`` at both sites again and again: one round each; then there is nothing, exit 3."""
    deployment = deploy()
    deployment.start_coordinator("coordinator", "--linger", "5")
    codes = []
    for _ in range(30):
        sites = [deployment.start_participant(site, "--once") for site in "ab"]
        codes += [site.wait(PATIENCE_SECONDS) for site in sites]
        if deployment.processes["coordinator"].poll() is not None:
            break
    assert deployment.finish() == deployment.wanted()
    assert codes.count(0) == 6
    assert set(codes) <= {0, 3}
    assert [
        deployment.start_participant(site, "--once").wait(PATIENCE_SECONDS) for site in "ab"
    ] == [3, 3]
    assert deployment.trained("a") == ["tiny 1", "tiny 2", "tiny 3"]


@pytest.mark.parametrize("moment", ["broker.connected", "opened.recorded", "delta.accepted"])
def test_sigterm_ends_each(deploy, moment):
    """And started again they go on to the same digest."""
    deployment = deploy(rounds=2)
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.start_coordinator()
    deployment.wait_for(moment, "a" if moment == "broker.connected" else "coordinator")
    for name, process in deployment.processes.items():
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 130, deployment.log(name)
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    assert deployment.finish() == deployment.wanted()
    assert deployment.trained("a") == ["tiny 1", "tiny 2"]


def test_a_run_outside_of_what_a_site_accepts_is_declined(deploy):
    """With the reason in the coordinator's view, and the training text untouched."""
    deployment = deploy()
    toml = deployment.site_toml("a")
    toml.write_text(
        toml.read_text()
        .replace("\nmax_rank = 4", "\nmax_rank = 2")
        .replace("\nmax_rounds = 3", "\nmax_rounds = 1")
    )
    deployment.start_coordinator()
    deployment.start_participant("a")
    deployment.wait_for("run.declined", "coordinator")
    assert "accept.max_rank: expected at most 2, got 4" in deployment.log("coordinator")
    assert "accept.max_rounds: expected at most 1, got 3" in deployment.log("coordinator")
    assert deployment.trained("a") == []


def test_one_run_in_trouble_holds_up_no_other(deploy, tmp_path):
    """Two runs at the same sites; one names a store that they do not ask: the other ends."""
    deployment = deploy()
    text = deployment.federation.read_text().replace('name = "tiny"', 'name = "stuck"')
    stuck = deployment.folder / "stuck.toml"
    stuck.write_text(text.replace("[store]", '[store]\nsite_url = "http://127.0.0.1:9"'))
    for site in "ab":
        deployment.start_participant(site)
    deployment.start("stuck", "gradualdiff.cli.main", "coordinator", str(stuck))
    deployment.wait_for("opened.recorded", "stuck")
    deployment.wait_for("training.failed", "a")
    deployment.start_coordinator()
    assert deployment.finish() == deployment.wanted()
    assert deployment.processes["stuck"].poll() is None


def test_once_says_that_the_broker_is_away(deploy):
    """Not that there is nothing to do: cron and Slurm would take it for idleness."""
    deployment = deploy()
    toml = deployment.site_toml("a")
    toml.write_text(toml.read_text().replace(f":{deployment.rabbit.port}/", ":1/"))
    assert deployment.start_participant("a", "--once").wait(PATIENCE_SECONDS) == 41
