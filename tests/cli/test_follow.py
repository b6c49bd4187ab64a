"""``gradualdiff rounds show --follow``: who is where, from a ledger and a status object alone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.liveness import ONLINE_SECONDS, RunStatus, SiteStatus, read_status
from coordinator.runs import following
from coordinator.runs.newest_round import Follower
from coordinator.runs.operating import operator_ledger, order
from gradualdiff.cli import follow, follow_screens
from gradualdiff.cli.main import app
from shared import topology
from shared.config import canonical_json, load_federation
from shared.errors import ConfigError, RunNotFoundError, StoreUnavailableError
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import HeldOut, LocalMetrics
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FailedRecord,
    FinishedRecord,
    GenesisRecord,
    Input,
    MemberRecord,
    OpenedRecord,
    RejoinedRecord,
)
from shared.stores.directory import DirectoryStore
from shared.stores.opening import open_s3
from tests.federations import config
from tests.numpy_learner import MANIFEST, NUMERICS
from tests.patience import PATIENCE_SECONDS, wait_until
from tests.servers.deployment import Deployment

ROOT = Path(__file__).parents[2]
SHA = "a" * 64
START = 1_700_000_000.0
METRICS = LocalMetrics(
    steps=1, train_nll=1.0, first_step_nll=1.0, last_step_nll=1.0, mean_grad_norm=1.0
)


class Written:
    """A run ``test`` of sites a, b and c, written step by step; the clock stands still."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.store = Counting(folder)
        self.now = START
        self.ledger = Ledger(self.store, "test", "w", lambda: self.now)
        self.ledger.begin(config())

    def join(self, *sites):
        for site in sites:
            self.ledger.write(
                MemberRecord(
                    site=site, manifest=MANIFEST, fingerprint=SHA, numerics=NUMERICS, examples=1
                )
            )

    def genesis(self):
        self.join("a", "b", "c")
        self.ledger.write(
            GenesisRecord(
                members=("a", "b", "c"),
                manifest=MANIFEST,
                fingerprint=SHA,
                adapter_sha=SHA,
                adapter_size=1,
            )
        )

    def open(self, number=1):
        self.ledger.write(
            OpenedRecord(
                round=number,
                selected=("a", "b", "c"),
                source_sha=SHA,
                seed=1,
                progress_from=0,
                progress_to=1,
            )
        )

    def accept(self, site, number=1):
        self.ledger.write(
            AcceptedRecord(
                round=number,
                site=site,
                sha=SHA,
                size=1,
                examples=1,
                tokens=1,
                norm=1.0,
                metrics=METRICS,
                state="fresh",
            )
        )

    def close(self, number=1):
        one = Input(site="a", from_round=number, sha=SHA, weight=1.0)
        excluded = {"b": "failed too often"}
        self.ledger.write(
            ClosingRecord(round=number, source_sha=SHA, inputs=(one,), excluded=excluded)
        )
        self.ledger.write(
            ClosedRecord(
                round=number,
                adapter_sha=SHA,
                adapter_size=1,
                mean_norm=1.0,
                delta_norms={},
                cosines={},
                source_held_out=HeldOut(nll=2.5, tokens=1, examples=1),
            )
        )

    def finish(self):
        self.ledger.write(FinishedRecord(round=1, sha=SHA, reason="all rounds are closed"))

    def status(self, *, waiting=(), state="open", number=1, absent=None, **sites):
        """Each site as keyword: a SiteStatus's values."""
        status = RunStatus(
            run="test",
            writer="w",
            at=self.now,
            round=number,
            state=state,
            since=START,
            waiting_for=waiting,
            absent=absent or {},
            sites={name: SiteStatus(**{"seen": self.now, **told}) for name, told in sites.items()},
        )
        data = canonical_json(status.model_dump(mode="json"))
        self.store.put(topology.status_key("test"), data)

    def views(self, *steps, number=None):
        """What is shown while ``steps`` happen, one a second; then the run has to end."""
        shown, left = [], list(steps)

        def sleep(_seconds):
            assert left, f"it goes on: {shown[-1]}"
            left.pop(0)()

        how = {"away": follow.say_away, "sleep": sleep, "clock": lambda: self.now}
        shown.extend(following.views(self.store, "test", number, **how))
        assert not left
        return shown


