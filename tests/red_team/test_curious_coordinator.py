"""A coordinator that keeps to the protocol and looks at all it has; then one that asks for more."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.history import read_history
from participant import handlers
from participant.secure_round import _bind, answer_once, check_terms, sign_once
from participant.site import NOBODY_SIGNS, Trust
from participant.workspace import Workspace
from shared import topology
from shared.config import AcceptSection
from shared.errors import NotAcceptedError, ProtocolError, RunStuckError
from shared.protocol.events import RoundStarted, UnmaskRequested, WireTraining
from shared.protocol.secure import Exchange
from shared.secure_sum.exchange import ExchangeKey
from shared.secure_sum.masks import Keystream
from shared.stores.directory import DirectoryStore
from shared.tensors.masked_file import MaskedFile, in_order, masked_header, ring_of
from shared.trust.keys import SigningKey
from tests import federations
from tests.federation.test_secure import config
from tests.federation.test_signed import TRUST
from tests.numpy_learner import NumpyLearner, manifest_of

WIDE = manifest_of(2048)  # 8,224 numbers: enough to tell a distribution
CELLS = 16


def vectors(folder):
    """Each site's masked vector of round 1 as the coordinator holds it: words of the ring."""
    history = read_history(DirectoryStore(folder / "store"), "test")
    there, manifest = history.round(1), history.genesis.manifest
    ring, found = ring_of(there.opened.secure), {}
    for site, record in there.accepted.items():
        path = folder / f"vector-{site}"
        store = DirectoryStore(folder / "store")
        store.spool([topology.delta_key("test", 1, site, record.sha)], path)
        header = masked_header("test", 1, site, there.opened.source_sha)
        with MaskedFile(path, manifest, header, ring) as file:
            found[site] = np.concatenate([file.words(spec) for spec in in_order(manifest)])
    return found, ring, there


def is_uniform(words, ring):
    """Chi-square of the highest and of the lowest bits: within five standard deviations."""
    words = ring.reduce(words.copy())
    for seen in (words >> (ring.bits - 4), words & (CELLS - 1)):
        counts = np.bincount(seen, minlength=CELLS)
        expected = words.size / CELLS
        statistic = ((counts - expected) ** 2 / expected).sum()
        if abs(statistic - (CELLS - 1)) > 5 * np.sqrt(2 * (CELLS - 1)):
            return False
    return True


def sites_of(made, spoil=None):
    """Wide learners; site a's delta is what ``spoil`` makes of it."""
    sites = {name: NumpyLearner(name, manifest=WIDE) for name in made.run.participants}
    if spoil is not None:
        sites["a"].fault = lambda _task: spoil
    return sites


DELTAS = {
    "zeros": lambda _spec, delta: np.zeros_like(delta),
    "the largest": lambda _spec, delta: np.full_like(delta, 1e6),
}


@pytest.mark.parametrize("name", DELTAS)
def test_before_anybody_answers_nothing_of_one_delta_is_there(tmp_path, monkeypatch, name):
    """Two deltas that could not differ more: what is stored of either is uniform.

    So is what is left of it less all that the coordinator can compute: any of the other sites'
    vectors, and the streams of every value on record, taken for a seed.
    """

    def refuse(_site, _task):
        raise ProtocolError("nobody answers")

    monkeypatch.setattr(handlers, "answer_once", refuse)
    made = config("abcd", 1)
    with pytest.raises(RunStuckError, match="round 1 waits for a"):
        federations.run(made, tmp_path, sites_of(made, DELTAS[name]))
    found, ring, there = vectors(tmp_path)
    assert there.unmasked == {}
    mine, others = found["a"], [found[site] for site in "bcd"]
    assert is_uniform(mine, ring)
    assert is_uniform(sum(others, mine), ring)
    for other in others:
        assert is_uniform(mine + other, ring)
        assert is_uniform(mine - other, ring)
    known = [r.masked.own for r in there.accepted.values()]
    known += [sha for r in there.accepted.values() for sha in r.masked.pairs.values()]
    known += [record.sha for record in there.accepted.values()]
    for text in known:
        words = mine.copy()
        Keystream(bytes.fromhex(text)).add_to(words, minus=True)
        assert is_uniform(words, ring)


