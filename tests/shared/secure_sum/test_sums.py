"""Whole sums: sites that go away at every point, and coordinators that ask for too much."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config.secure import two_thirds
from shared.config.values import canonical_json
from shared.errors import ProtocolError
from shared.secure_sum.answering import Bond, answer
from shared.secure_sum.cohort import Attempt, Cohort, Survivors
from shared.secure_sum.cohort import _graph as graph
from shared.secure_sum.masking import pairs_of
from shared.secure_sum.opening import check_answer, open_masks
from shared.secure_sum.said import Answer, waits_for
from shared.trust.keys import SigningKey
from tests.shared.secure_sum.sites import LENGTH, Federation

PATTERNS = 10_000
SIZES = (*range(3, 13), 41, 60)


@pytest.mark.slow
def test_ten_thousand_patterns_of_absence_give_the_sum_or_nothing():
    """Sites go before they upload, before they answer, both, and their neighbours with them.

    What comes out is the plain sum of integers, or the attempt is refused with the reason.
    """
    random = np.random.default_rng(17)
    federations = {size: Federation(size) for size in SIZES}
    outcomes = Counter()
    for pattern in range(PATTERNS):
        # The two large ones are masked along a graph of 20 neighbours, and take most of the time.
        size = SIZES[-1 - pattern % 2] if pattern % 20 == 0 else SIZES[pattern % 10]
        federation = federations[size]
        federation.bonds = {site: Bond(1) for site in federation.keys}
        early, late = random.choice([0.0, 0.1, 0.2, 0.35]), random.choice([0.0, 0.1, 0.3, 0.45])
        sites = list(federation.keys)
        there = [site for site in sites if random.random() >= early]
        if len(there) < federation.cohort.fewest:
            with pytest.raises(ProtocolError, match="survivors: expected"):
                federation.survivors(there)
            outcomes["too few survivors"] += 1
            continue
        survivors = federation.survivors(there)
        answering = [site for site in there if random.random() >= late]
        answers = {site: federation.answer(survivors, site) for site in answering}
        if waits_for(survivors, answers):
            with pytest.raises(ProtocolError, match="expected the answers of"):
                federation.sum(survivors, answers)
            outcomes["too few answers"] += 1
            continue
        assert np.array_equal(federation.sum(survivors, answers), federation.plain(there))
        outcomes["sums"] += 1
        silent = set(there) - set(answering)
        outcomes["sums without some"] += bool(silent)
        gone_too = any(set(survivors.gone(site)) for site in silent)
        outcomes["sums without some and a neighbour"] += gone_too
    assert sum(outcomes[o] for o in ("too few survivors", "too few answers", "sums")) == PATTERNS
    assert min(outcomes.values()) > 100, outcomes


def test_a_sum_of_three_needs_all_three():
    """Of two, each would know the other's part."""
    federation = Federation(3)
    with pytest.raises(ProtocolError, match="expected 3 or more"):
        federation.survivors(["site-00", "site-01"])
    survivors = federation.survivors(federation.keys)
    answers = {site: federation.answer(survivors, site) for site in ("site-00", "site-02")}
    # The third went away after its vector came; the two others stand in for it.
    assert np.array_equal(federation.sum(survivors, answers), federation.plain(federation.keys))


def test_large_cohorts_are_masked_along_a_graph():
    """Up to 40 sites each with each; beyond, both ways, with 20 neighbours or a few more."""
    for count in (40, 41, 200, 400):
        roster = {f"site-{number:03d}": f"key {number}" for number in range(count)}
        cohort = Cohort(Attempt("run", 1, 1), roster)
        degrees = {len(cohort.neighbours(site)) for site in roster}
        assert degrees == (
            {39} if count == 40 else {20} if count == 41 else {22 + 4 * (count > 200)}
        )
        for site in roster:
            assert site not in cohort.neighbours(site)
            assert all(site in cohort.neighbours(other) for other in cohort.neighbours(site))
        again = Cohort(Attempt("run", 2, 1), roster)
        assert count == 40 or any(again.neighbours(s) != cohort.neighbours(s) for s in roster)


