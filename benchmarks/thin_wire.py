"""How much of a run's gain is kept on a thin wire: codecs both ways and kinds of adapters.

    python benchmarks/thin_wire.py --dir thin [--start benchmarks/results/thin_wire.json]
    python benchmarks/thin_wire.py --dir thin --gather benchmarks/results/thin_wire.json
    python benchmarks/thin_wire_table.py benchmarks/results/thin_wire.json

SmolLM2-135M over NF4 and real dialogues, the demo's: three of its sites, 20 rounds of three AdamW
steps of two pairs, dropout 0. Each arm's learning rate is chosen with seed 1 by the loss on
held-out pairs after eight rounds (dev), climbing from a middle value by factors of two; a rate with
which that loss rises until round 20 is halved. What is reported is the loss after 20 rounds on
other held-out pairs (test). Bases of the gradient come from an embedded federation with
``averaging = "range-finder"``, one for each seed. ``other``: the loss on WordNet's definitions,
which no site has.

Each result is a file of its own in --dir and is not made twice. Several of these programs may work
on one --dir at a time, a core each; what a killed one was at begins anew. First all arms with seed
1, then the other seeds. ``--start`` takes what another machine made; ``--gather`` writes all there
is into one file.
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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

sys.path.insert(0, str(Path(__file__).parent))

from thin_wire_arms import ARMS, Case

from gradualdiff.tuning.arms import Arm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.tuning.trial import SiteText, Trial
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

    def bases(self, seed: int) -> tuple[Path, str]:
        """The file of bases of the sites' mean gradient, made once, and its name on record."""
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
        return Path(found["path"]), f"lora.bases=bases-{seed}#{found['sha']}"

    def path(self, arm: str, seed: int, rate: float) -> Path:
        """Where a result lies."""
        return self.root / "results" / f"{arm}-{seed}-{rate:.3g}.json"

    def read(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """A result; one of no rounds where there is none."""
        path = self.path(arm, seed, rate)
        empty = {"arm": arm, "seed": seed, "rate": rate, "rounds": 0, "dev": {}, "cpu": 0.0}
        return json.loads(path.read_text()) if path.exists() else empty

    def write(self, result: dict[str, Any]) -> None:
        """Whole or not at all."""
        path = self.path(result["arm"], result["seed"], result["rate"])
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)

    def gather(self, target: Path) -> None:
        """All there is, in one file."""
        paths = sorted((self.root / "results").glob("*.json"))
        rates = {
            name: json.loads(path.read_text())
            for name in ARMS
            if (path := self.root / f"rate-{name}.json").exists()
        }
        results = [json.loads(path.read_text()) for path in paths]
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = {"setting": SETS, "sites": SITES, "rates": rates, "results": results}
        target.write_text(json.dumps(whole, indent=1) + "\n")

    def start(self, source: Path) -> None:
        """Take what is there and is not here."""
        whole = json.loads(source.read_text())
        for result in whole["results"]:
            mine = self.read(result["arm"], result["seed"], result["rate"])
            if mine["rounds"] < result["rounds"] or result["arm"] == "base":
                self.write(result)
        for name, rate in whole["rates"].items():
            (self.root / f"rate-{name}.json").write_text(json.dumps(rate))


