"""A whole run in which sites audit their deltas: on record, shown, kept, released."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from typer.testing import CliRunner

from coordinator.history import read_history
from coordinator.runs.model_card import model_card
from gradualdiff.cli.main import app
from participant.audit.report import AuditReport, Finding
from participant.audit.verdict import judge
from participant.held import LOG_FILE, AuditedDeltas
from shared import topology
from shared.config import LoraSection, SitePrivacySection
from shared.errors import ConfigError, RunStuckError
from shared.protocol.manifest import AuditFigures
from shared.protocol.records import AcceptedRecord, FailedRecord
from tests import federations
from tests.numpy_learner import NumpyLearner
from tests.steering import records, store_of, verify

GATE = SitePrivacySection(audit="gate")
SECRET = "the lamp is on the river bank"
SITE = '[site]\nname = "b"\nworkspace = "sites/b"\n[data]\npath = "none"\ntext = "body"\n'


@dataclass
class Audited(NumpyLearner):
    """A learner whose audits find so many hits, by round."""

    hits: tuple[int, ...] = ()

    def learn(self, task, *arguments):
        learned = super().learn(task, *arguments)
        hits = dict(enumerate(self.hits, start=1)).get(task.round, 0)
        figures = AuditFigures(verdict="passed", records=256, hits=hits, hits_upper=0.012, auc=0.51)
        findings = tuple(Finding(index=index, text=SECRET) for index in range(hits))
        return replace(learned, audit=AuditReport(figures=judge(figures, GATE), findings=findings))


def sites(config, hits):
    made = federations.learners(config)
    made["b"] = Audited("b", hits=hits)
    return made


def cli(*arguments):
    done = CliRunner().invoke(app, [str(word) for word in arguments], terminal_width=200)
    assert done.exit_code == 0, done.output
    return done.output


def everything(folder):
    """Every byte that the store holds."""
    return b"".join(path.read_bytes() for path in (folder / "store").rglob("*") if path.is_file())


def test_the_numbers_of_an_audit_are_on_record_and_shown(tmp_path):
    """Record, table, JSON and card have them; a site without an audit has none; it verifies."""
    config = federations.config(rounds=2)
    federations.run(config, tmp_path, sites(config, (0, 1)))
    assert verify(tmp_path).findings == []
    found = {(one.site, one.round): one.audit for one in records(tmp_path, AcceptedRecord)}
    assert found["a", 1] is None
    assert (found["b", 1].verdict, found["b", 2].verdict) == ("passed", "warned")
    store = tmp_path / "store"
    assert b'"audit"' not in store_of(tmp_path).get(topology.accepted_key("test", 1, "a"))
    shown = cli("rounds", "show", "test", "2", "--store", store)
    assert "b: audit warned; crossed hits_warn; reproduced 1 of 256 records (at most 1.2%)" in shown
    told = json.loads(cli("rounds", "show", "test", "2", "--store", store, "--json"))
    rows = {row["site"]: row["audit"] for row in told["sites"]}
    assert rows["a"] is None
    assert (rows["b"]["hits"], rows["b"]["auc"]) == (1, 0.51)
    history = read_history(store_of(tmp_path), "test")
    card = model_card(history, 2, "0" * 64, LoraSection(), "m")
    assert "Sites audited 2 of 6 counted deltas" in card
    assert "- Records reproduced: 1 of 512 tried; with personal data: 0" in card
    first = model_card(history, 1, "0" * 64, LoraSection(), "m")
    assert "- Records reproduced: 0 of 256 tried" in first
    assert SECRET.encode() not in everything(tmp_path)


def test_a_run_without_audits_has_a_card_without_them(tmp_path):
    """Nothing is said of what was not done."""
    federations.run(federations.config(rounds=1), tmp_path)
    history = read_history(store_of(tmp_path), "test")
    assert "Memorisation" not in model_card(history, 1, "0" * 64, LoraSection(), "m")


QUORUM = {"kind": "quorum", "quorum": 2, "deadline_seconds": 0.05}


def test_a_round_does_not_wait_for_a_kept_delta(tmp_path):
    """The others' round closes, the reason is on record, and the next round has the site again."""
    config = federations.config(rounds=2, policy=QUORUM)
    state = federations.run(config, tmp_path, sites(config, (3, 0)))
    assert state.last_round == 2
    (failed,) = records(tmp_path, FailedRecord)
    assert (failed.site, failed.round, failed.retryable) == ("b", 1, False)
    assert "privacy.audit" in failed.reason
    sent = {(one.site, one.round) for one in records(tmp_path, AcceptedRecord)}
    assert ("b", 1) not in sent
    assert ("b", 2) in sent
    assert SECRET.encode() not in everything(tmp_path)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_what_is_released_after_its_round_is_refused_by_name(tmp_path, secure):
    """Nobody would count it, and masks fit no other round: it can be dropped, and is never sent."""
    sections = {"aggregation": {"secure": True}, "codec": {"name": "int8"}} if secure else {}
    config = federations.config("abcd", rounds=2, policy={**QUORUM, "quorum": 3}, **sections)
    state = federations.run(config, tmp_path, sites(config, (3, 0)))
    assert state.last_round == 2
    (tmp_path / "site.toml").write_text(SITE)
    site = ("--site", str(tmp_path / "site.toml"))
    (row, _) = json.loads(cli("site", "audit", "list", *site, "--json"))
    assert (row["state"], row["round"]) == ("over", 1)
    assert "its round is over" in cli("site", "audit", "show", row["sha"], *site)
    words = ("site", "audit", "release", row["sha"], "--reason", "public text", *site)
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, ConfigError)
    assert "of round 1, which is over; drop it" in str(refused.exception)
    assert not (tmp_path / "sites" / "b" / LOG_FILE).exists()
    cli("site", "audit", "drop", row["sha"], "--reason", "too late", *site)
    sent = {(one.site, one.round) for one in records(tmp_path, AcceptedRecord)}
    assert sent == {(name, number) for name in "abcd" for number in (1, 2)} - {("b", 1)}
    assert verify(tmp_path).findings == []