@settings(deadline=None, max_examples=40)
@given(
    names=st.sets(st.from_regex("[a-z][a-z0-9-]{0,8}", fullmatch=True), min_size=3, max_size=90),
    attempt=st.builds(Attempt, st.just("run"), st.integers(1, 9), st.integers(1, 3)),
)
def test_who_masks_with_whom_is_drawn_once_and_as_the_paper_says(names, attempt):
    """However often and by whom it is asked: a ring in the order of hashes, built a single time."""
    roster = {name: f"key of {name}" for name in names}
    cohort = Cohort(attempt, roster)
    circle = sorted(
        names, key=lambda name: hashlib.sha256(canonical_json([cohort.digest, name])).hexdigest()
    )
    before = graph.cache_info().misses
    for at, name in enumerate(circle):
        near = {circle[(at + step) % len(names)] for step in range(-10, 11)} - {name}
        wanted = near if len(names) > 40 else names - {name}
        assert Cohort(attempt, {**roster}).neighbours(name) == tuple(sorted(wanted))
    assert graph.cache_info().misses <= before + 1


@pytest.mark.parametrize(
    "roster",
    [{"a": "1", "b": "2"}, {}, {"a": "1", "b": "2", "c": "1"}],
)
def test_a_cohort_that_protects_nobody_is_refused(roster):
    """Fewer than three, or two names of one key: one site, asked three times."""
    with pytest.raises(ProtocolError, match="cohort of round 1"):
        Cohort(Attempt("run", 1, 1), roster)


# A coordinator that asks for too much ------------------------------------------------------------


def test_a_site_stands_by_one_set_of_survivors():
    """Neither before nor after its answer does it act on another set of the same attempt."""
    federation = Federation(6)
    sites = sorted(federation.keys)
    first, second = federation.survivors(sites), federation.survivors(sites[:5])
    told = federation.answer(first, "site-00")
    assert federation.answer(first, "site-00") == told
    with pytest.raises(ProtocolError, match="named two sets"):
        federation.answer(second, "site-00")


def test_a_site_that_answered_takes_part_in_no_other_attempt_of_the_round():
    """Sums over two sets that differ by one site would give that one's part away."""
    first, second = Attempt("run", 1, 1), Attempt("run", 1, 2)
    federation = Federation(4)
    survivors = federation.survivors(federation.keys)
    bond = Bond(1).to_attempt(first)
    assert bond.to_attempt(second) == Bond(2)
    with pytest.raises(ProtocolError, match="bound to the newest"):
        bond.to_attempt(second).to_attempt(first)
    with pytest.raises(ProtocolError, match="masked for last"):
        bond.to_attempt(second).to_survivors(survivors)
    signed = bond.to_survivors(survivors)
    assert signed.to_attempt(second) == Bond(2)
    answered = signed.to_survivors(survivors, answered=True)
    assert answered.to_survivors(survivors).answered
    for again in (first, second):
        with pytest.raises(ProtocolError, match="single"):
            answered.to_attempt(again)


def test_a_site_reveals_of_each_neighbour_one_thing_only():
    """Of a survivor shares of its own seed; of one that is gone the pair key; never both."""
    federation = Federation(6)
    there = sorted(federation.keys)[:5]
    told = federation.answer(federation.survivors(there), "site-00")
    assert {*told.keys} == {"site-05"}
    assert {*told.shares} == {*there} - {"site-00"}
    # One share of the own seed, and one of the pair key with the one that is gone.
    assert {len(shares) for shares in told.shares.values()} == {64}


@pytest.mark.parametrize("named", ["without it", "with another vector"])
def test_a_site_answers_for_its_own_vector_only(named):
    """Whoever is left out, or whose vector was exchanged, reveals nothing."""
    federation = Federation(6)
    sites = sorted(federation.keys)
    shas = {site: federation.offers[site].sha for site in sites[: 5 if "out" in named else 6]}
    if "another" in named:
        shas["site-05"] = "f" * 64
    with pytest.raises(ProtocolError, match="expected this site with its vector"):
        federation.answer(Survivors(federation.cohort, shas), "site-05")


