"""One of five sites is bad: what it can do under each defence, what the record says of it."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.history import read_history
from coordinator.runs.export import export_adapter
from coordinator.runs.following import look
from coordinator.runs.inspection import show_round, summarise_round
from coordinator.runs.newest_round import Follower
from gradualdiff.cli.main import app
from shared import topology
from shared.config import canonical_json
from shared.errors import ModelError, RunStuckError
from shared.protocol.records import AcceptedRecord, ClosedRecord, ClosingRecord, RefusedRecord
from shared.seeds import derive_seed
from shared.tensors.tensor_file import TensorFile
from tests import federations
from tests.numpy_learner import MANIFEST
from tests.steering import Crash, Mortal, ask, forget, records, store_of, verify

SITES = ("a", "b", "c", "d", "e")
RULES = ("median", "trimmed-mean", "multi-krum")
ROUNDS = 3


def noise(spec, delta):
    """100 times as large as what it trained, in a random direction."""
    draw = np.random.Generator(np.random.Philox(derive_seed(1, spec.name)))
    values = draw.standard_normal(delta.shape, dtype=np.float32)
    return values * np.float32(100 * np.linalg.norm(delta) / np.linalg.norm(values))


def flipped(spec, delta):
    return -delta


def constant(spec, delta):
    return np.full_like(delta, 5.0)


ATTACKS = {"noise": noise, "flipped": flipped, "constant": constant}


def config(**sections):
    """Five sites; without clipping unless a test says otherwise."""
    aggregation = {"clip_to_median": "off", **sections.pop("aggregation", {})}
    return federations.config(SITES, ROUNDS, aggregation=aggregation, **sections)


def sites_with(config, bad="c", attack=None):
    """Learners that all pull the same way, nearly; ``bad`` rewrites its delta."""
    sites = federations.learners(config)
    for number, site in enumerate(sites.values()):
        pull = np.float32(0.5 + number / 100)
        shift = np.float32(derive_seed("target", site.site) % 1000 / 1000 * 0.5)

        def gentle(task, pull=pull, shift=shift):
            return lambda spec, delta: delta - shift + pull

        site.fault = gentle
    if attack is not None:
        honest = sites[bad].fault
        sites[bad].fault = lambda task: (
            lambda spec, delta: ATTACKS[attack](spec, honest(task)(spec, delta))
        )
    return sites


def adapter(folder, state):
    """The final adapter as one flat array."""
    path = folder / "look"
    store_of(folder).fetch_file(topology.adapter_key("test", state.adapter_sha), path)
    with TensorFile(path) as file:
        return np.concatenate([file.read(s.name).reshape(-1) for s in MANIFEST.tensors])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The final adapter without a bad site and without a defence."""
    folder = tmp_path_factory.mktemp("clean")
    settings = config()
    return adapter(folder, federations.run(settings, folder, sites_with(settings)))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_run_near_the_clean_one(tmp_path, clean, rule, attack):
    """Undefended the adapter is far off; with the rule it is near, and the whole chain verifies."""
    far = adapter(tmp_path / "off", _attacked(tmp_path / "off", attack, rule="mean"))
    near = adapter(tmp_path / "on", _attacked(tmp_path / "on", attack, rule=rule))
    assert np.linalg.norm(near - clean) < 0.1 * np.linalg.norm(far - clean)
    for folder in (tmp_path / "off", tmp_path / "on"):
        found = verify(folder)
        assert (found.findings, found.rounds, found.recomputed) == ([], ROUNDS, ROUNDS)


def _attacked(folder, attack, **aggregation):
    settings = config(aggregation=aggregation)
    return federations.run(settings, folder, sites_with(settings, attack=attack))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("mean", "plus the weighted mean of the participants' deltas."),
        ("trimmed-mean", "plus the trimmed mean of the participants' deltas."),
        ("median", "plus the median of the participants' deltas, value by value."),
        ("multi-krum", "plus the mean of those participants' deltas that multi-Krum takes."),
    ],
)
def test_the_model_card_says_what_was_added(tmp_path, rule, says):
    _attacked(tmp_path, "noise", rule=rule)
    history = read_history(store_of(tmp_path), "test")
    exported = export_adapter(history, store_of(tmp_path), tmp_path / "out", None)
    assert says in (exported.path / "README.md").read_text()