class Counting(DirectoryStore):
    """Counts what is read; ``away`` makes it unavailable."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.gets: list[str] = []
        self.lists = 0
        self.away = False

    def get(self, key):
        if self.away:
            raise StoreUnavailableError("the store is away")
        self.gets.append(key)
        return super().get(key)

    def list(self, prefix):
        self.lists += 1
        return super().list(prefix)


@pytest.fixture
def run(tmp_path):
    return Written(tmp_path / "store")


def sites(view):
    """Each site's view by name."""
    return {site.site: site for site in view.sites}


def test_who_does_not_fit_is_told_until_it_is_mended(run):
    """Before the run begins: the odd one out, why and what to do; its last word counts."""
    run.join("a", "b")
    odd = {"site": "c", "manifest": MANIFEST, "numerics": NUMERICS, "examples": 1}
    run.ledger.write(MemberRecord(**odd, fingerprint="e" * 64))
    run.status(waiting=("c",), state="waiting", number=0)

    def mend():
        run.ledger.write(RejoinedRecord(**odd, fingerprint=SHA, number=2))
        run.status(state="waiting", number=0)

    def end():
        run.genesis()
        run.finish()
        run.status(state="finished")

    waiting, mended, *_ = run.views(mend, end)
    assert sites(waiting)["c"].state == "does not fit"
    assert sites(waiting)["c"].pending_since == START
    assert "give it the same weights" in sites(waiting)["c"].reason
    assert waiting.reason == "waits until c is fixed and started again"
    assert (mended.reason, sites(mended)["c"].state) == ("", "joined")


def test_each_participants_state_is_told(run):
    """Training with step, rate and time to go; accepted; away; waiting with the last failure."""
    run.genesis()
    run.now = START + 10
    run.open()
    run.accept("b")
    run.ledger.write(FailedRecord(round=1, site="c", attempt=1, reason="disk", retryable=True))
    run.now = START + 400
    progress = {"progress_at": run.now, "round": 1, "activity": "train", "step": 3, "of": 9}
    run.status(
        waiting=("a", "c"),
        a={**progress, "seconds": 6.0, "tokens_per_second": 50.0, "bytes_down": 7, "bytes_up": 8},
        b={},
        c={"seen": run.now - ONLINE_SECONDS - 1},
    )
    now, status = Follower(run.store, "test").look(), read_status(run.store, "test")
    view = following.look(now, status, run.now)
    assert (view.round, view.rounds, view.state, view.since) == (1, 3, "open", START + 10)
    found = sites(view)
    a, b, c = found["a"], found["b"], found["c"]
    assert (a.state, a.step, a.of, a.tokens_per_second) == ("training", 3, 9, 50.0)
    assert (a.eta_seconds, a.bytes_down, a.bytes_up, a.pending_since) == (12.0, 7, 8, START + 10)
    assert (b.state, b.pending_since) == ("accepted", None)
    assert (c.state, c.away_since) == ("away", run.now - ONLINE_SECONDS - 1)
    assert "disk" in c.reason
    assert follow_screens.sentence(a) == "training"
    assert "away since 20" in follow_screens.sentence(c)
    assert not view.coordinator_silent
    assert following.look(now, status, run.now + 31).coordinator_silent


def test_a_site_that_does_not_listen_is_away_whatever_it_said_last(run):
    """Although it was heard a second ago, and also if it was never heard; not one that is done."""
    run.genesis()
    run.now = START + 10
    run.open()
    run.accept("c")
    training = {"progress_at": run.now, "round": 1, "activity": "train", "step": 2, "of": 4}
    run.status(waiting=("a", "b"), absent={"a": START + 11, "b": START + 12}, a=training)
    now = Follower(run.store, "test").look()
    view = following.look(now, read_status(run.store, "test"), run.now)
    states = {name: (site.state, site.away_since) for name, site in sites(view).items()}
    assert states == {
        "a": ("away", START + 11),
        "b": ("away", START + 12),
        "c": ("accepted", None),
    }
    assert "no process reads its queue" in follow_screens.sentence(sites(view)["a"])


