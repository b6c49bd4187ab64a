"""A coordinator asks a site for more than it accepted, or for what is none of its business."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from contextlib import contextmanager

import pytest

from gradualdiff.cli.serve import make_context, make_learner
from participant.acceptance import FAILURES_PER_ROUND, TRAININGS_PER_ROUND
from shared.config import SiteConfig, parse
from shared.errors import ConfigError, DataError, ModelError
from shared.protocol.events import (
    AdapterEvaluated,
    DeltaAnswered,
    ParticipantReady,
    RoundClosed,
    RunDeclined,
    RunFinished,
    TrainingFailed,
    UploadGranted,
    UploadRequested,
)
from shared.stores.transfer import HttpTransfer
from tests.red_team.conftest import FITTING, HostileCoordinator

# Trainings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"training": {**FITTING, "local_steps": 200}}, "training.local_steps: expected 4"),
        ({"training": {**FITTING, "batch_size": 1}}, "training.batch_size: expected 4"),
        ({"training": {**FITTING, "learning_rate": 9.0}}, "training.learning_rate"),
        ({"averaging": "flora"}, "aggregation.averaging: expected fedavg as announced"),
        ({"progress_from": 0.0, "progress_to": 3.9}, "progress"),
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_round_is_trained_as_announced_or_not_at_all(hostile, asked, named, restarted):
    """What was checked at the announcement is what holds in the round, also after a restart."""
    attack = hostile(max_steps=5)
    attack.announce()
    source = attack.draw(attack.manifest)
    if restarted:
        attack.restart_site()
        attack.announce()
    attack.start(source, **asked)
    (failed,) = attack.said(TrainingFailed)
    assert named in failed.reason
    assert attack.site.trained is None
    assert attack.learner.trained == []


@pytest.mark.parametrize(("limits", "most"), [({"max_rounds": 2}, 2), ({}, TRAININGS_PER_ROUND)])
def test_trainings_are_counted_whatever_round_they_are_said_to_be(hostile, limits, most):
    """One round number, one adapter after the other; the site's restart forgets none."""
    attack = hostile(**limits)
    attack.announce(rounds=2)
    manifest = attack.manifest
    for seed in range(6):
        attack.start(attack.draw(manifest, seed))
        attack.restart_site()
        attack.announce(rounds=2)
    assert attack.learner.trained == [1] * most
    assert len(attack.uploads) == most
    assert "trainings under one round number" in attack.said(TrainingFailed)[-1].reason


def test_a_refused_delta_that_is_trained_again_counts_once(hostile):
    """The same task gives the same bytes: an honest coordinator loses nothing."""
    attack = hostile(max_rounds=2)
    attack.announce(rounds=2)
    source = attack.draw(attack.manifest)
    for _ in range(5):
        attack.start(source)
        delta = attack.said(UploadRequested)[-1]
        attack.tell(DeltaAnswered(run="r", round=1, sha=delta.sha, verdict="refused"))
    attack.start(attack.draw(attack.manifest, 2), 2)
    assert attack.learner.trained == [1] * 5 + [2]
    assert len(set(attack.uploads)) == 2


def test_failures_are_bounded_and_honest_ones_are_tried_again(hostile):
    """Ten in a round, restarts included."""
    attack = hostile()
    attack.announce()
    source = attack.draw(attack.manifest)
    tries = []

    def fail(task):
        tries.append(task.round)
        raise ModelError("no memory left on /dev/secret")

    attack.learner.fault = fail
    for attempt in range(1, 16):
        attack.start(source, attempt=attempt)
        attack.restart_site()
        attack.announce()
    assert tries == [1] * FAILURES_PER_ROUND
    reasons = [failed.reason for failed in attack.said(TrainingFailed)]
    assert reasons[0] == "ModelError (code 12); the site's own log says more"
    assert "no longer tries round 1" in reasons[-1]


