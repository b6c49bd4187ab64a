"""A cohort in memory: sites with keys, their masked vectors, and who answers."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from shared.secure_sum.answering import Bond, answer
from shared.secure_sum.cohort import Attempt, Cohort, Survivors
from shared.secure_sum.exchange import ExchangeKey
from shared.secure_sum.masking import Masking, pairs_of
from shared.secure_sum.opening import check_answer, check_offers, open_masks
from shared.secure_sum.ring import ring_for

if TYPE_CHECKING:
    from shared.secure_sum.said import Answer

LEVELS, LENGTH = 127, 24


@cache
def _key(number: int) -> ExchangeKey:
    return ExchangeKey(hashlib.sha256(b"exchange key %d" % number).digest())


class Federation:
    """``count`` sites that masked their vectors for one attempt. ``numbers``: what each summed."""

    def __init__(self, count: int, seed: int = 0, attempt: Attempt | None = None) -> None:
        random = np.random.default_rng([count, seed])
        self.ring = ring_for(count, LEVELS)
        self.keys = {f"site-{number:02d}": _key(number) for number in range(count)}
        roster = {site: key.public for site, key in self.keys.items()}
        self.cohort = Cohort(attempt or Attempt("run", 1, 1), roster)
        self.numbers = {s: random.integers(-LEVELS, LEVELS + 1, LENGTH) for s in self.keys}
        self.pairs = {s: pairs_of(self.cohort, s, key) for s, key in self.keys.items()}
        self.seeds = {site: random.bytes(32) for site in self.keys}
        self.vectors, self.offers, self.bonds = {}, {}, {}
        for site, numbers in self.numbers.items():
            masking = Masking(self.cohort, site, self.pairs[site], self.seeds[site])
            words = masking.mask(self.ring.encode(numbers), self.ring)
            self.vectors[site] = words
            sha = hashlib.sha256(self.ring.pack(words)).hexdigest()
            self.offers[site] = masking.offer(sha)
            self.bonds[site] = Bond(self.cohort.attempt.number)

    def survivors(self, sites) -> Survivors:
        """The set of these sites."""
        return Survivors(self.cohort, {site: self.offers[site].sha for site in sites})

    def answer(self, survivors: Survivors, site: str) -> Answer:
        """A site's answer, as its bond allows. Raises ProtocolError."""
        self.bonds[site] = self.bonds[site].to_survivors(survivors, answered=True)
        sealed = {
            other: self.offers[other].sealed[site]
            for other in self.cohort.neighbours(site)
            if other in survivors.shas
        }
        sha = self.offers[site].sha
        return answer(survivors, site, self.pairs[site], self.seeds[site], sha, sealed)

    def sum(self, survivors: Survivors, answers) -> np.ndarray:
        """What the coordinator makes of it. Raises ProtocolError."""
        check_offers(survivors, self.offers)
        for site, told in answers.items():
            check_answer(survivors, site, told, self.offers)
        opened = open_masks(survivors, answers, self.offers)
        total = np.zeros(LENGTH, self.ring.word)
        for site in survivors.shas:
            total += self.vectors[site]
        return self.ring.recentre(opened.streams().unmask(total, self.ring))

    def plain(self, sites) -> np.ndarray:
        """The sum of integers."""
        return sum(self.numbers[site] for site in sites)
