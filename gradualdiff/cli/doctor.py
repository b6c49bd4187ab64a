"""``gradualdiff doctor``: checks all that a coordinator or a site needs, and says what to fix.

Looks, and leaves things as they are: what it writes, it removes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.config import read_either
from gradualdiff.cli.output import JsonOption, console, print_json
from shared.errors import GradualDiffError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.doctor.checks import CheckResult


@dataclass(frozen=True)
class Report:
    """All findings on one file. ``kind``: federation or site. ``ok``: none of them is a FAIL."""

    kind: str
    file: str
    ok: bool
    findings: list[CheckResult]


def doctor(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A federation.toml or a site.toml.")
    ] = Path("federation.toml"),
    spool: Annotated[
        Path | None,
        typer.Option(help="The coordinator's --spool (default: spool beside the file)."),
    ] = None,
    store_url: Annotated[
        str | None,
        typer.Option(
            "--store-url", help="For a site: the store's address, to compare clocks with."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try all that a federation.toml or a site.toml needs; say OK, WARN, FAIL and what to do.

    SKIP: cannot be tried from here. The exit code is 1 if anything failed. Of a site's text only
    counts are told. A message that waits for the site is delivered to this look once, and stays.
    """
    kind, _ = read_either(file)
    found: list[CheckResult] = []
    for finding in _findings(kind, file, spool, store_url):
        found.append(finding)
        if not as_json:
            tell(finding)
    failed = [finding.check for finding in found if finding.verdict == "FAIL"]
    if as_json:
        print_json(Report(kind, str(file), not failed, found))
    if failed:
        raise GradualDiffError(
            f"{file}: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}; fix what "
            "each of them says, then run gradualdiff doctor again"
        )


def _findings(
    kind: str, file: Path, spool: Path | None, store_url: str | None
) -> Iterator[CheckResult]:
    if kind == "site":
        from gradualdiff.doctor.site import check_site

        return check_site(file, store_url)
    from gradualdiff.doctor.federation import check_federation

    return check_federation(file, spool)


def tell(finding: CheckResult) -> None:
    """One finding on a line."""
    text = f"{finding.verdict:<4}  {finding.check}: {finding.says}"
    console().print(text, markup=False, highlight=False, soft_wrap=True)
