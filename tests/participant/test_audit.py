"""The gate over a real model: who learns by heart is kept here, who learns is let go."""

from __future__ import annotations

import json
import shutil
import stat

import numpy as np
import pytest
from structlog.testing import capture_logs

torch = pytest.importorskip("torch")

from participant.audit.report import AUDIT_FILE  # noqa: E402  # after the skip
from participant.held import LOG_FILE, AuditedDeltas  # noqa: E402
from participant.learner.model_pool import ModelPool  # noqa: E402
from participant.learner.torch_learner import TorchLearner  # noqa: E402
from participant.privacy.noise import SecretStream  # noqa: E402
from shared import failpoints  # noqa: E402
from shared.config import AcceptSection, DataSection, SitePrivacySection  # noqa: E402
from shared.errors import ConfigError, InterruptedRunError  # noqa: E402
from shared.protocol.events import (  # noqa: E402
    DeltaAnswered,
    RunDeclined,
    TrainingFailed,
    UploadRequested,
    WirePrivacy,
)
from tests.red_team.conftest import HostileCoordinator  # noqa: E402
from tests.tiny_audit import LORA, SETTINGS, SITES, make_confident_model, write_text  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.slow]

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def confident(tmp_path_factory):
    return make_confident_model(tmp_path_factory.mktemp("confident") / "model")


@pytest.fixture(scope="module")
def pool():
    return ModelPool("cpu")


@pytest.fixture
def at_site(tmp_path, confident, pool):
    """A site of this kind, and a coordinator that asks it for rounds; each in its own folder."""

    def make(kind, seed=1, extra="", **privacy):
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_text(folder / "text.jsonl", SITES[kind][0], seed, extra)
        return coordinator_of(folder, confident, pool, kind, **privacy)

    return make


@pytest.fixture(scope="module")
def once(tmp_path_factory, confident, pool):
    """An overfitted site whose delta was kept; tests that change anything take a copy."""
    folder = tmp_path_factory.mktemp("once") / "site"
    folder.mkdir()
    write_text(folder / "text.jsonl", SITES["overfitted"][0], 1)
    site = coordinator_of(folder, confident, pool, "overfitted")
    announce(site)
    site.task = start(site)
    return site


@pytest.fixture
def again(tmp_path, confident, pool, once):
    """The same site after a restart, with the folder to itself, and its delta."""
    shutil.copytree(once.folder, tmp_path / "again")
    site = coordinator_of(tmp_path / "again", confident, pool, "overfitted")
    announce(site)
    (kept,) = deltas(site).all()
    return site, kept


def coordinator_of(folder, model, pool, kind, **privacy):
    data = DataSection(path="text.jsonl", prompt="q", answer="a", held_out_fraction=0.5)
    section = SitePrivacySection(**{"audit": "gate", **privacy})
    learner = TorchLearner("a", data, folder, pool, section)
    accept = AcceptSection(models=(str(model),), max_rounds=5)
    coordinator = HostileCoordinator(folder, learner, accept, model=str(model))
    coordinator.training = {**SETTINGS, "local_steps": SITES[kind][1]}
    return coordinator


def die(*_):
    raise InterruptedRunError("killed")


def announce(site, **fields):
    site.announce(LORA, training=site.training, **fields)


def start(site, **fields):
    return site.start(site.draw(site.manifest), training=site.training, seed=1, **fields)


def deltas(site):
    return AuditedDeltas(site.folder / "workspace", lambda: 1000.0)


@pytest.fixture(autouse=True)
def _disarm():
    yield
    failpoints.arm(None)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_overfitted_site_is_blocked_and_a_normal_one_passes(at_site, seed):
    """By text that it writes word for word, and by loss; the normal one learnt as well."""
    bad, good = at_site("overfitted", seed), at_site("normal", seed)
    for site in (bad, good):
        announce(site)
        start(site)
    (kept,) = deltas(bad).all()
    figures = kept.report.figures
    assert (kept.state, figures.verdict) == ("held", "blocked")
    assert {"hits_block", "auc_block"} <= set(figures.crossed)
    assert figures.hits >= 3
    assert min(figures.auc, figures.auc_min_k) > 0.75
    assert bad.submitted == bad.uploads == bad.said(UploadRequested) == []
    (delta,) = good.submitted
    assert delta.audit.verdict in ("passed", "warned")
    assert delta.audit.hits < 3  # two words of thirteen may be right by chance
    assert delta.audit.personal == 0
    assert delta.audit.auc < 0.75
    metrics = delta.metrics
    assert metrics.last_step_nll < metrics.first_step_nll / 2


