"""How much of a run's gain is kept on a thin wire: codecs both ways and kinds of adapters.

    python benchmarks/thin_wire.py --dir thin [--jobs 2] [--arms ...] [--seeds 1 2 3]
    python benchmarks/thin_wire.py --dir thin --table
    python benchmarks/thin_wire.py --dir thin --gather benchmarks/results/thin_wire.json

SmolLM2-135M over NF4 and real dialogues, the demo's: three of its sites, 20 rounds of three AdamW
steps of two pairs. Each arm's learning rate is chosen with seed 1 by the loss on held-out pairs
after eight rounds (dev), climbing from a middle value by factors of two; what is reported is the
loss after 20 rounds on other held-out pairs (test). Bases of the gradient come from an embedded
federation with ``averaging = "range-finder"``, one for each seed. ``other``: the loss on WordNet's
definitions, which no site has: what a model forgets.

Each result is a file of its own, ARM-SEED-RATE.json, and is not made twice; ``--start`` takes those
of a gathered file as made. Any number of these programs may work on one --dir at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from gradualdiff.tuning.arms import Arm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.tuning.trial import SiteText
    from participant.model import LocalModel

SITES, ROUNDS, TUNED_AFTER = 3, 20, 8
BASES_RANK, BASES_STEPS = 72, 16
DEV, TEST, OTHER = 32, 64, 96  # examples: of each site, of each site, in all
SETS = [
    f"run.rounds={ROUNDS}",
    "lora.dropout=0",
    "training.local_steps=3",
    "training.batch_size=2",
    "training.max_prompt_tokens=32",
    "training.max_answer_tokens=32",
    "training.cpu_threads=1",
]
THIN: dict[str, Any] = {"up": "int4", "down": "int4", "feedback": True}


@dataclass(frozen=True)
class Case:
    """An arm and where its search for a rate begins. ``gradient``: bases of the mean gradient."""

    arm: Arm
    rate: float
    gradient: bool = False


def core(rank: int, bases: str, rate: float, **ways: Any) -> Case:
    """R's of this rank, 4 bits both ways unless said."""
    sets = ("lora.kind=core", f"lora.rank={rank}", "training.weight_decay=0")
    name = f"core-{rank}-{bases}" + ways.pop("named", "")
    return Case(Arm(name, sets=sets, **{**THIN, **ways}), rate, gradient=bases == "gradient")


IA3 = ("lora.kind=ia3", "training.weight_decay=0")
CASES = [
    Case(Arm("fp32", "fp32", None), 3e-3),
    Case(Arm("int4", **THIN), 3e-3),
    core(15, "gradient", 6e-3),
    core(64, "gradient", 3e-3),
    Case(Arm("sign", "sign", "int4", feedback=True), 3e-3),
    Case(Arm("topk", "topk", "int4", feedback=True), 3e-3),
    Case(Arm("int8", "int8", "int8"), 3e-3),
    core(32, "gradient", 3e-3),
    Case(Arm("ia3-int8", "int8", "int8", sets=IA3), 1e-2),
    core(64, "weights", 1e-2),
    core(32, "weights", 1e-2),
    Case(Arm("ia3-int4", sets=IA3, **THIN), 1e-2),
    core(16, "weights", 1e-2),
    core(16, "gradient", 6e-3),
]
ARMS = {case.arm.name: case for case in CASES}