def test_a_set_with_strangers_or_one_vector_twice_is_refused():
    """Nor is there a vector without a sha256."""
    federation = Federation(4)
    shas = dict(federation.survivors(federation.keys).shas)
    for change in ({"mallory": "a" * 64}, {"site-00": shas["site-01"]}, {"site-00": "short"}):
        with pytest.raises(ProtocolError, match="survivors: expected"):
            Survivors(federation.cohort, {**shas, **change})


def test_shares_of_another_vector_are_not_revealed():
    """A neighbour that masked twice: what it shared for one vector does not open the other."""
    federation = Federation(4)
    survivors = federation.survivors(federation.keys)
    shas = {**survivors.shas, "site-03": "e" * 64}
    told = federation.answer(Survivors(federation.cohort, shas), "site-00")
    assert {*told.shares} == {"site-01", "site-02"}


def test_a_coordinator_that_shows_two_sets_is_found():
    """Whatever it shows to whom: at most one set gets the signatures of two thirds.

    It tries every split of the cohort in two, with a set of its own for each half, and asks each
    site to sign what that site is shown.
    """
    for count in (4, 5, 7):
        federation = Federation(count)
        sites = sorted(federation.keys)
        keys = {site: SigningKey.generate() for site in sites}
        identities = {site: key.public for site, key in keys.items()}
        sets = [federation.survivors(sites), federation.survivors(sites[:-1])]
        for split in range(2**count):
            signatures = [{}, {}]
            for at, site in enumerate(sites):
                shown = split >> at & 1
                bond = Bond(1).to_survivors(sets[shown])
                signatures[shown][site] = sets[shown].sign(keys[site])
                with pytest.raises(ProtocolError, match="named two sets"):
                    bond.to_survivors(sets[1 - shown])
            passed = 0
            for one, signed in zip(sets, signatures, strict=True):
                # It may pass on all signatures that it has, also those of the other set.
                try:
                    one.check_signatures({**signatures[0], **signatures[1], **signed}, identities)
                except ProtocolError as error:
                    assert "showed" in str(error) or "shown" in str(error)  # noqa: PT017
                else:
                    passed += 1
                    assert len(signed) >= two_thirds(count)
            assert passed <= 1


def test_no_two_attempts_are_opened_whose_sets_differ_by_one_site():
    """However a coordinator splits a round: some sites mask again, all others answer at once.

    A site that masks for the second attempt answers for no first one, and the other way round. So
    of two sets of which one is the other and one site more, at most one can be opened: every such
    pair is tried with every choice of who masks again, and with sites that only come to the second.
    """
    tried = Counter()
    for count, more in itertools.product(range(3, 7), range(3)):
        names = [f"site-{number}" for number in range(count + more)]
        first, everybody = names[:count], names
        old = Cohort(Attempt("run", 1, 1), {name: name for name in first})
        for masked_again in subsets(everybody, 3):
            bonds = {name: Bond(2 if name in masked_again else 1) for name in everybody}
            new = Cohort(Attempt("run", 1, 2), {name: name for name in masked_again})
            for one in subsets(first, old.fewest):
                others = [{*one} - {name} for name in one]
                others += [{*one, name} for name in everybody if name not in one]
                for other in others:
                    if len(other) < new.fewest or not other <= {*masked_again}:
                        continue
                    opened = [opens(old, one, bonds), opens(new, other, bonds)]
                    assert opened != [True, True], (first, masked_again, one, other)
                    tried["pairs"] += 1
                    tried["second opened"] += opened[1]
    assert tried["pairs"] > 1000
    assert tried["second opened"] > 1000


def subsets(names, fewest):
    sizes = range(fewest, len(names) + 1)
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes)