def test_off_a_terminal_each_round_is_one_line_with_its_losses(run, capsys):
    """However many steps were told of, and although the next round opened in the same moment."""
    screen = follow_screens.Lines()
    run.genesis()
    run.open()

    def train(step):
        told = {"progress_at": run.now, "round": 1, "activity": "train", "step": step, "of": 4}
        return lambda: run.status(waiting=("a", "b", "c"), a=told)

    def close():
        run.accept("a")
        run.close()
        run.open(2)
        run.status(number=2, waiting=("a",))

    for view in run.views(
        *(train(step) for step in (1, 2, 3)),
        close,
        lambda: (run.finish(), run.status(state="finished", number=2)),
    ):
        screen.show(view)
    said = capsys.readouterr().out.splitlines()
    losses = "held-out loss before it 2.5000, training loss at its end 1.0000"
    assert said.count(f"round 1 of 3 is closed, {losses}") == 1
    assert said.count("  a: training") == 1
    assert not [line for line in said if " of 4" in line]


def test_it_waits_for_a_run_that_has_not_begun(tmp_path, capsys):
    """Neither the store nor the run need be there; it says so once, and goes on when they are."""
    folder, waits = tmp_path / "store", []

    def sleep(_seconds):
        waits.append(1)
        if len(waits) == 2:
            DirectoryStore(folder)
        elif len(waits) == 4:
            Written(folder)

    followed = follow.wait_for_run(folder, "test", sleep)
    assert followed.objects.list("runs/")
    assert len(waits) == 4
    told = capsys.readouterr().err
    assert told.count("waiting until it begins") == 1
    assert "no store at" in told


def test_a_word_about_an_earlier_round_is_not_shown(run):
    """A site that told of its last training waits in the new round until it tells of this one."""
    run.genesis()
    run.now = START + 10
    run.open(1)
    old = {"progress_at": START + 5, "round": 1, "activity": "train", "step": 3, "of": 3}
    run.status(waiting=("a", "b", "c"), a=old)
    now = Follower(run.store, "test").look()
    view = following.look(now, read_status(run.store, "test"), run.now)
    assert sites(view)["a"].state == "waiting"
    assert sites(view)["b"].state == "waiting"  # never heard


def test_it_follows_a_run_from_before_its_first_round_to_its_end(run):
    """Joining, genesis, a round, the end; only what changed is shown."""
    views = run.views(
        lambda: run.status(waiting=("a", "b", "c"), state="waiting", number=0),
        lambda: (run.join("a"), run.status(waiting=("b", "c"), state="waiting", number=0)),
        lambda: (run.genesis(), run.open(), run.status(waiting=("a", "b", "c"))),
        lambda: None,
        lambda: (run.accept("a"), run.status(waiting=("b", "c"))),
        lambda: (run.close(), run.status(state="closing")),
        lambda: (run.finish(), run.status(state="finished")),
    )
    assert [(view.round, view.state) for view in views] == [
        (-1, "waiting"),
        (-1, "waiting"),
        (1, "open"),
        (1, "open"),
        (1, "closed"),
        (1, "finished"),
    ]
    assert sites(views[1])["a"].state == "joined"
    assert sites(views[0])["a"].pending_since == START
    last = {name: site.state for name, site in sites(views[-1]).items()}
    assert last == {"a": "counted", "b": "excluded", "c": "waiting"}
    assert views[-1].adapter_sha == SHA


def test_one_round_is_followed_to_its_close(run):
    """Not further, and a round that is not there is an error."""
    run.genesis()
    run.open(1)
    run.accept("a")
    views = run.views(
        lambda: (run.close(), run.open(2), run.status(number=2, waiting=("a",))), number=1
    )
    assert [(view.round, view.state) for view in views] == [(1, "open"), (1, "closed")]
    with pytest.raises(RunNotFoundError, match="no round 7"):
        run.views(number=7)


