"""The chain of links against the records: nothing was dropped, swapped, altered or added since.

A link proves what its writer knew. Whether that was the run's coordinator, only a key says that the
reader has from elsewhere; whether the chain was cut off at its end, only a head that a site kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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


@dataclass
class WalkedLinks:
    """The links as they were at one moment. ``problems``: what is wrong with them, by key."""

    walk: Walk = field(default_factory=Walk)
    problems: list[tuple[str, str]] = field(default_factory=list)


def walk_links(ledger: Ledger) -> WalkedLinks:
    """Walk the chain. To be done before the records are read: what is named then is there."""
    found = WalkedLinks()
    _walk_on(ledger, found)
    return found


def check_links(ledger: Ledger, chain: Chain, walked: WalkedLinks, expected: Expected) -> Linked:
    """Compare records and chain; what is wrong becomes a finding of ``chain``.

    An object of which something is found already is not named again. A run under way goes on
    meanwhile: what links name that came since is not missed.
    """
    prefix = topology.run_prefix(chain.run)
    named_before = chain.reported | {finding.key for finding in chain.findings}
    named = dict(walked.walk.named)
    _walk_on(ledger, walked)
    walk = walked.walk

    def find(name: str, problem: str) -> None:
        if prefix + name not in named_before:
            number = _ROUND.match(name)
            chain.find(int(number[1]) if number else 0, prefix + name, problem)

    for name, sha in sorted(named.items()):
        got = chain.digests.get(name)
        if got is None:
            find(name, "is missing, but a link names it")
        elif got != sha:
            find(name, f"sha256: expected {sha}, as a link names it, got {got}")
    unlinked = sorted(chain.digests.keys() - walk.named.keys()) if walk.head else []
    if chain.history.finished is not None:
        for name in unlinked:
            if not name.startswith(_OF_OPERATORS):
                find(name, "no link names it: it was added, or the links of it were taken away")
        unlinked = [name for name in unlinked if name.startswith(_OF_OPERATORS)]
    for key, problem in walked.problems:
        chain.find(0, key, problem)
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


def _walk_on(ledger: Ledger, found: WalkedLinks) -> None:
    """Take the links that came after those that were walked."""
    prefix = topology.run_prefix(ledger.run)
    for info in ledger.store.list(topology.links_prefix(ledger.run)):
        name = _LINK.fullmatch(info.key.removeprefix(prefix))
        if name is None:
            odd = (info.key, "expected a link's number as its name")
            found.problems += [odd] if odd not in found.problems else []
            continue
        if found.walk.head is not None and int(name[1]) <= found.walk.head.number:
            continue
        data, link = ledger.store.get(info.key), None
        try:
            link = ledger.parse(LinkRecord, info.key, data)
        except LedgerDamagedError as error:
            found.problems.append((info.key, str(error).removeprefix(f"{info.key}: ")))
        found.problems += [
            (info.key, problem) for problem in found.walk.add(int(name[1]), data, link)
        ]


def _check_expected(chain: Chain, walk: Walk, expected: Expected) -> None:
    first = topology.link_key(chain.run, 1)
    signed_by = chain.history.federation.signed_by
    key, mine = expected.key, walk.by
    if signed_by is not None and (mine != signed_by or walk.signed_from != 1):
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