def opens(cohort, there, bonds):
    """Whether all answers for this set that the bonds allow open its sum."""
    survivors = Survivors(cohort, {s: hashlib.sha256(s.encode()).hexdigest() for s in there})
    answers = {}
    for site in there:
        with contextlib.suppress(ProtocolError):
            bonds[site].to_survivors(survivors, answered=True)
            near = [other for other in cohort.neighbours(site) if other in there]
            answers[site] = Answer(b"", {}, dict.fromkeys(near, b""))
    return not waits_for(survivors, answers)


# Sites that lie ----------------------------------------------------------------------------------


def test_seeds_that_are_not_those_committed_to_are_refused():
    """A false answer is refused when it comes, a false share when it is needed."""
    federation = Federation(5)
    survivors = federation.survivors(sorted(federation.keys)[:4])
    told = {site: federation.answer(survivors, site) for site in survivors.shas}
    honest = told["site-00"]
    for false in (
        replace(honest, own=bytes(32)),
        replace(honest, keys={"site-04": bytes(32)}),
        replace(honest, keys={}),
        replace(honest, shares={"site-04": bytes(64)}),
        replace(honest, shares={"site-01": bytes(32)}),
    ):
        with pytest.raises(ProtocolError, match="answer of site-00"):
            check_answer(survivors, "site-00", false, federation.offers)
    with pytest.raises(ProtocolError, match="one of the survivors"):
        check_answer(survivors, "site-04", honest, federation.offers)
    told.pop("site-03")
    told["site-00"] = replace(honest, shares={**honest.shares, "site-03": bytes(64)})
    with pytest.raises(ProtocolError, match="shares of site-03"):
        open_masks(survivors, told, federation.offers)


def test_two_sites_that_do_not_share_a_key_are_named():
    """One of them was told another exchange key: no sum comes of it."""
    federation = Federation(4)
    survivors = federation.survivors(federation.keys)
    answers = {site: federation.answer(survivors, site) for site in federation.keys}
    offer = federation.offers["site-01"]
    federation.offers["site-01"] = replace(offer, pairs={**offer.pairs, "site-02": "0" * 64})
    with pytest.raises(ProtocolError, match="site-01 and site-02"):
        federation.sum(survivors, answers)


def test_altered_shares_are_left_out_and_others_stand_in():
    """A coordinator that damages what it forwards gains nothing, and loses that holder."""
    federation = Federation(7)
    survivors = federation.survivors(federation.keys)
    sealed = {
        other: federation.offers[other].sealed["site-00"]
        for other in federation.cohort.neighbours("site-00")
    }
    sealed["site-01"] = sealed["site-02"]
    pairs = pairs_of(federation.cohort, "site-00", federation.keys["site-00"])
    sha, seed = federation.offers["site-00"].sha, federation.seeds["site-00"]
    told = answer(survivors, "site-00", pairs, seed, sha, sealed)
    assert "site-01" not in told.shares
    answers = {s: federation.answer(survivors, s) for s in sorted(federation.keys)[2:]}
    answers["site-00"] = told
    assert np.array_equal(federation.sum(survivors, answers), federation.plain(federation.keys))


# What is on record says nothing ------------------------------------------------------------------


def test_two_different_vectors_look_the_same_before_anybody_answers():
    """What the coordinator has of one site is uniform, less all that it can compute.

    With its own seeds fresh, zeros and the largest vector pass the same chi-square test, as they
    are and less the sum of all others' vectors.
    """
    bits, cells = 11, 16
    for fill in (0, 127, -127):
        counts, rests = np.zeros(cells), np.zeros(cells)
        for seed in range(60):
            federation = Federation(5, seed)
            words = federation.vectors["site-00"]
            shift = federation.ring.encode(fill - federation.numbers["site-00"])
            mine = federation.ring.reduce(words + shift)
            others = sum(
                v.astype(np.int64) for s, v in federation.vectors.items() if s != "site-00"
            )
            rest = (mine.astype(np.int64) + others) % 2**bits
            counts += np.bincount(mine >> 7, minlength=cells)
            rests += np.bincount(rest >> 7, minlength=cells)
        expected = 60 * LENGTH / cells
        for seen in (counts, rests):
            statistic = ((seen - expected) ** 2 / expected).sum()
            assert abs(statistic - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))
