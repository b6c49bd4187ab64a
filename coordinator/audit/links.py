"""The chain of links against the records: nothing was dropped, swapped, altered or added since.

A link proves what its writer knew. Whether that was the run's coordinator, only a key says that the
reader has from elsewhere; whether the chain was cut off at its end, only a head that a site kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import topology
from shared.errors import LedgerDamagedError
from shared.protocol.links import Walk
from shared.protocol.records import LinkRecord
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from coordinator.audit.chain import Chain
    from shared.protocol.ledger import Ledger
    from shared.protocol.links import Head

# What operators write beside the coordinator, also after the end, when nobody links any more.
_OF_OPERATORS = ("control/", "pruned/", "origin.json")
_LINK = re.compile(r"chain/([0-9]{8})\.json")
_ROUND = re.compile(r"rounds/([0-9]{5})/")


@dataclass(frozen=True)
class Expected:
    """What the reader knows from elsewhere. ``demanded``: by name, so its lack is damage."""

    key: PublicKey | None = None
    demanded: bool = False
    against: Head | None = None


NOTHING_KNOWN = Expected()


@dataclass(frozen=True)
class Linked:
    """What the chain says. ``head``: ``N:SHA256`` of the newest link; None where there is none.

    ``by``: the public key of all links from ``signed_from`` on; ``known``: it is the key that the
    reader has from elsewhere. ``found``: records that the coordinator which linked them had only
    met. ``unlinked``: records that no link names, and that is no damage.
    """

    links: int = 0
    head: str | None = None
    by: str | None = None
    fingerprint: str | None = None
    signed_from: int | None = None
    known: bool = False
    found: tuple[str, ...] = ()
    unlinked: tuple[str, ...] = ()


def check_links(ledger: Ledger, chain: Chain, expected: Expected) -> Linked:
    """Walk the chain and compare; what is wrong becomes a finding of ``chain``.

    An object of which something is found already is not named again.
    """
    walk = _walk(ledger, chain)
    prefix = topology.run_prefix(chain.run)
    named_before = chain.reported | {finding.key for finding in chain.findings}

    def find(name: str, problem: str) -> None:
        if prefix + name not in named_before:
            number = _ROUND.match(name)
            chain.find(int(number[1]) if number else 0, prefix + name, problem)

    for name, sha in sorted(walk.named.items()):
        got = chain.digests.get(name)
        if got is None:
            find(name, "is missing, but a link names it")
        elif got != sha:
            find(name, f"sha256: expected {sha}, as a link names it, got {got}")
    unlinked = sorted(chain.digests.keys() - walk.named.keys()) if walk.head else []
    ended = chain.history.finished is not None
    if ended:
        for name in unlinked:
            if not name.startswith(_OF_OPERATORS):
                find(name, "no link names it: it was added, or the links of it were taken away")
        unlinked = [name for name in unlinked if name.startswith(_OF_OPERATORS)]
    _check_expected(chain, walk, expected)
    found = (name for name in walk.found if not name.startswith(_OF_OPERATORS))
    return Linked(
        links=len(walk.heads),
        head=str(walk.head) if walk.head else None,
        by=walk.by,
        fingerprint=PublicKey(walk.by).fingerprint if walk.by else None,
        signed_from=walk.signed_from,
        known=expected.key is not None and walk.by == expected.key.text,
        found=tuple(sorted(found)),
        unlinked=tuple(unlinked),
    )


def _walk(ledger: Ledger, chain: Chain) -> Walk:
    walk, prefix = Walk(), topology.run_prefix(chain.run)
    for info in ledger.store.list(topology.links_prefix(chain.run)):
        name = _LINK.fullmatch(info.key.removeprefix(prefix))
        if name is None:
            chain.find(0, info.key, "expected a link's number as its name")
            continue
        data = ledger.store.get(info.key)
        link = None
        try:
            link = ledger.parse(LinkRecord, info.key, data)
        except LedgerDamagedError as error:
            chain.find(0, info.key, str(error).removeprefix(f"{info.key}: "))
        for problem in walk.add(int(name[1]), data, link):
            chain.find(0, info.key, problem)
    return walk


def _check_expected(chain: Chain, walk: Walk, expected: Expected) -> None:
    first = topology.link_key(chain.run, 1)
    signed_by = chain.history.federation.signed_by
    key, mine = expected.key, walk.by
    if signed_by is not None and mine != signed_by:
        chain.find(0, first, f"by: the run began as signed by {signed_by}, and its links are not")
    if key is not None and mine != key.text and (walk.head or expected.demanded):
        got = PublicKey(mine).fingerprint if mine else "no signature"
        chain.find(0, first, f"by: expected the signature of {key.fingerprint}, got {got}")
    against = expected.against
    if against is not None and walk.heads.get(against.number) != against.sha:
        got = walk.heads.get(against.number) or "no such link"
        chain.find(
            0,
            topology.link_key(chain.run, against.number),
            f"sha256: expected {against.sha}, got {got}: the store shows another history than the "
            "one that was confirmed to this site",
        )
