"""Federations whose deltas are masked: the sum comes out, to the byte, and nothing of one site."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest

from coordinator.audit.verification import verify_run
from coordinator.history import read_history
from coordinator.round.machine import replay
from participant import handlers
from shared import topology
from shared.errors import DataError, ProtocolError, RunStuckError
from shared.methods.averaging import get_averaging
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, Input, OpenedRecord
from shared.secure_sum.quantise import quantise, step_of
from shared.stores.directory import DirectoryStore
from shared.tensors.tensor_file import TensorFile
from shared.trust.keys import IDENTITY_FILE
from tests import federations
from tests.federation.test_embedded import restarted
from tests.federation.test_feedback import watched
from tests.federation.test_signed import TRUST
from tests.numpy_learner import MANIFEST
from tests.steering import Crash, Mortal, ask

LEVELS = 127


def config(sites="abcd", rounds=3, **sections):
    """A secure run's settings; int8, so that a delta fits its levels well."""
    return federations.config(
        sites,
        rounds,
        aggregation={"secure": True, "secure_reach": 1.0, **sections.pop("aggregation", {})},
        codec={"name": "int8", "feedback": True, **sections.pop("codec", {})},
        **sections,
    )


def history(folder):
    return read_history(DirectoryStore(folder / "store"), "test")


def verified(folder):
    """What a verification of the run finds."""
    ledger = Ledger(DirectoryStore(folder / "store"), "test", "auditor", float)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return verify_run(ledger, scratch, lambda _: None)


# What comes out ----------------------------------------------------------------------------------


def test_the_adapter_moves_by_the_mean_of_the_levels(tmp_path):
    """Computed by hand from what each site trained: quantised on the public scale, and the mean."""
    made = config(rounds=1)
    sites, trained = watched(made)
    state = federations.run(made, tmp_path, sites)
    store = DirectoryStore(tmp_path / "store")
    before, after = tmp_path / "before", tmp_path / "after"
    store.spool([topology.adapter_key("test", history(tmp_path).genesis.adapter_sha)], before)
    store.spool([topology.adapter_key("test", state.adapter_sha)], after)
    step = step_of(1.0, LEVELS)
    with TensorFile(before) as old, TensorFile(after) as new:
        for spec in MANIFEST.tensors:
            deltas = [trained[site, 1, spec.name].astype(np.float32) for site in "abcd"]
            room = np.empty(spec.elements, np.float32)
            flat = [quantise(delta.reshape(-1), step, LEVELS, room) for delta in deltas]
            total = np.sum(flat, axis=0, dtype=np.int64).reshape(spec.shape)
            mean = (total * (float(step) / 4)).astype(np.float32)
            moved = (old.read(spec.name).astype(np.float64) + mean).astype(np.float32)
            assert np.array_equal(new.read(spec.name), moved)
            assert np.abs(mean - np.mean(deltas, axis=0)).max() <= step


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"aggregation": {"averaging": "ffa"}},
        {"aggregation": {"averaging": "rolora"}},
        {"lora": {"kind": "core"}},
        {"codec": {"name": "int4", "down": "int4", "packed": True}},
        {"server": {"optimizer": "fedavgm", "learning_rate": 0.5}},
        {"selection": {"method": "random", "fraction": 0.75}},
    ],
)
def test_a_secure_run_ends_and_verifies(tmp_path, sections):
    """With every mode that sums values: each round is recomputed from what is on record."""
    made = config(rounds=4, **sections)
    state = federations.run(made, tmp_path)
    found = verified(tmp_path)
    assert (state.last_round, found.recomputed, found.findings) == (4, 4, [])
    closed = history(tmp_path).round(4).closed
    assert {*closed.delta_norms} == {"all"}  # no figure of one site is on record
    specs = get_averaging(made.aggregation.averaging).trained_in(
        history(tmp_path).genesis.manifest, 4
    )
    assert len(history(tmp_path).round(4).opened.secure.reaches) == len(specs.tensors)


def test_masks_are_drawn_anew_and_the_sum_is_the_same(tmp_path):
    """Two runs of one config: other vectors at the store, other seeds, the same adapter."""
    first = federations.run(config(), tmp_path / "one")
    second = federations.run(config(), tmp_path / "two")
    assert first.adapter_sha == second.adapter_sha
    shas = [
        {record.sha for record in history(tmp_path / name).accepted.values()}
        for name in ("one", "two")
    ]
    assert len(shas[0]) == len(shas[1]) == 12
    assert not shas[0] & shas[1]