def test_an_operators_word_is_shown(run):
    """A site that was taken out is excluded at once; a paused run says so; extensions count."""
    asked = operator_ledger(run.store, "test", lambda: run.now)
    run.genesis()
    run.open(1)
    run.accept("a")
    views = run.views(
        lambda: (order(asked, "exclude", "moved", site="c"), run.status(waiting=("b",))),
        lambda: (order(asked, "extend", "more", rounds=2), order(asked, "pause", "lunch")),
        lambda: (run.close(), run.status(state="closing")),
        lambda: (run.finish(), run.status(state="finished")),
    )
    before, out = sites(views[0]), sites(views[1])
    assert (before["c"].state, out["c"].state, out["c"].reason) == ("waiting", "excluded", "moved")
    assert out["c"].pending_since is None
    paused = [view for view in views if view.state == "paused"]
    assert [(view.reason, view.rounds) for view in paused] == [("lunch", 5)]


def test_the_store_is_read_gently(run):
    """A second in which nothing moved costs one object; a record is read once."""
    run.genesis()
    run.open()
    run.status(waiting=("a", "b", "c"))
    reads = []

    def quiet():
        reads.append((len(run.store.gets), run.store.lists))

    run.views(quiet, quiet, quiet, lambda: (run.finish(), run.status(state="finished")))
    assert [now[0] - before[0] for before, now in pairwise(reads)] == [1, 1]
    assert {lists for _, lists in reads} == {1}
    records = [key for key in run.store.gets if "/rounds/" in key]
    assert len(records) == len(set(records))


def test_a_store_that_is_away_is_waited_for(run, capsys):
    """One word on stderr; it goes on when the store is back."""
    run.genesis()
    run.open()

    def leave():
        run.store.away = True

    def come_back():
        run.store.away = False
        run.finish()
        run.status(state="finished")

    views = run.views(leave, lambda: None, come_back)
    assert views[-1].state == "finished"
    assert capsys.readouterr().err.count("trying again") == 1


def test_the_end_is_shown_in_lines_and_in_json(run):
    """A finished run is told at once; a run that is not there, and --plot beside it, are errors."""
    run.genesis()
    run.open()
    run.accept("a")
    run.close()
    run.finish()
    shown = CliRunner().invoke(app, command(run))
    assert shown.exit_code == 0
    assert "Run test, round 1 of 3: finished (all rounds are closed)" in shown.stdout
    assert "  b: excluded, failed too often" in shown.stdout
    (line,) = CliRunner().invoke(app, command(run, "--json")).stdout.splitlines()
    assert json.loads(line)["sites"][1]["state"] == "excluded"
    for arguments, error in ((("--plot", "x.png"), ConfigError), (("7",), RunNotFoundError)):
        assert isinstance(CliRunner().invoke(app, command(run, *arguments)).exception, error)


def command(run, *more):
    """The command line."""
    return ["rounds", "show", "test", "--follow", "--store", str(run.folder), *more]


def spawn(run, out, *more):
    """A process that follows."""
    # A shell starts what it puts in the background with SIGINT ignored, and that is inherited.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from gradualdiff.cli.main import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *command(run, *more)],
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "150"},
        text=out == subprocess.PIPE,
    )


def test_ctrl_c_ends_it(run):
    """With 130, and without a traceback."""
    run.genesis()
    run.open()
    with spawn(run, subprocess.PIPE) as process:
        assert "open" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(PATIENCE_SECONDS) == 130
    assert "Traceback" not in rest


def test_on_a_terminal_it_is_a_table(run):
    """Drawn in place; it stays when the run is finished."""
    run.genesis()
    run.open()
    near, far = pty.openpty()
    shown = bytearray()

    def read():
        try:
            while data := os.read(near, 4096):
                shown.extend(data)
        except OSError:
            pass  # the other end is closed

    with spawn(run, far) as process:
        os.close(far)
        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: b"pending since" in shown, "the table")
        run.finish()
        assert process.wait(PATIENCE_SECONDS) == 0
    reader.join()
    os.close(near)
    assert b"waiting" in shown
    assert b"finished" in shown


