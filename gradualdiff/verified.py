"""What a verification found, in lines: for the command line and for the dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.audit.chain import Finding
    from coordinator.audit.evidence import Verification
    from coordinator.audit.links import Linked


def lines(found: Verification, against: str | None = None) -> Iterator[str]:
    """All but the findings: who signed, what the chain proves, what can no longer be told."""
    for signer in found.signers:
        yield f"signed by {signer.site} ({signer.fingerprint}): {signer.records} records"
    yield from told_of_chain(found.chain, against)
    yield from (f"note: {finding(note)}" for note in found.notes)


def finding(found: Finding) -> str:
    """One of them: its round, its object and what is wrong."""
    return f"round {found.round}: {found.key}: {found.problem}"


def in_one(found: Verification) -> str:
    """What a verification without a finding did."""
    return (
        f"{found.rounds} rounds, {found.recomputed} of them recomputed from {found.deltas} deltas, "
        f"adapter sha256 {found.adapter_sha}"
    )


def told_of_chain(chain: Linked, against: str | None) -> Iterator[str]:
    """What the chain proves, and what it does not, a line each."""
    if chain.head is None:
        yield (
            "chain: no links: an earlier release recorded this, or somebody took them away; "
            "nothing says that no record was altered"
        )
        return
    yield f"chain: {chain.links} links, head {chain.head}"
    if chain.by is None:
        yield "chain: signed by nobody: whoever can write into the store can write another chain"
    else:
        whence = (
            "the key that you gave or keep"
            if chain.known
            else "the chain's own word: have it read out to you, and give it with --key"
        )
        yield f"chain: signed by {chain.fingerprint}, {whence}"
    if chain.found:
        yield (
            f"chain: {len(chain.found)} records were met by the coordinator that linked them: of "
            f"one that was killed{_or_whom(chain)} ({chain.found[0]}, ...)"
        )
    if chain.unlinked:
        yield f"chain: not linked yet: {', '.join(chain.unlinked[:5])}"
    if against is None:
        yield "chain: whether its end was cut off, only a head that a site kept can say (--against)"


def _or_whom(chain: Linked) -> str:
    return ", whose signature each has" if chain.by else ", of an earlier release, or somebody's"