def test_what_is_cut_off_travels_later(tmp_path):
    """With a reach far too small in round 1 the scale follows, and nothing is lost for good."""
    made = config(rounds=12, aggregation={"secure": True, "secure_reach": 1e-3})
    federations.run(made, tmp_path / "small")
    federations.run(config(rounds=12), tmp_path / "right")
    losses = [
        history(tmp_path / name).round(12).closed.source_held_out.nll for name in ("small", "right")
    ]
    first = history(tmp_path / "small").round(1).closed.source_held_out.nll
    assert losses[1] < first / 2
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    reaches = [history(tmp_path / "small").round(n).closed.reaches[0] for n in (1, 2, 12)]
    assert 1e-3 < reaches[0] < reaches[1]


# Sites that go away ------------------------------------------------------------------------------


@pytest.mark.slow
def test_dying_at_any_write_ends_in_the_same_adapter(tmp_path):
    """Before or after any record or object: masks and answers come out of it with one sum."""
    for folder in restarted(config("abc", 2), tmp_path):
        assert verified(folder).findings == []


@pytest.mark.slow
def test_dying_at_any_write_of_a_signed_run_ends_in_the_same_adapter(tmp_path):
    """Signatures of a set are on no record: sites are asked again, and sign the same."""
    for folder in restarted(config("abc", 1, trust=TRUST), tmp_path):
        assert verified(folder).findings == []


def test_sites_with_keys_sign_the_set_before_they_reveal_anything(tmp_path, monkeypatch):
    """Everybody's signature is there by then; what each said is on record as it signed it."""
    asked = []
    answer = handlers.answer_once

    def answer_once(site, task):
        asked.append((site.name, {*task.signatures}))
        return answer(site, task)

    monkeypatch.setattr(handlers, "answer_once", answer_once)
    wanted = federations.run(config(rounds=1), tmp_path / "unsigned").adapter_sha
    assert {signers == set() for _, signers in asked} == {True}
    asked.clear()
    state = federations.run(config(rounds=1, trust=TRUST), tmp_path / "signed")
    assert state.adapter_sha == wanted
    assert asked
    assert all(len(signers) >= 3 for _, signers in asked)
    assert verified(tmp_path / "signed").findings == []
    altered(
        tmp_path / "signed",
        "runs/test/rounds/00001/unmasked/a.json",
        lambda r: r["revealed"]["shares"].update(b="00" * 32),
    )
    problems = [finding.problem for finding in verified(tmp_path / "signed").findings]
    assert any("revealed: a signed" in problem for problem in problems)


def silence(monkeypatch, *sites):
    """Have these sites never answer."""
    answer = handlers.answer_once

    def answer_once(site, task):
        if site.name in sites:
            raise ProtocolError("gone")
        return answer(site, task)

    monkeypatch.setattr(handlers, "answer_once", answer_once)


def test_neighbours_answer_for_a_survivor_that_went_away(tmp_path, monkeypatch):
    """The sum is the one that it would have been, and the run goes on without its word."""
    wanted = federations.run(config(), tmp_path / "whole").adapter_sha
    silence(monkeypatch, "b")
    assert federations.run(config(), tmp_path / "silent").adapter_sha == wanted
    assert {*history(tmp_path / "silent").round(1).unmasked} == {"a", "c"}
    assert verified(tmp_path / "silent").findings == []


def test_a_sum_that_too_few_answer_for_waits_for_them(tmp_path, monkeypatch):
    """Of four, one is too few to stand in for the others; once another is back, it resumes."""
    wanted = federations.run(config(), tmp_path / "whole").adapter_sha
    with monkeypatch.context() as patched:
        silence(patched, "b", "c", "d")
        with pytest.raises(RunStuckError, match=r"round 1 waits for b .*; c .*; d "):
            federations.run(config(), tmp_path / "silent")
    silence(monkeypatch, "b", "c")
    assert federations.run(config(), tmp_path / "silent").adapter_sha == wanted


def fails(task):
    raise DataError("no text")


def test_a_site_that_sent_nothing_is_taken_out_of_the_sum(tmp_path):
    """Its neighbours reveal what they share with it, and the rest adds up."""
    made = config("abcd", 2, policy={"on_failure": "exclude", "max_attempts": 1})
    sites = federations.learners(made)
    sites["d"].fault = fails
    federations.run(made, tmp_path, sites)
    round_1 = history(tmp_path).round(1)
    assert [item.site for item in round_1.closing.inputs] == ["a", "b", "c"]
    assert {*round_1.opened.secure.roster} == {*"abcd"}
    for record in round_1.unmasked.values():
        assert {*record.revealed.keys} == {"d"}
    assert verified(tmp_path).findings == []