@pytest.mark.parametrize("attack", ["noise", "constant", "flipped"])
def test_multi_krum_names_the_bad_site_on_record_and_on_screen(tmp_path, attack):
    """closed.json, rounds show and its JSON say who was left out and why, in every round."""
    _attacked(tmp_path, attack, rule="multi-krum")
    for closed in records(tmp_path, ClosedRecord):
        assert list(closed.left_out) == ["c"]
        assert "multi-krum: its score" in closed.left_out["c"]
    closed = records(tmp_path, ClosedRecord)[0]
    if attack == "flipped":
        assert closed.cosines["c"] < -0.9  # with what was really added
    history = read_history(store_of(tmp_path), "test")
    rows = {row.site: row for row in show_round(history, 1)}
    assert (rows["c"].state, rows["c"].reason) == ("left out", closed.left_out["c"])
    assert {rows[site].state for site in "abde"} == {"counted"}
    shown = _shown(tmp_path, "1")
    assert f"c: {closed.left_out['c']}" in shown
    told = json.loads(_shown(tmp_path, "1", "--json"))
    assert told["round"]["left_out"] == closed.left_out
    assert [site["state"] for site in told["sites"]] == [rows[site].state for site in SITES]
    followed = {site.site: site for site in _followed(tmp_path).sites}
    assert (followed["c"].state, followed["c"].reason) == ("left out", closed.left_out["c"])
    assert followed["a"].state == "counted"


def test_the_mean_of_multi_krum_is_of_the_others(tmp_path):
    """The recorded norm is that of the four good deltas' mean, recomputed here from their files."""
    _attacked(tmp_path, "noise", rule="multi-krum")
    closing, closed = records(tmp_path, ClosingRecord)[0], records(tmp_path, ClosedRecord)[0]
    good = [_delta(tmp_path, item) for item in closing.inputs if item.site != "c"]
    assert len(good) == 4
    norm = np.linalg.norm(np.mean(good, axis=0))
    assert closed.mean_norm == pytest.approx(norm, rel=1e-6)


def _delta(folder, item):
    path = folder / "delta"
    key = topology.delta_key("test", item.from_round, item.site, item.sha)
    store_of(folder).fetch_file(key, path)
    with TensorFile(path) as file:
        return np.concatenate(
            [file.read(s.name).reshape(-1).astype(np.float64) for s in MANIFEST.tensors]
        )


def test_by_default_a_large_delta_is_clipped_to_three_medians(tmp_path, clean):
    """The scale stands in closing.json, only for the bad site; rounds show says it."""
    far = adapter(tmp_path / "off", _attacked(tmp_path / "off", "noise"))
    folder = tmp_path / "on"
    settings = federations.config(SITES, ROUNDS)
    near = adapter(folder, federations.run(settings, folder, sites_with(settings, attack="noise")))
    assert np.linalg.norm(near - clean) < 0.1 * np.linalg.norm(far - clean)
    for closing in records(folder, ClosingRecord):
        accepted = [r for r in records(folder, AcceptedRecord) if r.round == closing.round]
        norms = {r.site: r.norm for r in accepted}
        scales = {item.site: item.scale for item in closing.inputs}
        bound = 3 * statistics.median(norms.values())
        assert math.isclose(scales.pop("c") * norms["c"], bound, rel_tol=1e-12)
        assert set(scales.values()) == {1.0}
    assert verify(folder).findings == []
    summary = summarise_round(read_history(store_of(folder), "test"), 1)
    assert list(summary.clipped) == ["c"]
    scale = summary.clipped["c"]
    assert f"c: clipped, its delta was multiplied by {scale:.3g}" in _shown(folder, "1")
    told = json.loads(_shown(folder, "1", "--json"))
    assert told["round"]["clipped"] == {"c": scale}
    assert {site["site"]: site["scale"] for site in told["sites"]}["c"] == scale