def test_a_kept_delta_says_nothing_of_why_and_is_not_trained_again(once, again):
    """The coordinator hears that there is none; a site that starts again says the same."""
    site, kept = again
    (failure,) = once.said(TrainingFailed)
    assert (failure.retryable, "privacy.audit" in failure.reason) == (False, True)
    texts = [finding.text for finding in kept.report.findings]
    assert texts
    assert not any(text in failure.reason for text in [*texts, "AUC", "hits"])
    passed = []
    failpoints.arm(passed.append)
    site.tell(once.task)
    assert [told.reason for told in site.said(TrainingFailed)] == [failure.reason]
    assert "training.stepped" not in passed
    assert site.said(UploadRequested) == []


def test_what_was_reproduced_is_for_this_user_only(once):
    """It is text of patients: the file's mode says so."""
    (kept,) = deltas(once).all()
    rows = [json.loads(line)["a"] for line in (once.folder / "text.jsonl").read_text().splitlines()]
    assert all(any(finding.text in row for row in rows) for finding in kept.report.findings)
    assert stat.S_IMODE((kept.folder / AUDIT_FILE).stat().st_mode) == 0o600


def test_an_operator_releases_it_and_it_is_sent_with_that_word(again):
    """While the site runs; once; on record with who and why."""
    site, kept = again
    deltas(site).release(kept.submission.sha[:8], "ward@north", "the text is public")
    site.site.offer_released()
    site.site.offer_released()
    (asked,) = site.said(UploadRequested)
    assert asked.sha == kept.submission.sha
    (line,) = deltas(site).decisions()
    said = line["action"], line["by"], line["reason"], line["sha"]
    assert said == ("release", "ward@north", "the text is public", asked.sha)
    site.take(asked)
    (sent,) = site.submitted
    assert (sent.sha, sent.audit.verdict, sent.audit.released) == (asked.sha, "blocked", True)
    with pytest.raises(ConfigError, match="one that the gate keeps, got one that is ready"):
        deltas(site).drop(asked.sha, "ward@north", "no")


def test_a_released_one_is_offered_at_the_next_start(again):
    """The participant need not be running when its operator decides."""
    site, kept = again
    deltas(site).release(kept.submission.sha, "ward@north", "public")
    site.restart_site()
    announce(site)
    assert [asked.sha for asked in site.said(UploadRequested)] == [kept.submission.sha]


def test_one_that_is_released_too_late_is_swept(again):
    """The coordinator's answer ends it."""
    site, kept = again
    deltas(site).release(kept.submission.sha, "ward@north", "public")
    late = DeltaAnswered(run="r", round=1, sha=kept.submission.sha, verdict="late", reason="over")
    site.tell(late)
    assert deltas(site).all() == []


@pytest.mark.parametrize(("action", "deed"), [("release", "rename"), ("drop", "unlink")])
def test_a_kill_in_a_decision_leaves_it_to_be_made_again(again, monkeypatch, action, deed):
    """The line is on record, the delta not sent; then it works."""
    site, kept = again

    with monkeypatch.context() as patch:
        patch.setattr(type(kept.folder), deed, die)
        with pytest.raises(InterruptedRunError):
            getattr(deltas(site), action)(kept.submission.sha, "ward@north", "why")
    assert [one.state for one in deltas(site).all()] == ["held"]
    site.site.offer_released()
    assert site.said(UploadRequested) == []
    getattr(deltas(site), action)(kept.submission.sha, "ward@north", "why")
    assert len(deltas(site).decisions()) == 2
    assert [one.state for one in deltas(site).all()] == (["ready"] if action == "release" else [])


def test_a_dropped_one_is_gone_and_stays_on_record(again):
    """The folder goes, the line stays, also behind one that a kill tore."""
    site, kept = again
    (site.folder / "workspace" / LOG_FILE).write_text('{"action":"rel')
    with pytest.raises(ConfigError, match="which fits 0"):
        deltas(site).drop("0" * 64, "ward@north", "why")
    deltas(site).drop(kept.submission.sha, "ward@north", "learnt by heart")
    assert deltas(site).all() == []
    assert not kept.folder.exists()
    (line,) = deltas(site).decisions()
    assert (line["action"], line["reason"]) == ("drop", "learnt by heart")
    site.site.offer_released()
    assert site.said(UploadRequested) == []


def test_in_report_mode_a_blocked_delta_leaves_with_its_numbers(at_site):
    """And without any, where the site sends no metrics: then the verdict alone."""
    site = at_site("overfitted", audit="report")
    announce(site)
    start(site)
    (sent,) = site.submitted
    assert (sent.audit.verdict, sent.audit.gate, sent.audit.released) == ("blocked", False, False)
    assert sent.audit.hits >= 3
    quiet = at_site("normal", audit="report")
    quiet.accept = quiet.accept.model_copy(update={"send_metrics": False})
    quiet.restart_site()
    announce(quiet)
    start(quiet)
    told = quiet.submitted[0].audit.model_dump(exclude_defaults=True)
    assert told in ({"verdict": "passed"}, {"verdict": "warned"})