def test_a_round_of_too_few_sites_is_not_summed(tmp_path):
    """Two of five sent nothing: nobody is asked to reveal anything."""
    made = config("abcde", 1, policy={"on_failure": "exclude", "max_attempts": 1})
    sites = federations.learners(made)
    sites["d"].fault = sites["e"].fault = fails
    with pytest.raises(RunStuckError, match="expected 4 masked deltas of 5 or more, got 3"):
        federations.run(made, tmp_path, sites)
    assert history(tmp_path).round(1).closing is None
    assert history(tmp_path).round(1).unmasked == {}


def lost(tmp_path):
    """Two of five never send anything: nobody is asked to reveal, and the operator gives up."""
    made = config("abcde", 2)
    sites = federations.learners(made)
    sites["d"].fault = sites["e"].fault = fails
    with pytest.raises(RunStuckError, match="no text"):
        federations.run(made, tmp_path, sites)
    ask(tmp_path, "exclude", "its disk is gone", site="d")
    return made


def test_a_round_is_attempted_again_without_the_sites_that_were_taken_out(tmp_path):
    """Of five the operator takes out two: three mask again, with fresh keys, and the sum is theirs.

    After the first is taken out four are still waited for, as many as a sum of five needs.
    """
    made = lost(tmp_path)
    again = federations.learners(made)
    again["e"].fault = fails
    with pytest.raises(RunStuckError, match="no text"):
        federations.run(made, tmp_path, again)
    assert [record.number for record in history(tmp_path).round(1).attempts] == [1]
    first = {record.sha for record in history(tmp_path).round(1).accepted.values()}
    ask(tmp_path, "exclude", "so is its disk", site="e")
    assert federations.run(made, tmp_path).last_round == 2
    round_1 = history(tmp_path).round(1)
    assert [record.number for record in round_1.attempts] == [1, 2]
    assert {*round_1.opened.secure.roster} == {*"abc"}
    assert [item.site for item in round_1.closing.inputs] == ["a", "b", "c"]
    assert {record.sha for record in round_1.accepted.values()}.isdisjoint(first)
    assert first == {record.sha for record in round_1.earlier if isinstance(record, AcceptedRecord)}
    assert [r.number for r in history(tmp_path).round(2).attempts] == [1]
    assert verified(tmp_path).findings == []
    altered(
        tmp_path,
        "runs/test/rounds/00001/opened.json",
        lambda r: [r["secure"]["roster"].pop(site) for site in "de"],
    )
    problems = [finding.problem for finding in verified(tmp_path).findings]
    assert any("attempt 2: expected none" in problem for problem in problems)


@pytest.mark.slow
def test_dying_at_any_write_of_a_further_attempt_ends_in_the_same_adapter(tmp_path):
    """Before or after each: the second attempt is opened once, and its sum is that of three."""
    made = lost(tmp_path / "begun")
    ask(tmp_path / "begun", "exclude", "so is its disk", site="e")
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    wanted = federations.run(made, tmp_path / "whole").adapter_sha
    at, fired = 0, True
    while fired:
        at += 1
        for after in (False, True):
            folder = tmp_path / f"{at}-{after}"
            shutil.copytree(tmp_path / "begun", folder)
            store = Mortal(folder / "store", at, after=after)
            with contextlib.suppress(Crash):
                federations.run(made, folder, store=store)
            fired = store.fired
            assert federations.run(made, folder).adapter_sha == wanted
            assert [r.number for r in history(folder).round(1).attempts] == [1, 2]
            assert verified(folder).findings == []
            shutil.rmtree(folder)
    assert at > 20