def _followed(folder):
    """Round 1 as rounds show --follow sees it."""
    return look(Follower(store_of(folder), "test").look(1), None, 0.0)


def _shown(folder, *arguments):
    command = ["rounds", "show", "test", *arguments, "--store", str(folder / "store")]
    answer = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert answer.exit_code == 0, answer.output
    return answer.stdout


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_a_restart_at_any_write_ends_in_the_same_adapter(tmp_path, rule):
    """Die before and after each write of a round with a bad site: one digest, nothing found."""
    settings = federations.config(SITES, 1, aggregation={"rule": rule})

    def run(folder, store=None):
        sites = sites_with(settings, attack="noise")
        return federations.run(settings, folder, sites, store=store).adapter_sha

    wanted = run(tmp_path / "whole")
    fired = 0
    for at in range(6, 200, 4):  # every fourth write, before and after it by turns
        folder = tmp_path / str(at)
        store = Mortal(folder / "store", at, after=bool(at % 2))
        try:
            sha = run(folder, store)
        except Crash:
            sha = run(folder)
        assert store.fired == (store.left <= 0)
        fired += store.fired
        assert sha == wanted
        if not store.fired:
            break
        assert verify(folder).findings == []
    assert fired >= 5


def test_a_decision_without_a_result_is_carried_out_with_its_scales(tmp_path):
    """Killed between closing.json and closed.json: the decision on record is what is added up."""
    settings = federations.config(SITES, 2)
    sites = sites_with(settings, attack="noise")
    wanted = federations.run(settings, tmp_path, sites).adapter_sha
    store = store_of(tmp_path)
    forget(store, topology.finished_key("test"), topology.round_key("test", 2, "closed"))
    assert federations.run(settings, tmp_path, sites).adapter_sha == wanted
    assert verify(tmp_path).findings == []


# Manipulated records ---------------------------------------------------------------------------


def _alter(folder, kind, change):
    """Rewrite a record of round 1."""
    key = topology.round_key("test", 1, kind)
    values = json.loads(store_of(folder).get(key))
    change(values)
    store_of(folder).put(key, canonical_json(values))
    return key


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_verify_names_a_manipulated_scale(tmp_path, value):
    """Whoever lets the bad site pull further than the rule says is found, by site."""
    settings = federations.config(SITES, ROUNDS)
    federations.run(settings, tmp_path, sites_with(settings, attack="noise"))

    def change(values):
        (item,) = [item for item in values["inputs"] if item["site"] == "c"]
        assert item["scale"] != value
        item["scale"] = value

    key = _alter(tmp_path, "closing", change)
    (found,) = verify(tmp_path).findings
    assert (found.round, found.key) == (1, key)
    assert found.problem.startswith("scale of c: expected 0.0")
    assert found.problem.endswith(f"got {value}")


def test_verify_names_a_scale_where_none_is_due(tmp_path):
    """A good site's vote is not made smaller."""
    settings = config()
    federations.run(settings, tmp_path, sites_with(settings))
    _alter(tmp_path, "closing", lambda values: values["inputs"][0].update(scale=0.5))
    (found,) = verify(tmp_path).findings
    assert found.problem == "scale of a: expected 1.0, got 0.5"


@pytest.mark.parametrize("left_out", [{}, {"a": "it was bad"}])
def test_verify_names_a_manipulated_verdict(tmp_path, left_out):
    """Who was left out is recomputed with the reason."""
    _attacked(tmp_path, "noise", rule="multi-krum")
    key = _alter(tmp_path, "closed", lambda values: values.update(left_out=left_out))
    (found,) = verify(tmp_path).findings
    assert (found.round, found.key) == (1, key)
    assert found.problem.startswith("left_out: expected {'c': 'multi-krum")


def test_verify_names_a_decision_with_fewer_deltas_than_the_rule_needs(tmp_path):
    """A round that was closed all the same cannot be recomputed under its own settings."""
    _attacked(tmp_path, "noise", rule="multi-krum")

    def change(values):
        values["inputs"] = [{**i, "weight": 0.25} for i in values["inputs"] if i["site"] != "c"]
        values["excluded"] = {"c": "it was bad"}

    _alter(tmp_path, "closing", change)
    problems = [finding.problem for finding in verify(tmp_path).findings]
    assert any("needs 5 deltas, got 4" in problem for problem in problems), problems