@pytest.mark.slow
def test_a_real_deployment_is_followed_to_its_end(tmp_path, rabbit_server, vhost, s3_server):
    """Over S3, while real processes train: somebody is seen waiting or at work, all is counted.

    And what the broker's queues say meanwhile.
    """
    deployment = Deployment(tmp_path, None, rabbit_server, vhost, s3_server)
    try:
        deployment.start_coordinator()
        _, held = (deployment.start_participant(name, slow=3.0) for name in "ab")
        deployment.wait_for("opened.recorded", "coordinator")
        held.send_signal(signal.SIGSTOP)  # round 1 stays open until the follower has seen it
        where = ("--federation", str(deployment.federation))
        follower = deployment.start(
            "follow", "gradualdiff.cli.main", "rounds", "show", "tiny", "--follow", "--json", *where
        )
        wait_until(lambda: '"round": 1' in deployment.log("follow"), "round 1 was seen")
        held.send_signal(signal.SIGCONT)
        listed = json.loads(deployment.command("queues", "list", "--json", *where).stdout)
        events = json.loads(
            deployment.command(
                "queues", "peek", "events", "--limit", "1000", "--json", *where
            ).stdout
        )
        deployment.finish()
        assert follower.wait(PATIENCE_SECONDS) == 0
    finally:
        deployment.close()
    views = [json.loads(line) for line in deployment.log("follow").splitlines()]
    assert {view["round"] for view in views} >= {1, 3}
    assert views[-1]["state"] == "finished"
    assert [site["state"] for site in views[-1]["sites"]] == ["counted", "counted"]
    seen = {site["state"] for view in views for site in view["sites"]}
    assert seen & {"waiting", "training", "loading", "evaluating", "uploading"}
    rows = {row["site"]: row for row in listed["queues"] if row["site"]}
    assert rows["a"]["consumers"] == 1
    assert "of round" in rows["a"]["waits_for"]
    assert "ParticipantReady" in {message["type"] for message in events["messages"]}


@pytest.mark.slow
def test_a_killed_site_is_shown_as_away_long_before_its_silence_tells(
    tmp_path, rabbit_server, vhost, s3_server
):
    """Kill -9 while it trains: the broker counts no consumer of its queue, and that is shown."""
    deployment = Deployment(tmp_path, None, rabbit_server, vhost, s3_server)
    where = ("--federation", str(deployment.federation))
    try:
        deployment.start(
            "follow", "gradualdiff.cli.main", "rounds", "show", "tiny", "--follow", "--json", *where
        )
        deployment.wait_for("waiting until it begins", "follow")
        deployment.start_coordinator()
        deployment.start_participant("a", slow=600.0)
        deployment.start_participant("b")
        deployment.wait_for('"state": "accepted"', "follow")
        killed = time.time()
        deployment.kill("a")
        deployment.wait_for('"state": "away"', "follow")
        print("seen after", round(time.time() - killed, 1), "s")  # noqa: T201 - a report quotes it
        status = read_status(
            open_s3(load_federation(deployment.federation).store, tmp_path), "tiny"
        )
        assert status.at - status.sites["a"].seen < ONLINE_SECONDS
        rows = json.loads(
            deployment.command("rounds", "show", "tiny", "1", "--json", *where).stdout
        )
        reasons = {row["site"]: row["reason"] for row in rows["sites"]}
        assert "no process reads its queue" in reasons["a"]
        assert reasons["b"] == ""
        deployment.start_participant("a")
        deployment.finish()
        assert deployment.processes["follow"].wait(PATIENCE_SECONDS) == 0
    finally:
        deployment.close()
    last = json.loads(deployment.log("follow").splitlines()[-1])
    assert last["state"] == "finished"