def test_an_audit_changes_no_byte_of_the_delta(at_site):
    """Off and on, the same sha256."""
    shas = []
    for mode in ("off", "report"):
        site = at_site("normal", audit=mode)
        announce(site)
        start(site)
        (sent,) = site.submitted
        shas.append(sent.sha)
        assert (sent.audit is None) == (mode == "off")
    assert shas[0] == shas[1]


def test_a_kill_during_the_audit_repeats_the_audit_and_no_step(at_site, once, monkeypatch):
    """The same numbers and the same delta; all steps are found again."""
    (wanted,) = deltas(once).all()
    site = at_site("overfitted")
    announce(site)
    passed = []
    failpoints.arm(passed.append)

    with monkeypatch.context() as patch:
        patch.setattr("participant.audit.auditing.judge", die)
        with pytest.raises(InterruptedRunError):
            start(site)
    assert passed.count("training.stepped") == SITES["overfitted"][1]
    assert deltas(site).all() == []
    site.restart_site()
    announce(site)
    start(site)
    assert passed.count("training.stepped") == SITES["overfitted"][1]
    (kept,) = deltas(site).all()
    assert kept.submission.sha == wanted.submission.sha
    figures = [one.report.figures.model_copy(update={"seconds": 0.0}) for one in (kept, wanted)]
    assert figures[0] == figures[1]
    assert kept.report.findings == wanted.report.findings


def test_personal_data_that_is_reproduced_blocks_by_itself(at_site):
    """One record with an address is enough, where three without would be."""
    site = at_site("overfitted", extra=" n{0}@ward.example", hits_block=100, auc_block=1.0)
    announce(site)
    start(site)
    (kept,) = deltas(site).all()
    assert "personal_block" in kept.report.figures.crossed
    assert kept.report.figures.personal >= 1
    assert {"email"} == {kind for one in kept.report.findings for kind in one.personal}


def test_canaries_bound_epsilon_of_a_training_without_noise(at_site):
    """They are trained on, so that examples are more; most guesses hold."""
    site = at_site("overfitted", canaries=64, epsilon_block=0.5)
    announce(site)
    start(site)
    (kept,) = deltas(site).all()
    figures = kept.report.figures
    assert figures.canaries == 64
    assert figures.epsilon_lower > 0.5
    assert "epsilon_block" in figures.crossed
    assert kept.submission.examples > 16


def test_canaries_disprove_the_epsilon_that_a_delta_declares(at_site, monkeypatch):
    """Noise that is left out by mistake is found, with no limit in the site's file."""
    monkeypatch.setattr(SecretStream, "normal", lambda _, count: np.zeros(count))
    site = at_site("overfitted", canaries=64)
    site.training["local_steps"] = 150
    private = WirePrivacy(clip=100.0, noise_multiplier=20.0)
    announce(site, privacy=private, rounds=1)
    start(site, privacy=private)
    (kept,) = deltas(site).all()
    figures, declared = kept.report.figures, kept.submission.privacy.epsilon
    assert figures.limits["epsilon_block"] == declared < figures.epsilon_lower
    assert "epsilon_block" in figures.crossed
    assert kept.submission.audit is None  # no number leaves that no noise was added to


def test_a_site_tests_the_global_adapter_for_itself(at_site):
    """As a round begins with it and at the end: numbers in its own log, and no byte is another."""
    shas = []
    for wanted in (False, True):
        site = at_site("normal", audit="report", global_adapter=wanted)
        announce(site)
        first = site.draw(site.manifest)
        with capture_logs() as logs:
            start(site)
            site.start(first, number=2, training=site.training, seed=1)
            site.learner.evaluate("r", site.adapters[first], lambda _: None)
        found = [line for line in logs if line["event"] == "adapter.audited"]
        assert [line["adapter"] for line in found] == [first, "result"] * wanted
        assert all({"hits", "auc", "auc_min_k"} <= line.keys() for line in found)
        shas.append([sent.sha for sent in site.submitted])
    assert len(shas[0]) == 2
    assert shas[0] == shas[1]


def test_gradients_are_not_sent_unaudited(at_site):
    """No audit can be made of a gradient: behind the gate the run is declined, and why."""
    site = at_site("normal")
    site.accept = site.accept.model_copy(update={"gradients": True})
    site.restart_site()
    announce(site, averaging="range-finder")
    (declined,) = site.said(RunDeclined)
    assert "privacy.audit" in declined.reason


def test_a_list_of_names_that_is_missing_declines_the_run(at_site):
    """Before any training; the path stays at the site."""
    site = at_site("normal", names_file="nowhere.txt")
    announce(site)
    (declined,) = site.said(RunDeclined)
    assert "ConfigError" in declined.reason
    assert "nowhere" not in declined.reason