def test_other_settings_under_a_digest_that_was_accepted_are_declined(hostile):
    """Also after a restart: the digest stands for one set of settings."""
    attack = hostile()
    attack.announce()
    attack.restart_site()
    attack.announce(training={**FITTING, "local_steps": 5})
    assert len(attack.said(ParticipantReady)) == 1
    assert "announced before" in attack.said(RunDeclined)[0].reason


# The loss of an adapter ----------------------------------------------------------------------


def finished(sha: str, number: int = 1) -> RunFinished:
    return RunFinished(
        run="r", round=number, sha=sha, reason="end", get_url="https://store/k", expires_at=2e3
    )


def test_one_loss_is_told_in_a_run_and_no_restart_brings_another(hostile):
    """Six adapters of the attacker's choice, then again after a restart: one answer, the first."""
    attack = hostile()
    attack.announce()
    manifest = attack.manifest
    shas = [attack.draw(manifest, seed) for seed in range(6)]
    attack.start(shas[0])
    for _ in range(2):
        for sha in shas:
            attack.tell(finished(sha))
        attack.restart_site()
        attack.announce()
    told = attack.said(AdapterEvaluated)
    assert {event.sha for event in told} == {shas[0]}
    assert len({event.held_out.nll for event in told}) == 1


def test_no_loss_is_told_where_the_site_took_no_part_or_the_round_ended_otherwise(hostile):
    """Before its first training; and of another adapter than the round closed with."""
    attack = hostile()
    attack.announce()
    one, other = (attack.draw(attack.manifest, seed) for seed in (1, 2))
    attack.tell(finished(one))
    attack.start(one)
    attack.tell(RoundClosed(run="r", round=1, result_sha=one))
    attack.tell(finished(other))
    assert attack.said(AdapterEvaluated) == []
    attack.tell(finished(one))
    assert len(attack.said(AdapterEvaluated)) == 1


def test_a_loss_of_few_examples_stays_here(hostile):
    """NumPy's learner holds out one: no loss of it in a round, none at the end."""
    attack = hostile(min_held_out=2)
    attack.announce()
    source = attack.draw(attack.manifest)
    attack.start(source)
    attack.tell(finished(source))
    assert attack.submitted[0].metrics.held_out is None
    assert attack.said(AdapterEvaluated) == []


def test_without_metrics_counts_and_seconds_leave_and_no_loss(hostile):
    """What the one sentence about send_metrics says."""
    attack = hostile(send_metrics=False)
    attack.announce()
    source = attack.draw(attack.manifest)
    attack.start(source)
    attack.tell(finished(source))
    (delta,) = attack.submitted
    assert (delta.examples, delta.metrics.steps) == (100, 1)
    assert delta.metrics.seconds
    left = delta.metrics.model_dump(exclude_defaults=True)
    assert left.keys() == {"steps", "seconds"}
    assert attack.said(AdapterEvaluated) == []


# What is on the site's machine ---------------------------------------------------------------


def test_a_decline_tells_no_path_and_no_column(hostile):
    """The site's own log has them."""
    attack = hostile()

    def prepare(announced, report):
        raise DataError("/srv/hospital/oncology.csv: expected column diagnosis, got name, ward")

    attack.learner.prepare = prepare
    attack.announce()
    (declined,) = attack.said(RunDeclined)
    assert declined.reason == "DataError (code 11); the site's own log says more"


@pytest.mark.parametrize("listed", [None, ("owner/m",)])
def test_which_folders_are_here_is_not_told(hostile, tmp_path, listed):
    """A folder that is there and one that is not get the same answer, and neither is opened."""
    (tmp_path / "there").mkdir()
    attack = hostile(**({"models": listed} if listed else {}))
    for name in ("there", "gone"):
        attack.model = str(tmp_path / name)
        attack.announce()
    there, gone = attack.said(RunDeclined)
    assert there.reason.replace("there", "gone") == gone.reason
    assert attack.learner.prepared == set()


