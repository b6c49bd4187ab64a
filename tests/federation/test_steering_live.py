"""A live run over real servers, steered from another process."""

from __future__ import annotations

import json

import pytest

from tests import patience
from tests.servers.deployment import Deployment

pytestmark = pytest.mark.slow


@pytest.fixture
def deployment(tmp_path, rabbit_server, vhost, s3_server):
    """Two sites that train in numpy; all processes are ended at the end."""
    made = Deployment(tmp_path, None, rabbit_server, vhost, s3_server, rounds=3)
    yield made
    made.close()


def runs(deployment, verb, *arguments, run="tiny", check=True):
    """``gradualdiff runs VERB RUN ...`` on the deployment's store."""
    options = ("--federation", str(deployment.federation))
    return deployment.command("runs", verb, run, *arguments, *options, check=check)


def summary(deployment):
    """What ``runs show`` says of the run."""
    return json.loads(runs(deployment, "show", "--json").stdout)["summary"]


def wait_until(deployment, state):
    """Until ``runs show`` says so."""
    patience.wait_until(
        lambda: summary(deployment)["state"] == state,
        lambda: f"{state}: {summary(deployment)} {deployment.log('coordinator')}",
    )


def test_a_live_run_is_paused_resumed_extended_and_stopped(deployment):
    """The coordinator notices each word by itself, and finds it again after a kill."""
    for site in "ab":
        deployment.start_participant(site, slow=3.0)
    deployment.start_coordinator()
    deployment.wait_for("opened.recorded", "coordinator")
    said = runs(deployment, "pause", "--reason", "the GPUs are needed").stdout
    assert "control/00001.json: pause is on record" in said
    deployment.wait_for("control.noticed", "coordinator")
    closed = deployment.log("coordinator").count("opened.recorded")
    wait_until(deployment, f"paused after round {closed}")

    deployment.kill("coordinator")
    deployment.start_coordinator()
    deployment.wait_for("coordinator.active", "coordinator", count=2)
    assert "after round 13" in runs(deployment, "extend", "10").stdout
    deployment.wait_for("control.noticed", "coordinator", count=2)
    assert summary(deployment)["state"] == f"paused after round {closed}"
    assert summary(deployment)["rounds"] == 13

    assert "next round begins" in runs(deployment, "resume").stdout
    deployment.wait_for("opened.recorded", "coordinator", count=4)  # beyond the configured three
    assert "branch tiny --at" in runs(deployment, "stop", "--reason", "good enough").stdout
    sha = deployment.finish()
    last = summary(deployment)
    assert (last["state"], last["reason"]) == ("finished", "stopped: good enough")
    assert last["adapter_sha"] == sha
    assert last["rounds_closed"] >= 3
    refused = runs(deployment, "pause", check=False)
    assert refused.returncode == 20
    assert f"runs branch tiny --at {last['rounds_closed']} --name NEW" in refused.stderr
    runs(deployment, "verify")


def test_a_branch_over_a_bucket_goes_on_where_its_parent_stopped(deployment):
    """Copied on the server's side, pruned, and begun by the very sites."""
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    sha = deployment.finish()
    said = runs(deployment, "branch", "--at", "3", "--name", "tiny-2").stdout
    assert f"sha256 {sha}" in said
    assert "Deleted 10 objects" in runs(deployment, "prune", "--keep", "adapters", "--yes").stdout
    assert "pruned on" in runs(deployment, "verify").stdout
    text = deployment.federation.read_text().replace('name = "tiny"', 'name = "tiny-2"')
    copy = deployment.federation.with_name("branch.toml")
    copy.write_text(text)
    deployment.start("branch", "gradualdiff.cli.main", "coordinator", str(copy))
    assert deployment.finish("branch") != sha
    shown = json.loads(
        deployment.command("runs", "show", "tiny-2", "--json", "--federation", str(copy)).stdout
    )
    assert shown["summary"]["origin"] == "tiny@3"
    runs(deployment, "verify", run="tiny-2")