class Runner:
    """One arm and one seed: trials at several rates over one loaded model."""

    def __init__(self, folder: Folder, case: Case, seed: int) -> None:
        self._folder, self._case, self._seed = folder, case, seed
        self._trials: dict[float, Trial] = {}
        self._texts: list[SiteText] = []

    @cached_property
    def _pool(self) -> Any:
        from gradualdiff.embedded.sites import make_pool

        return make_pool("cpu", self._folder.settings.parent)

    def tuned(self) -> float:
        """The best rate after some rounds. Runs what is not known yet."""
        best, tried = self._case.rate, {}
        while True:
            for rate in (best, best / 2, best * 2):
                rounded = float(f"{rate:.3g}")
                if rounded not in tried:
                    tried[rounded] = self._dev(rounded)
            found = min(tried, key=tried.__getitem__)
            if found == best or len(tried) > 4:
                return found
            best = found

    def settled(self, rate: float) -> float:
        """``rate``, halved while the loss on dev rises in the later rounds."""
        while self._dev(rate, ROUNDS) > self._dev(rate, TUNED_AFTER):
            rate = float(f"{rate / 2:.3g}")
        return rate

    def _dev(self, rate: float, rounds: int = TUNED_AFTER) -> float:
        self.advance(rate, rounds)
        loss = self._read(rate)["dev"][str(rounds)]
        return float("inf") if loss is None else float(loss)

    def _read(self, rate: float) -> dict[str, Any]:
        return self._folder.read(self._case.arm.name, self._seed, rate)

    def advance(self, rate: float, rounds: int) -> None:
        """To so many rounds, unless it is there. None: the base's losses."""
        from gradualdiff.tuning.trial import Trial, read_texts
        from shared.errors import DivergedError

        result, case, folder = self._read(rate), self._case, self._folder
        if result["rounds"] >= rounds and (rounds or "test" in result):
            return
        bases, named = folder.bases(self._seed) if case.gradient else (None, "lora.bases=weights")
        config = case.arm.settings(folder.settings, rate, [*folder.sets(self._seed), named])
        with self._pool.borrow(config.base, config.lora, 1, bases) as model:
            self._texts = self._texts or read_texts(config, folder.settings.parent, model)
            trial = self._trials.get(rate)
            if trial is None:
                trial = Trial(config, case.arm, self._texts, model.manifest())
                result["cpu"] = 0.0
            self._trials[rate] = trial
            began = time.process_time()
            try:
                while trial.done < rounds:
                    trial.round(model, lambda: False)
                    if trial.done in {TUNED_AFTER, ROUNDS}:
                        result["dev"][str(trial.done)] = self._loss(trial, model, 0, DEV)
                if trial.done in {0, ROUNDS}:
                    result["test"] = self._loss(trial, model, DEV, DEV + TEST)
                    result["other"] = trial.loss(model, other_text(folder, model))
                result["rounds"] = trial.done
            except DivergedError as error:
                lost = {str(at): None for at in (TUNED_AFTER, ROUNDS)}
                result |= {"diverged": str(error), "rounds": ROUNDS, "dev": lost}
        result |= {
            "cpu": round(result["cpu"] + time.process_time() - began, 1),
            "up": trial.up,
            "down": trial.down,
            "values": trial.values,
        }
        folder.write(result)
        print(json.dumps(result), flush=True)

    def _loss(self, trial: Trial, model: LocalModel, begin: int, end: int) -> float:
        held_out = [one for text in self._texts for one in text.held_out[begin:end]]
        return trial.loss(model, held_out)


def other_text(folder: Folder, model: LocalModel) -> list[Any]:
    """WordNet's definitions as pairs."""
    from participant.data import load_site_data
    from shared.config import DataSection

    section = DataSection(path="other.jsonl", prompt="prompt", answer="answer")
    data = load_site_data(section, folder.root, model.tokenizer, 48, 48)
    return list(data.train[:OTHER])


def work(folder: Folder, names: list[str], seeds: list[int]) -> None:
    """Whatever is left to do and nobody else does."""
    folder.prepare()
    with folder.locked("base"):
        Runner(folder, Case(Arm("base", "the base model"), 3e-3), 1).advance(3e-3, 0)
    first = [(name, seed) for name in names for seed in seeds if seed == 1]
    for name, seed in [*first, *((name, seed) for name in names for seed in seeds if seed > 1)]:
        tuned = folder.root / f"rate-{name}.json"
        with folder.locked(f"task-{name}-{seed}", wait=False) as mine:
            if not mine:
                continue
            runner = Runner(folder, ARMS[name], seed)
            if seed == 1 and not tuned.exists():
                tuned.write_text(json.dumps(runner.settled(runner.tuned())))
            if tuned.exists():  # else whoever chooses the rate is not done yet
                runner.advance(json.loads(tuned.read_text()), ROUNDS)


def main() -> None:
    """Work, or gather what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("thin"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--start", type=Path, help="a gathered file to go on from")
    parser.add_argument("--gather", type=Path, help="write all results here, and do nothing else")
    given = parser.parse_args()
    folder = Folder(given.dir.resolve())
    if given.start:
        folder.start(given.start)
    if given.gather:
        folder.gather(given.gather)
        return
    work(folder, given.arms, given.seeds)


if __name__ == "__main__":
    main()
