"""The chain of links against the records: nothing was dropped, swapped, altered or added since.

A link proves what its writer knew. Whether that was the run's coordinator, only a key says that the
reader has from elsewhere; whether the chain was cut off at its end, only a head that a site kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared import topology
from shared.errors import LedgerDamagedError, SignatureError
from shared.protocol.chain import Head, Walk, opened_json
from shared.protocol.records import LinkRecord
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from coordinator.audit.chain import Chain
    from coordinator.site_keys import SiteKeys
    from shared.protocol.ledger import Ledger

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

    ``by``: the public key of all links; ``known``: it is the key that the reader has from
    elsewhere. ``found``: records that the coordinator which linked them had only met.
    ``unlinked``: records that no link names, and that is no damage.
    """

    links: int = 0
    head: str | None = None
    by: str | None = None
    fingerprint: str | None = None
    known: bool = False
    found: tuple[str, ...] = ()
    unlinked: tuple[str, ...] = ()


@dataclass
class LinkWalk(Walk):
    """A run's links. ``by``: the key whose signature must be on each; None: nobody signs.

    ``named``: every record's sha256 by its name. ``found``: the records that their link's writer
    only met. ``keys``: the newest enrolled key that a link names. ``problems``: what is wrong with
    the links, by key.
    """

    by: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    keys: str | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)

    def take(self, ledger: Ledger, key: str, data: bytes) -> LinkRecord | None:
        """Take the next link; None where it cannot be read."""
        number = int(key[-13:-5])
        signer, problems = self.add(ledger.where(key), number, data)
        by = signer.text if signer else None
        if by != self.by and not problems:
            problems.append(f"signed_by: expected {self.by or 'none'}, got {by or 'none'}")
        link = None
        try:
            link = ledger.parse(LinkRecord, key, data)
        except LedgerDamagedError as error:
            problems.append(str(error).removeprefix(f"{key}: "))
        for name, sha in (link.records | link.found).items() if link else ():
            before = self.named.setdefault(name, sha)
            if before != sha:
                problems.append(f"{name}: expected {before}, as it was named before, got {sha}")
        if link is not None:
            self.found |= link.found.keys()
            self.keys = link.keys or self.keys
        self.problems += [(key, problem) for problem in problems]
        return link


def walk_links(
    ledger: Ledger,
    walk: LinkWalk | None = None,
    each: Callable[[Callable[[str], bytes], Sequence[str]], Iterable[bytes]] = map,
) -> LinkWalk:
    """Walk the chain, or on from ``walk``. ``each``: how the links are fetched, one after another.

    To be done before the records are read: what is named then is there.
    """
    if walk is None:
        walk = LinkWalk(by=ledger.federation().signed_by)
    prefix, new = topology.run_prefix(ledger.run), []
    for info in ledger.store.list(topology.links_prefix(ledger.run)):
        name = _LINK.fullmatch(info.key.removeprefix(prefix))
        if name is None:
            odd = (info.key, "expected a link's number as its name")
            walk.problems += [odd] if odd not in walk.problems else []
        elif int(name[1]) >= walk.due:
            new.append(info.key)
    for key, data in zip(new, each(ledger.store.get, new), strict=True):
        walk.take(ledger, key, data)
    return walk


def is_of_operators(name: str) -> bool:
    """Whether a record of this name below the run is written by operators, without a key."""
    return name.startswith(_OF_OPERATORS)


def signer_of(ledger: Ledger, key: str, data: bytes) -> str | None:
    """The public key that signed a record as it lies there; None for none, or no true one."""
    try:
        by = opened_json(data, ledger.where(key))[1]
    except SignatureError:
        return None
    return by.text if by else None


def check_links(ledger: Ledger, chain: Chain, walk: LinkWalk, expected: Expected) -> Linked:
    """Compare records and chain; what is wrong becomes a finding of ``chain``.

    An object of which something is found already is not named again. A run under way goes on
    meanwhile: what links name that came since is not missed.
    """
    named = dict(walk.named)
    walk_links(ledger, walk)
    unlinked = sorted(chain.digests.keys() - walk.named.keys()) if walk.head else []
    found = sorted(name for name in walk.found if not is_of_operators(name))
    reported = chain.reported | {finding.key for finding in chain.findings}
    for name, problem in _problems(ledger, chain, walk, named, [*found, *unlinked]):
        key = topology.run_prefix(chain.run) + name
        if key not in reported:
            number = _ROUND.match(name)
            chain.find(int(number[1]) if number else 0, key, problem)
            reported.add(key)
    if chain.history.finished is not None:
        unlinked = [name for name in unlinked if is_of_operators(name)]
    for key, problem in walk.problems:
        chain.find(0, key, problem)
    _check_expected(chain, walk, expected)
    return Linked(
        links=len(walk.heads),
        head=str(walk.head) if walk.head else None,
        by=walk.by if walk.head else None,
        fingerprint=PublicKey(walk.by).fingerprint if walk.by and walk.head else None,
        known=bool(walk.head) and expected.key is not None and walk.by == expected.key.text,
        found=tuple(found),
        unlinked=tuple(unlinked),
    )


def _problems(
    ledger: Ledger, chain: Chain, walk: LinkWalk, named: dict[str, str], met: list[str]
) -> Iterator[tuple[str, str]]:
    """What is wrong with records, by name. ``named``: by links that are as old as the records.

    ``met``: those of which no link says that the coordinator wrote them.
    """
    for name, sha in sorted(named.items()):
        got = chain.digests.get(name)
        if got is None:
            yield name, "is missing, but a link names it"
        elif got != sha:
            yield name, f"sha256: expected {sha}, as a link names it, got {got}"
    for name in met:
        key = topology.run_prefix(chain.run) + name
        if name not in chain.digests or is_of_operators(name):
            continue
        if walk.by is not None and signer_of(ledger, key, ledger.store.get(key)) != walk.by:
            yield name, "was put there by somebody else: the coordinator signs all that it records"
        elif name not in walk.named and chain.history.finished is not None:
            yield name, "no link names it: it was added, or the links of it were taken away"


def _check_expected(chain: Chain, walk: LinkWalk, expected: Expected) -> None:
    first, key = topology.link_key(chain.run, 1), expected.key
    if walk.by is not None and not walk.head:
        chain.find(0, first, f"signed_by: expected links by {walk.by}, got none")
    if key is not None and walk.by != key.text and (walk.head or expected.demanded):
        got = PublicKey(walk.by).fingerprint if walk.by else "no signature"
        chain.find(0, first, f"signed_by: expected the signature of {key.fingerprint}, got {got}")
    against = expected.against
    if against is not None and walk.heads.get(against.number) != against.sha:
        got = walk.heads.get(against.number) or "no such link"
        chain.find(
            0,
            topology.link_key(chain.run, against.number),
            f"sha256: expected {against.sha}, got {got}: the store shows another history than the "
            "one that was confirmed to this site",
        )
    for lost, problem in lost_keys(walk, chain.keys):
        chain.find(0, lost, problem)


def lost_keys(walk: LinkWalk, keys: SiteKeys | None) -> Iterator[tuple[str, str]]:
    """The newest enrolled key that a link names, if the store shows none or another one there."""
    if walk.keys is None or keys is None:
        return
    named = Head.parse(walk.keys, "keys")
    got = keys.chain.heads.get(named.number)
    if got != named.sha:
        problem = (
            f"sha256: expected {named.sha}, as a link names it, got {got or 'none'}: newer "
            "enrolments or revocations were taken away, or others put in their place"
        )
        yield topology.site_keys_key(keys.coordinator.fingerprint, named.number), problem
