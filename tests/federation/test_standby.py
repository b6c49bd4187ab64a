"""Two coordinators: the active one is killed, or frozen and woken later, at named points.

The other takes over within seconds, the woken one changes nothing that counts, and every round is
trained once and ends in the undisturbed digest.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.patience import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.slow

KINDS = ("opened", "accepted", "closing", "closed")
LAST = ("adapter.before:tensors", "record.before:finished")
POINTS = (
    *(f"record.{side}:{kind}" for kind in KINDS for side in ("before", "after")),
    *(f"adapter.{side}:{file}" for file in ("config", "tensors") for side in ("before", "after")),
    "record.before:finished",
)
FENCED = "was written by coordinator-"
# Where a record of another writer is met at once; elsewhere the cut line is what the woken one sees
FENCED_AT = ("record.before:opened", "record.before:closing", "record.before:finished")


class Pair:
    """The active coordinator and the one that stands by, in turn; each fault is met in order."""

    def __init__(self, deployment, points, word):
        self.deployment = deployment
        self.word = word
        self.points = list(points)
        self.active, self.waiting = "coordinator", "standby"
        self.takeovers: list[float] = []
        self.start(self.active, points[::2])
        deployment.wait_for("coordinator.active", self.active)
        self.known = self.signs(self.waiting)
        self.start(self.waiting, points[1::2])

    def start(self, name, points):
        """One of the two, which meets these points while it is active."""
        armed = " ".join(f"{point}={self.word}" for point in points)
        count = self.deployment.log(name).count("coordinator.connected")
        self.deployment.start_coordinator(name, armed=armed)
        self.deployment.wait_for("coordinator.connected", name, count=count + 1)

    def signs(self, name):
        """How often it became active, or was hit at once when it was about to be."""
        return self.deployment.log(name).count("coordinator.active") + len(
            self.deployment.fired(name)
        )

    def wait_until_hit(self, point):
        """Until the active one signalled itself there."""
        wait_until(
            lambda: f"{point} {self.word}" in self.deployment.fired(self.active),
            lambda: f"{point} was never met: {self.deployment.log(self.active)[-2000:]}",
        )

    def wait_for_takeover(self):
        """Until the other is active; they swap names."""
        began = time.monotonic()
        wait_until(
            lambda: self.signs(self.waiting) > self.known,
            lambda: f"{self.waiting} stood by: {self.deployment.log(self.waiting)[-2000:]}",
        )
        self.takeovers.append(round(time.monotonic() - began, 1))
        self.active, self.waiting = self.waiting, self.active
        self.known = self.signs(self.waiting)


def test_the_active_one_may_be_killed_at_any_point(deploy):
    """SIGKILL between any two effects; the dead one is started again to stand by."""
    deployment = deploy(rounds=len(POINTS))
    pair = Pair(deployment, POINTS, "SIGKILL")
    for site in "ab":
        deployment.start_participant(site)
    for number, point in enumerate(POINTS):
        pair.wait_until_hit(point)
        deployment.processes[pair.active].wait(PATIENCE_SECONDS)
        pair.wait_for_takeover()
        pair.start(pair.waiting, POINTS[number + 2 :: 2])
    assert deployment.finish(pair.active) == deployment.wanted()
    print("takeovers, seconds:", pair.takeovers)  # noqa: T201 - what a report quotes
    for site in "ab":
        assert deployment.trained(site) == [f"tiny {n + 1}" for n in range(len(POINTS))]


def test_the_active_one_may_freeze_at_any_point_and_wake_later(deploy):
    """SIGSTOP in the middle of a write; woken after the other has written, it stands by."""
    points = (*(f"record.before:{kind}" for kind in KINDS), *LAST)
    # How long a freeze takes to be noticed is measured elsewhere, with the product's own heartbeat.
    deployment = deploy(
        rounds=len(points) + 1, settings="gradualdiff.cli.serve:COORDINATOR_HEARTBEAT=2"
    )
    pair = Pair(deployment, points, "SIGSTOP")
    for site in "ab":
        deployment.start_participant(site)
    for point in points:
        pair.wait_until_hit(point)
        frozen = pair.active
        waits = deployment.log(frozen).count("coordinator.waits")
        pair.wait_for_takeover()
        fences = deployment.log(frozen).count(FENCED)
        os.kill(deployment.processes[frozen].pid, signal.SIGCONT)
        deployment.wait_for("coordinator.waits", frozen, count=waits + 1)
        if point in FENCED_AT:
            deployment.wait_for(FENCED, frozen, count=fences + 1)
    assert deployment.finish(pair.active) == deployment.wanted()
    print("takeovers, seconds:", pair.takeovers)  # noqa: T201 - what a report quotes
    for site in "ab":
        assert deployment.trained(site) == [f"tiny {n + 1}" for n in range(len(points) + 1)]