def test_the_same_test_sees_a_delta_that_is_not_masked(tmp_path):
    """Zeros without masks, and a vector with all of its masks taken away, are found at once."""
    made = config("abcd", 1)
    federations.run(made, tmp_path, sites_of(made, DELTAS["zeros"]))
    found, ring, _ = vectors(tmp_path)
    words = found["a"].copy()
    assert not is_uniform(np.zeros_like(words), ring)
    workspace = Workspace(tmp_path / "sites" / "a")
    submission = workspace.last_submission("test")
    cohort = submission.terms.cohort("test", 1)
    Keystream(bytes.fromhex(submission.mask_seed)).add_to(words, minus=True)
    assert is_uniform(words, ring)  # the pair masks are still there
    for other in cohort.neighbours("a"):
        pair = workspace.exchange_key().pair(cohort.roster[other], "test")
        Keystream(pair.mask_key(cohort.attempt)).add_to(words, minus=other > "a")
    assert not ring.recentre(words).any()


def test_after_all_answered_one_delta_is_still_masked(tmp_path):
    """All that was revealed opens the sum: less its own seed's stream, each vector is uniform."""
    made = config("abcd", 1)
    federations.run(made, tmp_path, sites_of(made, DELTAS["zeros"]))
    found, ring, there = vectors(tmp_path)
    for site, record in there.unmasked.items():
        words = found[site].copy()
        Keystream(bytes.fromhex(record.revealed.own)).add_to(words, minus=True)
        assert is_uniform(words, ring)
    assert there.unmasked


# One that asks for more --------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """Site a of a run that is over, as a coordinator may still talk to it."""
    federations.run(config("abcd", 1), tmp_path)
    workspace = Workspace(tmp_path / "sites" / "a")
    return SimpleNamespace(name="a", workspace=workspace, trust=NOBODY_SIGNS, accept=None)


def asked(site, **changes):
    """What the site was asked, with changes."""
    submission = site.workspace.last_submission("test")
    history = read_history(DirectoryStore(site.workspace._root.parents[1] / "store"), "test")
    accepted = history.round(1).accepted
    values = {
        "run": "test",
        "round": 1,
        "survivors": {name: record.sha for name, record in accepted.items()},
        "sealed": {name: accepted[name].masked.sealed["a"] for name in "bcd"},
        **changes,
    }
    assert submission.sha == accepted["a"].sha
    return UnmaskRequested(**values)


def test_a_site_repeats_its_answer_and_gives_no_other(site):
    """Asked again it says the same; asked for a set that differs by one site it says nothing."""
    first = asked(site)
    told = answer_once(site, first)
    assert answer_once(site, first) == told
    fewer = {name: sha for name, sha in first.survivors.items() if name != "d"}
    with pytest.raises(ProtocolError, match="named two sets"):
        answer_once(site, asked(site, survivors=fewer))
    with pytest.raises(ProtocolError, match="survivors: expected 3 or more"):
        answer_once(site, asked(site, survivors={n: fewer[n] for n in "ab"}))
    with pytest.raises(ProtocolError, match="attempt: expected 1"):
        answer_once(site, asked(site, attempt=2))
    with pytest.raises(ProtocolError, match="masked delta that it holds"):
        answer_once(site, asked(site, round=2))
    others = {name: sha for name, sha in first.survivors.items() if name != "a"}
    with pytest.raises(ProtocolError, match="masked delta that it holds"):
        answer_once(site, asked(site, survivors=others))


def started(site, **roster):
    """A round that a coordinator opens for a cohort of its choice."""
    submission = site.workspace.last_submission("test")
    terms = submission.terms.model_copy(update={"roster": {**submission.terms.roster, **roster}})
    task = RoundStarted(
        run="test",
        round=2,
        source_sha="0" * 64,
        get_url="x",
        expires_at=0.0,
        training=WireTraining(local_steps=1),
        progress_from=0.0,
        progress_to=1.0,
        seed=1,
        codec="fp32",
        secure=terms,
    )
    return task, terms