def test_a_decision_on_an_attempt_that_was_given_up_counts_for_nothing(tmp_path):
    """A coordinator that was replaced may record one just before; nobody was told of it."""
    made = lost(tmp_path)
    ask(tmp_path, "exclude", "so is its disk", site="e")
    federations.run(made, tmp_path)
    ledger = Ledger(DirectoryStore(tmp_path / "store"), "test", "reader", float)
    records = list(ledger.history())
    first = {
        r.site: r.sha
        for r in records
        if isinstance(r, AcceptedRecord) and (r.round, r.number) == (1, 1)
    }
    assert {*first} == {*"abc"}
    orphan = (
        history(tmp_path)
        .round(1)
        .closing.model_copy(
            update={
                "number": 1,
                "inputs": tuple(
                    Input(site=site, from_round=1, sha=sha, weight=1 / 4, scale=1.0)
                    for site, sha in {**first, "d": "d" * 64}.items()
                ),
            }
        )
    )
    at = next(n for n, r in enumerate(records) if isinstance(r, OpenedRecord) and r.number == 2)
    with_it = [*records[:at], orphan, *records[at:]]
    assert replay(made, with_it) == replay(made, records)


# A site that lost its key ------------------------------------------------------------------------


def burnt(tmp_path, **sections):
    """Site b fails in round 2 and loses all that it has but the key that it signs with."""
    made = config("abcd", 3, **sections)
    sites = federations.learners(made)
    sites["b"].fault = lambda task: fails(task) if task.round == 2 else None
    with pytest.raises(RunStuckError, match="no text"):
        federations.run(made, tmp_path, sites)
    folder = tmp_path / "sites" / "b"
    for path in folder.iterdir():
        if path.name != IDENTITY_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return made


def test_a_site_that_lost_its_key_comes_back_with_one_that_it_signed(tmp_path):
    """Round 2, which waits for it, is attempted again with its new key; round 3 goes on with it."""
    made = burnt(tmp_path, trust=TRUST)
    assert federations.run(made, tmp_path).last_round == 3
    there = history(tmp_path)
    keys = [record.secure.roster["b"].key for n in (1, 2, 3) for record in there.round(n).attempts]
    assert [record.number for record in there.round(2).attempts] == [1, 2]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert [i.site for i in there.round(2).closing.inputs] == ["a", "b", "c", "d"]
    assert verified(tmp_path).findings == []


def test_a_site_that_lost_its_key_and_signs_nothing_needs_another_run(tmp_path):
    """Nobody could tell it from one that the coordinator put in its place."""
    made = burnt(tmp_path)
    with pytest.raises(RunStuckError, match="round 2 waits for b"):
        federations.run(made, tmp_path)
    there = history(tmp_path).round(2)
    assert [record.number for record in there.attempts] == [1]
    assert "needs another run" in there.failed[-1].reason


# What is on record -------------------------------------------------------------------------------


def altered(folder, key, change):
    path = folder / "store" / key
    text = json.loads(path.read_text())
    change(text)
    path.chmod(0o644)
    path.write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("unmasked/a", lambda r: r["revealed"].update(own="0" * 64), "answer of a: expected the"),
        ("accepted/b", lambda r: r["masked"].update(own="0" * 64), "answer of b: expected the"),
        (
            "accepted/b",
            lambda r: r["masked"]["pairs"].update(a="0" * 64),
            "masks of a and b: expected one pair key",
        ),
        ("opened", lambda r: r["secure"].update(levels=126), "secure: is not what"),
        ("closed", lambda r: r["reaches"].__setitem__(0, 0.5), "reaches: expected"),
    ],
)
def test_an_altered_record_is_found(tmp_path, name, change, says):
    """Seeds, commitments, terms and reaches all have their place in the recomputation."""
    federations.run(config(rounds=1), tmp_path)
    altered(tmp_path, f"runs/test/rounds/00001/{name}.json", change)
    assert any(says in finding.problem for finding in verified(tmp_path).findings)


def test_answers_that_are_missing_are_found(tmp_path):
    """Two of four answers open a sum, and no more are on record; one does not."""
    federations.run(config(rounds=1), tmp_path)
    folder = tmp_path / "store/runs/test/rounds/00001/unmasked"
    assert {path.name for path in folder.iterdir()} == {"a.json", "b.json"}
    (folder / "a.json").unlink()
    problems = [finding.problem for finding in verified(tmp_path).findings]
    assert any("expected the answers of a, c, d" in problem for problem in problems)


def test_an_answer_that_nobody_asked_for_is_found(tmp_path):
    """A site that is in no decision revealed nothing: somebody wrote that."""
    federations.run(config(rounds=1), tmp_path)
    folder = tmp_path / "store/runs/test/rounds/00001/unmasked"
    made = json.loads((folder / "a.json").read_text()) | {"site": "zoe"}
    (folder / "zoe.json").write_text(json.dumps(made))
    problems = [finding.problem for finding in verified(tmp_path).findings]
    assert any("reveals what no decision" in problem for problem in problems)