# Too few deltas ----------------------------------------------------------------------------------


def test_a_round_with_too_few_deltas_waits_and_says_why(tmp_path):
    """A site that is given up would be excluded; the rule needs it, so the round stays open."""
    settings = config(
        aggregation={"rule": "multi-krum"}, policy={"on_failure": "exclude", "max_attempts": 1}
    )
    sites = sites_with(settings, attack="noise")
    whole = federations.run(settings, tmp_path / "whole", sites_with(settings, attack="noise"))

    def fail(task):
        raise ModelError("no memory left")

    sites["e"].fault = fail
    folder = tmp_path / "waits"
    says = (
        r'waits for e \(.*no memory left.*\); aggregation.rule = "multi-krum" and assumed_bad = 1'
    )
    with pytest.raises(RunStuckError, match=says + " needs 5 deltas, got 4"):
        federations.run(settings, folder, sites)
    assert records(folder, ClosingRecord) == []
    shown = _shown(folder, "1")
    assert "the round does not close yet: aggregation.rule" in shown
    assert "needs 5 deltas, got 4" in shown
    assert (
        "needs 5 deltas, got 4" in json.loads(_shown(folder, "1", "--json"))["round"]["waits_for"]
    )
    assert _followed(folder).reason.endswith("needs 5 deltas, got 4")
    # Mended and started again, the site's delta is the fifth.
    again = federations.run(settings, folder, sites_with(settings, attack="noise"))
    assert again.adapter_sha == whole.adapter_sha
    assert verify(folder).findings == []


def test_the_mean_says_nothing_of_a_rule(tmp_path):
    """Nobody's delta is in: the message and rounds show name the site, and no rule."""
    settings = config(policy={"max_attempts": 1})
    sites = sites_with(settings)

    def fail(task):
        raise ModelError("no memory left")

    for site in sites.values():
        site.fault = fail
    with pytest.raises(RunStuckError, match=r"waits for a .*no memory left") as caught:
        federations.run(settings, tmp_path, sites)
    assert "needs" not in str(caught.value)
    assert "does not close yet" not in _shown(tmp_path, "1")


def test_sites_that_operators_took_out_leave_too_few(tmp_path):
    """The message names the rule beside the operator's word, and the way out."""
    settings = config(aggregation={"rule": "trimmed-mean", "assumed_bad": 2})
    sites = sites_with(settings)

    def take_out(task):
        if task.round == 2:
            ask(tmp_path, "exclude", "its text is wrong", site="e")

    sites["d"].fault = take_out
    with pytest.raises(RunStuckError, match=r"excluded e \(its text is wrong\).* needs 5 .*got 4"):
        federations.run(settings, tmp_path, sites)
    assert len(records(tmp_path, ClosedRecord)) == 1


def test_a_delta_of_another_bit_width_is_refused_and_the_site_counts_once_it_is_right(tmp_path):
    """In round 1 a site's program writes int8 where int4 was said; the others go on without it."""
    settings = config(codec={"name": "int4", "down": "int4"}, policy={"on_failure": "exclude"})
    sites = sites_with(settings)
    learn = sites["c"].learn

    def wider(task, *rest, **others):
        codec = "int8" if task.round == 1 else task.codec
        return learn(task.model_copy(update={"codec": codec}), *rest, **others)

    sites["c"].learn = wider
    federations.run(settings, tmp_path, sites)
    (refused,) = records(tmp_path, RefusedRecord)
    assert (refused.site, refused.round, refused.verdict) == ("c", 1, "refused")
    assert refused.reason == "header codec: expected int4, got int8"
    assert refused.reason in _shown(tmp_path, "1")
    counted = [
        [item.site for item in closing.inputs] for closing in records(tmp_path, ClosingRecord)
    ]
    assert counted == [["a", "b", "d", "e"], list(SITES), list(SITES)]
    assert verify(tmp_path).findings == []