def test_a_key_that_was_exchanged_is_refused(site):
    """A coordinator that puts its own key in the place of a site's would share that one's masks."""
    manifest = federations.learners(config())["a"].manifest
    check_terms(site, *started(site), manifest)
    with pytest.raises(NotAcceptedError, match="another of b"):
        check_terms(site, *started(site, b=Exchange(key=ExchangeKey.generate().public)), manifest)
    with pytest.raises(NotAcceptedError, match="another of a"):
        check_terms(site, *started(site, a=Exchange(key=ExchangeKey.generate().public)), manifest)
    check_terms(
        site, *started(site, e=Exchange(key=ExchangeKey.generate().public)), manifest
    )  # one that joined


def test_a_cohort_of_two_is_refused(site):
    """Of a sum of two each knows the other's part."""
    task, terms = started(site)
    two = terms.model_copy(update={"roster": {n: terms.roster[n] for n in "ab"}})
    with pytest.raises(NotAcceptedError, match="expected 3 sites"):
        check_terms(site, task, two, federations.learners(config())["a"].manifest)


def test_masks_are_not_drawn_for_a_round_that_was_answered(site):
    """Trained and masked again, two sums of one round would give the difference away."""
    kept = site.workspace.bond("test", 1)
    submission = site.workspace.last_submission("test")
    with pytest.raises(ProtocolError, match="single sites"):
        kept.bond.to_attempt(submission.terms.cohort("test", 1).attempt)


# A two-faced one, where sites sign ---------------------------------------------------------------


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """Four sites with keys after a round that nobody was asked to sign or answer for yet."""
    with monkeypatch.context() as patched:
        patched.setattr(handlers, "sign_once", lambda _site, _task: refuse())
        with pytest.raises(RunStuckError):
            federations.run(config("abcd", 1, trust=TRUST), tmp_path)
    sites = {}
    for name in "abcd":
        folder = tmp_path / "sites" / name
        key = SigningKey.load(folder / "identity.key", "test")
        sites[name] = SimpleNamespace(
            name=name, workspace=Workspace(folder), trust=Trust(key), accept=None
        )
    return sites


def refuse():
    raise ProtocolError("nobody signs")


def shown(sites, name, survivors, signatures=None):
    """What a site is asked: the set of these survivors."""
    shas = {one: site.workspace.last_submission("test").sha for one, site in sites.items()}
    masked = {one: site.workspace.last_submission("test").masked for one, site in sites.items()}
    return UnmaskRequested(
        run="test",
        round=1,
        survivors={one: shas[one] for one in survivors},
        sealed={one: masked[one].sealed[name] for one in survivors if one != name},
        signatures=signatures or {},
    )


def test_a_site_that_is_shown_another_set_than_the_others_reveals_nothing(signed):
    """The attack that opens one delta: d is told that all are there, the others that d is gone.

    With d's own seed from d and the pair keys from the others its delta would lie open. Each signs
    what it is shown; d's set gets one signature and so no answer, whoever else's it is given.
    """
    others = {n: sign_once(signed[n], shown(signed, n, "abc")) for n in "abc"}
    own = {"d": sign_once(signed["d"], shown(signed, "d", "abcd"))}
    assert None not in {**others, **own}.values()
    for signatures in (own, {**others, **own}, {**others, "d": others["a"]}):
        with pytest.raises(ProtocolError, match="may have shown others another set"):
            sign_once(signed["d"], shown(signed, "d", "abcd", signatures))
    with pytest.raises(ProtocolError, match="named two sets"):
        sign_once(signed["a"], shown(signed, "a", "abcd", own))
    assert signed["d"].workspace.bond("test", 1).revealed is None
    # What three of four signed is acted on by those three; d is in no other set.
    for name in "abc":
        task = shown(signed, name, "abc", others)
        assert sign_once(signed[name], task) is None
        assert {*answer_once(signed[name], task).keys} == {"d"}