class Folder:
    """Settings, text, bases and results of one experiment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / "demo" / "federation.toml"

    def prepare(self) -> None:
        """The demo's model and text, and sites that hold more of it out."""
        with self.locked("prepare"):
            if (self.root / "ready").exists():
                return
            if not self.settings.exists():
                command = [sys.executable, "-m", "gradualdiff.cli.main", "demo", "--prepare"]
                subprocess.run([*command, "--dir", str(self.settings.parent)], check=True)
            for path in (self.root / "demo" / "sites").glob("site-*.toml"):
                text = path.read_text()
                path.write_text(text.replace("max_held_out = 13", f"max_held_out = {DEV + TEST}"))
            self._write_other()
            (self.root / "ready").touch()

    def _write_other(self) -> None:
        from gradualdiff.reproduction.questions import write_examples
        from gradualdiff.reproduction.wordnet import load_questions

        questions = sorted(load_questions().questions, key=lambda one: one.key)
        step = len(questions) // (2 * OTHER)
        write_examples(self.root / "other.jsonl", questions[::step])

    @contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Nobody else does this meanwhile; False where somebody does and ``wait`` is not."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def sets(self, seed: int) -> list[str]:
        """Beside an arm's own: those of all."""
        names = [f"site-{number + 1}" for number in range(SITES)]
        files = [f"sites/{name}.toml" for name in names]
        told = [f"run.participants={json.dumps(names)}", f"simulation.sites={json.dumps(files)}"]
        return [*told, *SETS, f"run.seed={seed}"]

    def bases(self, seed: int) -> Path:
        """The file of bases of the sites' mean gradient, made once."""
        from gradualdiff.simulation import load_config, simulate
        from shared import topology

        marker = self.root / f"bases-{seed}.json"
        with self.locked(f"bases-{seed}"):
            if not marker.exists():
                own = [
                    f"run.name=bases-{seed}",
                    "run.rounds=2",
                    "aggregation.averaging=range-finder",
                    "codec.name=int8",
                    f"lora.rank={BASES_RANK}",
                    f"training.local_steps={BASES_STEPS}",
                ]
                config = load_config(self.settings, [*self.sets(seed), *own])
                run = simulate(config, self.settings.parent)
                sha = run.summary.adapter_sha
                assert sha is not None  # it is finished
                path = run.path / topology.adapter_key(run.name, sha)
                marker.write_text(json.dumps({"path": str(path), "sha": sha}))
        found: dict[str, str] = json.loads(marker.read_text())
        return Path(found["path"])

    def result(self, name: str, seed: int, rate: float) -> Path:
        """Where it lies."""
        return self.root / "results" / f"{name}-{seed}-{rate:.3g}.json"

    def results(self) -> list[dict[str, Any]]:
        """All there are."""
        paths = sorted((self.root / "results").glob("*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def write(self, result: dict[str, Any]) -> None:
        """Whole or not at all."""
        path = self.result(result["arm"], result["seed"], result["rate"])
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)


class Runner:
    """One arm and one seed: trials at several rates over one loaded model."""

    def __init__(self, folder: Folder, case: Case, seed: int) -> None:
        self._folder, self._case, self._seed = folder, case, seed
        self._trials: dict[float, tuple[Any, dict[str, Any]]] = {}

    def tuned(self) -> float:
        """The best rate after some rounds. Runs what is not known yet."""
        factor, tried = 2.0, {}
        best = self._case.rate
        while True:
            for rate in (best, best / factor, best * factor):
                rate = float(f"{rate:.3g}")
                if rate not in tried:
                    tried[rate] = self._dev(rate)
            found = min(tried, key=tried.__getitem__)
            if found == best or len(tried) > 4:
                return found
            best = found

    def _dev(self, rate: float) -> float:
        path = self._folder.result(self._case.arm.name, self._seed, rate)
        if not path.exists():
            self._advance(rate, TUNED_AFTER)
        return float(json.loads(path.read_text())["dev"][str(TUNED_AFTER)] or 99)

    def finish(self, rate: float) -> None:
        """To the last round, unless it is there."""
        path = self._folder.result(self._case.arm.name, self._seed, rate)
        if not path.exists() or json.loads(path.read_text())["rounds"] < ROUNDS:
            self._advance(rate, ROUNDS)

    def _advance(self, rate: float, rounds: int) -> None:
        from gradualdiff.embedded.sites import make_pool
        from gradualdiff.tuning.trial import Trial, read_texts
        from shared.errors import DivergedError

        case, seed, folder = self._case, self._seed, self._folder
        bases = folder.bases(seed) if case.gradient else None
        more = folder.sets(seed)
        if bases is not None:
            more.append(f"lora.bases=bases#{'0' * 64}")
        config = case.arm.settings(folder.settings, rate, more)
        if not hasattr(self, "_pool"):
            self._pool = make_pool("cpu", folder.settings.parent)
        with self._pool.borrow(config.base, config.lora, 1, bases) as model:
            if not hasattr(self, "_texts"):
                self._texts = read_texts(config, folder.settings.parent, model)
                self._other = other_text(folder, model)
            trial, result = self._trials.get(rate) or (
                Trial(config, case.arm, self._texts),
                {"arm": case.arm.name, "seed": seed, "rate": rate, "dev": {}, "cpu": 0.0},
            )
            began = time.process_time()
            try:
                while trial.done < rounds:
                    trial.round(model, lambda: False)
                    if trial.done in {TUNED_AFTER, ROUNDS}:
                        result["dev"][str(trial.done)] = self._loss(trial, model, 0, DEV)
                if trial.done == ROUNDS:
                    result["test"] = self._loss(trial, model, DEV, DEV + TEST)
                    result["other"] = trial.loss(model, self._other)
            except DivergedError as error:
                result["diverged"] = str(error)
                result["dev"] |= {str(at): None for at in (TUNED_AFTER, ROUNDS)}
        result["cpu"] = round(result["cpu"] + time.process_time() - began, 1)
        result |= {
            "rounds": trial.done if "diverged" not in result else ROUNDS,
            "up": sum(trial.up) / max(len(trial.up), 1),
            "down": sum(trial.down) / max(len(trial.down), 1),
            "values": sum(spec.elements for spec in model.manifest().tensors),
        }
        self._trials[rate] = trial, result
        folder.write(result)
        print(json.dumps(result), flush=True)

    def _loss(self, trial: Any, model: LocalModel, begin: int, end: int) -> float:
        texts: list[SiteText] = self._texts
        return float(trial.loss(model, [one for text in texts for one in text.held_out[begin:end]]))


def other_text(folder: Folder, model: LocalModel) -> list[Any]:
    """WordNet's definitions as pairs."""
    from participant.data import load_site_data
    from shared.config import DataSection

    section = DataSection(
        path=str(folder.root.resolve() / "other.jsonl"), prompt="prompt", answer="answer"
    )
    data = load_site_data(section, folder.root, model.tokenizer, 48, 48)
    return list(data.train[:OTHER])


def base(folder: Folder) -> None:
    """What the base model's losses are."""
    case = replace(CASES[0], arm=replace(CASES[0].arm, name="base"))
    if folder.result("base", 1, case.rate).exists():
        return
    runner = Runner(folder, case, 1)
    from gradualdiff.embedded.sites import make_pool
    from gradualdiff.tuning.trial import Trial, read_texts

    config = case.arm.settings(folder.settings, case.rate, folder.sets(1))
    with make_pool("cpu", folder.settings.parent).borrow(config.base, config.lora, 1) as model:
        runner._texts = read_texts(config, folder.settings.parent, model)
        trial = Trial(config, case.arm, runner._texts)
        loss = partial(runner._loss, trial, model)
        result = {"arm": "base", "seed": 1, "rate": case.rate, "rounds": 0}
        result |= {"dev": {"0": loss(0, DEV)}, "test": loss(DEV, DEV + TEST)}
        result["other"] = trial.loss(model, other_text(folder, model))
    folder.write(result)


def work(folder: Folder, names: list[str], seeds: list[int]) -> None:
    """Whatever is left to do and nobody else does: all arms with the first seed, then the others."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder.prepare()
    with folder.locked("base"):
        base(folder)
    for seed in seeds:
        for name in names:
            case = ARMS[name]
            tuned = folder.root / f"rate-{name}.json"
            with folder.locked(f"task-{name}-{seed}", wait=False) as mine:
                if not mine:
                    continue
                runner = Runner(folder, case, seed)
                if seed == 1:
                    rate = runner.tuned()
                    tuned.write_text(json.dumps(rate))
                elif not tuned.exists():
                    continue  # whoever chooses the rate is not done yet
                runner.finish(json.loads(tuned.read_text()))


def main() -> None:
    """Work, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("thin"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    folder = Folder(given.dir.resolve())
    if given.jobs > 1:
        command = [sys.executable, __file__, "--dir", str(given.dir), "--arms", *given.arms]
        command += ["--seeds", *map(str, given.seeds)]
        workers = [subprocess.Popen(command) for _ in range(given.jobs)]
        for worker in workers:
            worker.wait()
        return
    work(folder, given.arms, given.seeds)


if __name__ == "__main__":
    main()
