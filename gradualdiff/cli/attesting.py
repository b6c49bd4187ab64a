"""``gradualdiff runs attest``, and what the command line says of a run's chain of links."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import DEFAULT_STORE, StoreOption, console
from gradualdiff.verified import finding, told_of_chain
from shared.errors import ConfigError, LedgerDamagedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.audit.evidence import Verification
    from gradualdiff.attesting import CheckedAttestation

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


def attest(
    run: Annotated[str | None, typer.Argument(help="The run's name; none with --check.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="The new file to write.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="A file to check; no store is needed.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="With --check: an export, to compare with the result."),
    ] = None,
    key: KeyOption = None,
    against: AgainstOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write one file that proves a run to others, or check one: --check FILE.

    It holds every record with its signatures, the digests of all objects, what verify found, and
    what was installed. Exit code 21 where it does not fit, 53 where it was altered.
    """
    if (check is None) == (run is None or to is None):
        raise ConfigError("expected RUN and --to FILE, or --check FILE; give one of them")
    if check is not None:
        from gradualdiff.attesting import check_attestation

        _say_checked(check_attestation(check, key=key, against=against, adapter=adapter), against)
        return
    from gradualdiff.store import open_store

    assert run is not None  # both were looked at
    assert to is not None
    found = open_store(store).run(run).attest(to, announce, key=key, against=against)
    refuse_findings(found)
    console().print(f"Wrote {to}: run {run}, {found.rounds} rounds, head {found.chain.head}")
    console().print(f"next: whoever gets it runs: gradualdiff runs attest --check {to.name}")


def _say_checked(checked: CheckedAttestation, against: str | None) -> None:
    told, found, out = checked.told, checked.found, console()
    refuse_findings(found)
    if not checked.is_result:
        raise LedgerDamagedError(
            f"--adapter: expected sha256 {found.adapter_sha}, the result of run {told.run}, got "
            f"{checked.adapter_sha}; it is another round's adapter, another run's, or was altered"
        )
    out.print(f"[green]run {told.run} attested[/green]: {found.rounds} rounds, records consistent")
    lines = [f"adapter sha256 {found.adapter_sha}"]
    if checked.adapter_sha is not None:
        lines.append("adapter: the file that you gave is this one")
    lines += told_of_chain(found.chain, against)
    lines += [f"signed by {s.site} ({s.fingerprint}): {s.records} records" for s in found.signers]
    if told.signed_by is None:
        lines.append("file: signed by nobody: the next lines are the word of whoever sent it")
    else:
        lines.append(f"file: signed by {told.signed_by.fingerprint}")
    lines += _its_word(checked)
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _its_word(checked: CheckedAttestation) -> Iterator[str]:
    """What the file says of what was done where it was made."""
    from coordinator.liveness import moment

    told = checked.told
    done = told.verification
    yield (
        f"file: made {moment(told.made)} by gradualdiff-fed {told.release}: "
        f"{done.get('recomputed')} of {done.get('rounds')} rounds recomputed from "
        f"{done.get('deltas')} deltas"
    )
    kept = sum(one.stored for one in told.objects)
    size = sum(one.size or 0 for one in told.objects)
    yield f"file: {kept} of {len(told.objects)} objects that records name were there, {size} bytes"
    yield f"file: {len(told.bom.get('components', ()))} distributions were installed (CycloneDX)"


def refuse_findings(found: Verification) -> None:
    """Raises LedgerDamagedError that lists what was found, if anything was."""
    if found.findings:
        lines = [f"  {finding(one)}" for one in found.findings]
        raise LedgerDamagedError(
            f"run {found.run} failed verification:\n" + "\n".join(lines) + "\n"
            "Restore these objects from a copy of the store; other rounds are unharmed"
        )


def announce(round_number: int) -> None:
    """Say which round is checked now."""
    console().print(f"checking round {round_number}")