@pytest.mark.model
def test_a_folder_named_like_a_hub_id_is_not_looked_for(tiny_model, tmp_path, monkeypatch):
    """Neither beside site.toml nor where the participant was started; one that is named, is."""
    from participant.model.libraries import offline

    there = tmp_path / "owner" / "there"
    shutil.copytree(tiny_model, there)
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"what is {i}?", "a": f"number {i} of many"} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ask(name, **accept):
        values = {
            "site": {"name": "a"},
            "data": {"path": "t.jsonl", "prompt": "q", "answer": "a"},
            "accept": accept,
        }
        config = parse(SiteConfig, values, "site.toml")
        learner = make_learner(config, tmp_path)
        attack = HostileCoordinator(
            tmp_path / f"{name}-{len(accept)}", learner, config.accept, model=name
        )
        with offline():  # so the hub has neither
            attack.announce()
        return attack

    for name in ("owner/gone", "owner/there"):
        (declined,) = ask(name).said(RunDeclined)
        assert declined.reason == "ModelError (code 12); the site's own log says more"
    assert ask("owner/there", models=("owner/there",)).said(ParticipantReady)


# Other servers -------------------------------------------------------------------------------


@contextmanager
def web_server(answer: bytes, location: str | None = None):
    """A server on this machine that keeps what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(302 if location else 200)
            self.send_header("Content-Length", str(len(answer)))
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_GET  # noqa: N815 - the library calls it so

        def log_message(self, *args):
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_no_other_server_is_asked_and_nothing_of_it_is_told(hostile):
    """An internal page by a signed URL, by one that reads two ways, and by the store's redirect."""
    with web_server(b"internal") as (inside, seen), web_server(b"", inside + "/page") as (store, _):
        attack = hostile(HttpTransfer(store=store))
        attack.announce()
        host = inside.removeprefix("http://")
        urls = [
            f"{inside}/page",
            f"{store}@{host}/page",
            f"{store}\\@{host}/page",
            f"{store}.evil/page",
            f"{store}#@{host}/page",
            f"{store}/k",  # its redirect leads inside
        ]
        for url in urls:
            attack.start("a" * 64, get_url=url)
            reason = attack.said(TrainingFailed)[-1].reason
            assert reason.endswith("; the site's own log says more"), url
            assert not any(word in reason for word in ("302", "page", "127", "sha256")), url
        assert len(attack.said(TrainingFailed)) == len(urls)
        assert seen == []


def test_a_site_without_the_stores_address_is_not_started(tmp_path):
    """A site.toml of an older kit: nobody else's word would do, so it says what to add."""
    values = {
        "site": {"name": "a"},
        "data": {"path": "t.jsonl", "text": "t"},
        "broker": {"url": "amqp://a@localhost/", "password_file": "p"},
    }
    with pytest.raises(ConfigError, match=r"add \[store\] with url"):
        make_context(parse(SiteConfig, values, "site.toml"), tmp_path, None, threading.Event())


def test_a_delta_is_sent_to_no_other_server(hostile):
    """A grant that names one stays undone at the site."""
    with web_server(b"") as (inside, seen):
        attack = hostile()
        attack.announce()
        attack.start(attack.draw(attack.manifest))
        attack.transfer = HttpTransfer(store="https://store.example")
        attack.restart_site()
        attack.announce()
        delta = attack.said(UploadRequested)[-1]
        grant = UploadGranted(
            run="r",
            round=1,
            sha=delta.sha,
            chunk_size=2**24,
            urls={0: f"{inside}/page"},
            expires_at=2000.0,
        )
        with pytest.raises(ConfigError, match=r"store\.url"):
            attack.tell(grant)
        assert seen == []


def test_what_was_read_in_place_of_an_adapter_is_not_told(hostile):
    """Neither its sha256 nor its size: the store may hold what the coordinator may not read."""
    with web_server(b"secret") as (store, seen):
        attack = hostile(HttpTransfer(store=store))
        attack.announce()
        attack.start("a" * 64, get_url=f"{store}/k")
        (failed,) = attack.said(TrainingFailed)
        assert failed.reason == "IntegrityError (code 35); the site's own log says more"
        assert seen
