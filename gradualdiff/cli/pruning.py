"""``gradualdiff runs prune`` and ``erase``: delete tensors of a run, after saying what is lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.deeds import ReasonOption, on_record
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
    print_table,
)
from gradualdiff.units import megabytes

if TYPE_CHECKING:
    from coordinator.runs.retention import Plan
    from shared.protocol.records import PrunedRecord


def prune(
    run: RunArgument,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="all: delete nothing. adapters: delete the deltas of closed rounds. last:N: "
            "delete also the adapters before the last N rounds.",
        ),
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete. Without this option it only lists what would go.")
    ] = False,
    reason: ReasonOption = "room",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete deltas, old adapters, and uploads that no round takes any more.

    Records stay, and what an unfinished run needs.
    """
    from coordinator.runs.operating import operator, operator_ledger
    from coordinator.runs.retention import carry_out, read_plan
    from gradualdiff.store import open_store

    ledger = operator_ledger(open_store(store, writable=True).objects, run, time.time)
    plan = read_plan(ledger, keep)
    if not as_json:
        _show(plan)
    record = None
    if yes and plan.all:
        with on_record(ledger.store, store, "run.prune", f"{run} {keep}", reason):
            record = carry_out(ledger, plan, reason, operator(), lambda _: None)
    _tell(plan, record, yes=yes, as_json=as_json)


def erase(
    run: RunArgument,
    reason: ReasonOption,
    number: Annotated[
        int | None,
        typer.Option("--round", min=0, help="Only what was made for or in this round."),
    ] = None,
    site: Annotated[str | None, typer.Option("--site", help="Only this site's deltas.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete. Without this option it only lists what would go.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete a run's content for good: deltas, adapters, states. Digests and records stay.

    Of an unfinished run only one site's deltas of closed rounds (--site). Repeat one that was cut
    off.
    """
    from coordinator.runs import erasure
    from coordinator.runs.operating import operator, operator_ledger
    from gradualdiff.store import open_store

    ledger = operator_ledger(open_store(store, writable=True).objects, run, time.time)
    plan = erasure.read_erasure(ledger, number=number, site=site)
    if not as_json:
        _show(plan)
    record = None
    if yes:
        with on_record(ledger.store, store, "run.erase", f"{run} {plan.erased}", reason):
            record = erasure.erase(ledger, plan, reason, operator(), lambda _: None)
    _tell(plan, record, yes=yes, as_json=as_json)


def _tell(plan: Plan, record: PrunedRecord | None, *, yes: bool, as_json: bool) -> None:
    if as_json:
        print_json({"plan": plan, "bytes": plan.bytes, "deleted": yes and bool(plan.all)})
        return
    if record is not None:
        _say(f"Deleted {len(plan.objects)} objects; which, stands in {record.key(plan.run)}")
    if yes and plan.uploads:
        _say(f"Deleted {len(plan.uploads)} uploads; no record speaks of them")
    if plan.all and not yes:
        _say("Nothing was deleted. To delete them, repeat the command with --yes")


def _show(plan: Plan) -> None:
    from shared.topology import INBOX

    for line in plan.kept:
        _say(f"kept: {line}")
    if not plan.all:
        asked = f"erasing {plan.erased}" if plan.erased else f"--keep {plan.keep}"
        _say(f"run {plan.run}: {asked} leaves nothing to delete")
        return
    kinds: dict[tuple[int, str], list[int]] = {}
    for item in plan.all:
        kind = "delta" if "/deltas/" in item.key else "adapter"
        kind = "bases" if "/bases/" in item.key else kind
        kind = "upload" if item.key.startswith(INBOX) else kind
        kinds.setdefault((item.round, kind), []).append(item.size)
    rows = [
        (number, kind, len(sizes), megabytes(sum(sizes)))
        for (number, kind), sizes in sorted(kinds.items())
    ]
    print_table(f"To be deleted of {plan.run}", ("of round", "what", "objects", "MB"), rows)
    _say(f"{len(plan.all)} objects, {megabytes(plan.bytes)} MB. What is lost with them:")
    for line in plan.consequences or ("nothing: no round takes these uploads any more",):
        _say(f"- {line}")


def _say(line: str) -> None:
    console().print(line, markup=False, soft_wrap=True, highlight=False)
