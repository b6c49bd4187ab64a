"""``gradualdiff reproduce``: the paper's tables on a base model and text of one's own choice."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradualdiff.cli.output import JsonOption, console, print_json
from shared.disk.files import write_atomically
from shared.errors import (
    ConfigError,
    IntegrityError,
    InterruptedRunError,
    LedgerDamagedError,
    MissingPackageError,
    ObjectMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gradualdiff.embedded.display import Display
    from gradualdiff.reproduction.experiment import Findings
    from gradualdiff.reproduction.presets import Preset
    from gradualdiff.reproduction.running import Laboratory
    from gradualdiff.reproduction.tables import ResultTable

PACKAGED = "packaged:smollm2"
LIBRARIES = (
    "gradualdiff-fed",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "sacrebleu",
    "numpy",
)


def reproduce(
    preset: Annotated[str, typer.Option(help="cpu, paper, or a TOML file like theirs.")] = "cpu",
    model: Annotated[str | None, typer.Option(help="Another base: a path or a hub id.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text: a file with prompt and answer, or a folder of WordNet's files."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds, from 1.")] = 1,
    arms: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="iid, dirichlet(ALPHA), by-label or by-group, instead of the preset's."),
    ] = None,
    non_iid: Annotated[
        bool, typer.Option("--non-iid", help="Compare Dirichlet partitions of the preset's alphas.")
    ] = False,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where runs, measurements and results are kept.")
    ] = Path("reproduction"),
    as_json: JsonOption = False,
) -> None:
    """Run the paper's arms on the same text and steps, and write its tables beside ours.

    A run that was interrupted resumes where it was when the same command is given again.
    """
    from gradualdiff.cli.progress import make_display
    from gradualdiff.reproduction.arms import ARMS, check_arms
    from gradualdiff.reproduction.presets import changed, load_preset

    chosen = check_arms(tuple(arm.strip() for arm in arms.split(",")) if arms else tuple(ARMS))
    settings = changed(load_preset(preset), model, partition=partition)
    _require_packages()
    folder.mkdir(parents=True, exist_ok=True)
    _configure_log(folder)
    command = shlex.join(["gradualdiff", *sys.argv[1:]])
    with _say_how_to_go_on(folder, command), make_display(quiet=as_json) as display:
        results = _results(
            settings, data, [*range(1, seeds + 1)], chosen, folder, display, command, non_iid
        )
    if as_json:
        print_json(results)
        return
    typer.echo((folder / "results.md").read_text(encoding="utf-8"))
    names = ", ".join(str(folder / f"results.{kind}") for kind in ("md", "json", "csv"))
    console().print(f"written: {names}, {folder / 'figure-1.png'}", soft_wrap=True)
    console().print(f"next: gradualdiff runs list --store {folder / 'store'}", soft_wrap=True)


@contextlib.contextmanager
def _say_how_to_go_on(folder: Path, command: str) -> Iterator[None]:
    try:
        yield
    except InterruptedRunError as error:
        raise InterruptedRunError(
            f"{error}; what is done is saved. Resume it with: {command}"
        ) from None
    except (IntegrityError, LedgerDamagedError, ObjectMissingError) as error:
        raise type(error)(
            f"{error}. To train a run again, delete {folder}/store/runs/RUN, "
            f"{folder}/store/inbox/RUN and {folder}/runs/RUN, then give the same command"
        ) from None


def _results(
    preset: Preset,
    data: Path | None,
    seeds: Sequence[int],
    arms: tuple[str, ...],
    folder: Path,
    display: Display,
    command: str,
    non_iid: bool,
) -> dict[str, Any]:
    """Run what is missing, write the results, and return them."""
    from gradualdiff.cli.simulate import stop_on_signal
    from gradualdiff.reproduction.arms import check_plans
    from gradualdiff.reproduction.data import Source
    from gradualdiff.reproduction.experiment import Experiment
    from shared.disk.locks import held

    with held(folder / ".lock", f"the reproduction in {folder}"), stop_on_signal() as should_stop:
        source = Source.prepare(preset.reproduce, data, folder / "data")
        check_plans(preset, arms)
        for seed in seeds if non_iid else ():  # what cannot be dealt out is said before training
            for alpha in preset.reproduce.alphas:
                source.dealt(seed, alpha)
        _bind(folder, preset, source.digest)
        laboratory = _laboratory(preset, folder, display, should_stop)
        experiment = Experiment(laboratory, source.folder)
        for size in preset.reproduce.batch_sizes:
            experiment.run(arms, seeds, size)
        tables = _tables(experiment.findings, laboratory)
        results = _about(preset, source.digest, command, seeds) | _plain(experiment.findings)
        text = source.tables(seeds)
        _write(folder, results, [*tables, *text], experiment.findings)
        if non_iid:
            from gradualdiff.reproduction.non_iid import compare_partitions

            table, parts = compare_partitions(laboratory, source, seeds, experiment)
            tables.append(table)
            results["partitions"] = {f"{alpha:g}": _plain(found) for alpha, found in parts.items()}
            _write(folder, results, [*tables, *text], experiment.findings)
    return results


def _require_packages() -> None:
    """What only the end needs is missed at the beginning. Raises MissingPackageError."""
    missing = [name for name in ("sacrebleu", "matplotlib") if util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"reproduce: expected the package {missing[0]}, which is not installed; "
            "pip install 'gradualdiff-fed[participant,reproduce]'"
        )


def _laboratory(
    preset: Preset, folder: Path, display: Display, should_stop: Callable[[], bool]
) -> Laboratory:
    from gradualdiff.cli.demo import packaged_model
    from shared.stores.directory import DirectoryStore

    try:
        from gradualdiff.reproduction.running import Laboratory
        from participant.learner.model_pool import ModelPool
    except ImportError as error:
        raise MissingPackageError(
            f"training needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant,reproduce]'"
        ) from None
    if preset.base.model == PACKAGED:
        base = preset.base.model_copy(update={"model": str(packaged_model(display))})
        preset = preset.model_copy(update={"base": base})
    store = DirectoryStore(folder / "store")
    return Laboratory(folder, store, preset, display, should_stop, ModelPool())


def _bind(folder: Path, preset: Preset, data_digest: str) -> None:
    """One folder holds one reproduction: what is on file is of these settings and this text.

    Before a run or a measurement is there, as after a mistaken option, they may still change.
    """
    from gradualdiff.reproduction.kept import read_kept

    path = folder / "settings.json"
    mine = {"settings": preset.digest, "data": data_digest}
    begun = any(any((folder / name).glob("*")) for name in ("runs", "measured"))
    if not path.exists() or not begun:
        write_atomically(path, json.dumps(mine).encode())
        return
    theirs = read_kept(path)
    for name, digest in mine.items():
        if theirs.get(name) != digest:
            raise ConfigError(
                f"--dir {folder}: expected the {name} that it was begun with "
                f"({theirs.get(name, '')[:12]}), got others ({digest[:12]}); "
                "name another folder, or give the settings of before"
            )


def _tables(findings: Findings, laboratory: Laboratory) -> list[ResultTable]:
    from gradualdiff.reproduction.tables import make_tables

    preset = laboratory.preset
    threads = preset.training.cpu_threads
    with laboratory.pool.borrow(preset.base, preset.lora, threads) as model:
        return make_tables(findings, 2 * model.base_elements)


def _about(preset: Preset, data_digest: str, command: str, seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "seeds": list(seeds),
        "command": command,
        "settings": preset.model_dump(mode="json"),
        "settings_digest": preset.digest,
        "data_digest": data_digest,
        "versions": {name: _version(name) for name in LIBRARIES},
        "machine": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
    }


def _version(package: str) -> str:
    """bitsandbytes, for one, is only there where a base is quantised by it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _plain(findings: Findings) -> dict[str, Any]:
    return {
        "learning_rates": {key: asdict(one) for key, one in findings.rates.items()},
        "arms": [one.as_json() for one in findings.figures],
        "fedavg_differences": findings.differences,
        "diverged": findings.diverged,
    }


def _write(
    folder: Path, results: dict[str, Any], tables: list[ResultTable], findings: Findings
) -> None:
    from gradualdiff.reproduction.picture import draw_losses
    from gradualdiff.reproduction.tables import as_csv

    results["tables"] = [asdict(table) for table in tables]
    text = json.dumps(results, indent=1, sort_keys=True, default=str)
    write_atomically(folder / "results.json", text.encode())
    write_atomically(folder / "results.csv", as_csv(tables).encode())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    head = (
        f"# Reproduction\n\n`{results['command']}`\n\n"
        f"Settings {results['settings_digest'][:12]}, text {results['data_digest'][:12]}; "
        f"{versions}; {results['machine']['cpus']} processors. "
        f"Seeds: {', '.join(map(str, results['seeds']))}; of several: mean ± standard deviation "
        "(sample's, n - 1).\n"
    )
    body = "\n".join(table.markdown() for table in tables)
    write_atomically(folder / "results.md", f"{head}\n{body}".encode())
    draw_losses(findings.figures, folder / "figure-1.png")


def _configure_log(folder: Path) -> None:
    from shared.log import configure

    configure((folder / "reproduction.log").open("a", encoding="utf-8"), json=True)