def test_a_cohort_without_signatures_is_refused_by_a_site_that_signs(signed):
    """Taken away, a site's signature of its key would leave the coordinator's word for it."""
    site, manifest = signed["a"], federations.learners(config())["a"].manifest
    task, terms = started(site)
    check_terms(site, task, terms, manifest)
    bare = {n: one.model_copy(update={"signature": None}) for n, one in terms.roster.items()}
    site.workspace.keep_taken_part(
        "test", site.workspace.taken_part("test").model_copy(update={"roster": {}})
    )
    mine = {**bare, "a": terms.roster["a"]}
    with pytest.raises(NotAcceptedError, match="expected one that the site signed"):
        check_terms(site, task, terms.model_copy(update={"roster": mine}), manifest)
    forged = {
        **terms.roster,
        "e": Exchange.of("b", ExchangeKey.generate().public, SigningKey.generate()),
    }
    with pytest.raises(NotAcceptedError, match="signature"):
        check_terms(site, task, terms.model_copy(update={"roster": forged}), manifest)


def test_a_key_that_its_site_did_not_sign_takes_no_others_place(signed):
    """A site that lost its key comes back with another: with its own signature, and for good.

    A coordinator's own key is refused however it is signed, and so is the one that was lost.
    """
    site, manifest = signed["a"], federations.learners(config())["a"].manifest
    fresh, identity = ExchangeKey.generate().public, signed["b"].trust.key
    old = started(site)[1].roster["b"]
    mallory = Exchange.of("b", fresh, SigningKey.generate())
    for forged in (
        mallory,
        mallory.model_copy(update={"identity": old.identity}),
        Exchange(key=fresh),
        Exchange.of("c", fresh, identity),
    ):
        with pytest.raises(NotAcceptedError, match="another of b"):
            check_terms(site, *started(site, b=forged), manifest)
    renewed = Exchange.of("b", fresh, identity)
    site.accept = AcceptSection(peers={name: signed[name].trust.key.public.text for name in "bcd"})
    check_terms(site, *started(site, b=renewed), manifest)
    check_terms(site, *started(site, b=renewed), manifest)
    with pytest.raises(NotAcceptedError, match="another of b"):
        check_terms(site, *started(site, b=old), manifest)
    site.accept = AcceptSection(peers=dict.fromkeys("bcd", signed["c"].trust.key.public.text))
    with pytest.raises(NotAcceptedError, match=r"accept.peers.*got b with"):
        check_terms(site, *started(site, b=renewed), manifest)


def test_a_site_that_masked_again_answers_for_no_earlier_attempt(signed):
    """And one that answered masks for no further one: of one round each site opens one sum."""
    site, (_, terms) = signed["a"], started(signed["a"])
    submission = site.workspace.last_submission("test")
    others = {n: sign_once(signed[n], shown(signed, n, "abcd")) for n in "abc"}
    again = terms.model_copy(update={"number": 2})
    _bind(site.workspace, again.cohort("test", 1))
    with pytest.raises(ProtocolError, match="which this site masked for last"):
        answer_once(site, shown(signed, "a", "abcd", others))
    assert site.workspace.bond("test", 1).revealed is None
    assert submission.terms.number == 1
    second = signed["b"]
    answer_once(second, shown(signed, "b", "abcd", others))
    with pytest.raises(NotAcceptedError, match="would give single sites' parts away"):
        _bind(second.workspace, again.cohort("test", 1))


def test_sites_that_the_operator_does_not_know_are_refused(signed):
    """Whom a coordinator invents, and whom it gives another key, is not among accept.peers."""
    site, manifest = signed["a"], federations.learners(config())["a"].manifest
    task, terms = started(site)
    known = {name: one.identity for name, one in terms.roster.items() if name != "a"}
    site.accept = AcceptSection(peers=known)
    check_terms(site, task, terms, manifest)
    site.accept = AcceptSection(peers={**known, "b": known["c"]})
    with pytest.raises(NotAcceptedError, match=r"accept.peers.*got b with"):
        check_terms(site, task, terms, manifest)
    site.accept = AcceptSection(peers={n: key for n, key in known.items() if n != "d"})
    with pytest.raises(NotAcceptedError, match=r"accept.peers.*got d with"):
        check_terms(site, task, terms, manifest)
