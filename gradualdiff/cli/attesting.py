"""What the command line says of a run's chain of links, and the options to check it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.audit.links import Linked

KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="ed25519:...",
        help="The coordinator's public key, as its operator read it out to you.",
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="N:SHA256",
        help="A head that a site kept: the records must be those that were confirmed to it.",
    ),
]


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
        first = f" from link {chain.signed_from} on" if (chain.signed_from or 1) > 1 else ""
        yield f"chain: signed{first} by {chain.fingerprint}, {whence}"
    if chain.found:
        yield (
            f"chain: {len(chain.found)} records were met by the coordinator that linked them: of "
            f"one that was killed, or of an earlier release ({chain.found[0]}, ...)"
        )
    if chain.unlinked:
        yield f"chain: not linked yet: {', '.join(chain.unlinked[:5])}"
    if against is None:
        yield "chain: whether its end was cut off, only a head that a site kept can say (--against)"