def test_a_masked_delta_that_is_released_in_time_is_added_up(tmp_path):
    """It was masked before it was kept: what a person lets go is those bytes, once."""
    config = federations.config(
        "abcd", rounds=2, aggregation={"secure": True}, codec={"name": "int8"}
    )
    wanted = federations.run(config, tmp_path / "undisturbed").adapter_sha
    folder = tmp_path / "gate"
    with pytest.raises(RunStuckError, match=r"b \(privacy\.audit: this site's gate keeps"):
        federations.run(config, folder, sites(config, (3, 0)))
    deltas = AuditedDeltas(folder / "sites" / "b", lambda: 1000.0)
    (kept,) = deltas.all()
    assert (kept.state, kept.submission.masked is None) == ("held", False)
    deltas.release(kept.submission.sha, "ward@north", "public text")
    again = sites(config, (3, 0))
    assert federations.run(config, folder, again).adapter_sha == wanted
    assert again["b"].trained == [2]
    counted = {one.round: one for one in records(folder, AcceptedRecord) if one.site == "b"}
    assert (counted[1].sha, counted[1].audit.released) == (kept.submission.sha, True)
    assert verify(folder).findings == []


@pytest.fixture
def stuck(tmp_path):
    """A run of all sites that waits for one, whose gate keeps its delta."""
    config = federations.config(rounds=2)
    with pytest.raises(RunStuckError, match=r"b \(privacy\.audit: this site's gate keeps"):
        federations.run(config, tmp_path, sites(config, (3, 0)))
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path, config


def test_a_release_lets_the_waiting_round_close(stuck):
    """By the command line; without another training; the record says that a person did it."""
    folder, config = stuck
    site = ("--site", folder / "site.toml")
    (row,) = json.loads(cli("site", "audit", "list", *site, "--json"))
    assert (row["state"], row["round"], row["figures"]["hits"]) == ("held", 1, 3)
    assert "hits_block" in cli("site", "audit", "list", *site)
    shown = cli("site", "audit", "show", row["sha"][:10], *site)
    assert "training record 2" in shown
    assert SECRET not in shown
    assert SECRET in cli("site", "audit", "show", row["sha"][:10], "--text", *site)
    told = cli("site", "audit", "release", row["sha"][:10], "--reason", "public text", *site)
    assert "the participant sends it" in told
    again = sites(config, (3, 0))
    assert federations.run(config, folder, again).last_round == 2
    assert again["b"].trained == [2]
    assert verify(folder).findings == []
    audits = {one.round: one.audit for one in records(folder, AcceptedRecord) if one.site == "b"}
    assert (audits[1].verdict, audits[1].released, audits[2].released) == ("blocked", True, False)
    assert "released by the site's operator" in cli(
        "rounds", "show", "test", "1", "--store", folder / "store"
    )
    line = json.loads((folder / "sites" / "b" / LOG_FILE).read_text())
    assert (line["action"], line["reason"], "@" in line["by"]) == ("release", "public text", True)


def test_a_dropped_one_is_gone(stuck):
    """And a decision needs a reason, and one delta."""
    folder, _ = stuck
    site = ("--site", str(folder / "site.toml"))
    (row,) = json.loads(cli("site", "audit", "list", *site, "--json"))
    for words in (("drop", row["sha"], "--reason", " "), ("drop", "zz", "--reason", "why")):
        assert CliRunner().invoke(app, ["site", "audit", *words, *site]).exit_code != 0
    cli("site", "audit", "drop", row["sha"], "--reason", "learnt by heart", *site)
    assert json.loads(cli("site", "audit", "list", *site, "--json")) == []
    shown = CliRunner().invoke(app, ["site", "audit", "show", row["sha"], *site])
    assert shown.exit_code != 0
