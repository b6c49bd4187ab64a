"""What one bad site of five costs, without a defence and with each.

A tiny Llama with random weights learns made-up sentences at five sites, each with words of its own;
the last site trains as the others do and then sends something else: noise 100 times as large as its
delta, its delta with the sign turned, or one and the same value everywhere (ten times its delta's
norm). Each run is a whole federation through the product's own coordinator and participants. The
figure is the final adapter's held-out loss (nats per answer token) over the text of the four good
sites, which the undisturbed run of the same seed is measured on as well.

    python benchmarks/robust_rules.py [--seeds 1 2 3] [--rounds N] [--steps N] [--json FILE]

``--preset cpu`` has a real model instead: settings, WordNet text and its parts are those of
``gradualdiff reproduce --preset cpu``, a quarter of each part held out; ``--defences multi-krum``
runs that one and the undisturbed, undefended run it is measured against.

Prints Markdown tables by attack and defence, mean +- standard deviation over the seeds: the loss,
its ratio to the undisturbed, undefended run of its seed, and how much is kept of what that run
learnt. Takes about ten minutes on two idle cores for three seeds; ``--read`` prints the tables
again. Every run is verified; a finding ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny model is the tests'

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from participant.learner.model_pool import ModelPool
    from participant.learner.port import Learned, Learner, Progress, Readiness
    from shared.config import FederationConfig
    from shared.protocol.events import RoundStarted, RunAnnounced
    from shared.protocol.manifest import HeldOut, TensorSpec

    Rewrite = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.float32]]

SITES = ("a", "b", "c", "d", "e")
BAD = "e"
EXAMPLES = 48
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {"clip_to_median": "off"},
    "clipping (default)": {},
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean"},
    "multi-krum": {"rule": "multi-krum"},
}


def noise(delta: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    """A random direction, 100 times as long."""
    values = draw.standard_normal(delta.shape, dtype=np.float32)
    return values * np.float32(100 * np.linalg.norm(delta) / np.linalg.norm(values))


def flipped(delta: NDArray[np.float32], _: np.random.Generator) -> NDArray[np.float32]:
    """The other way."""
    return -delta


def constant(delta: NDArray[np.float32], _: np.random.Generator) -> NDArray[np.float32]:
    """One value everywhere, ten times as long."""
    return np.full_like(delta, 10 * np.linalg.norm(delta) / np.sqrt(delta.size))


ATTACKS: dict[str, Rewrite | None] = {
    "nobody is bad": None,
    "100x noise": noise,
    "sign flipped": flipped,
    "constant": constant,
}


class BadLearner:
    """Trains as ``learner`` does, then rewrites every tensor of the delta."""

    def __init__(self, learner: Learner, rewrite: Rewrite) -> None:
        self._learner = learner
        self._rewrite = rewrite

    def prepare(self, announced: RunAnnounced, report: Callable[[Progress], None]) -> Readiness:
        """As the honest one."""
        readiness = self._learner.prepare(announced, report)
        self._manifest = readiness.manifest
        return readiness

    def learn(self, task: RoundStarted, source: Path, *others: Any) -> Learned:
        """As the honest one, then the rewriting."""
        from participant.learner.port import DELTA_FILE
        from shared.tensors.delta_file import DeltaFile, write_delta

        learned = self._learner.learn(task, source, *others)
        path = others[1] / DELTA_FILE
        honest = path.rename(path.with_suffix(".honest"))
        draw = np.random.default_rng(task.seed % 2**32)
        with DeltaFile(honest, self._manifest) as delta:

            def values(spec: TensorSpec) -> NDArray[np.float32]:
                return self._rewrite(np.array(delta.read(spec)), draw)

            found = write_delta(path, self._manifest, task.codec, delta.header, values, task.seed)
        honest.unlink()
        return replace(learned, delta=found)

    def evaluate(
        self, run: str, source: Path, report: Callable[[Progress], None]
    ) -> HeldOut | None:
        """As the honest one."""
        return self._learner.evaluate(run, source, report)


def preset_text(folder: Path, name: str, seed: int) -> None:
    """The parts of a reproduction's text, one for each site."""
    from gradualdiff.reproduction.data import Source
    from gradualdiff.reproduction.presets import load_preset

    source = Source.prepare(load_preset(name).reproduce, None, folder / "source")
    for number, site in enumerate(SITES, start=1):
        lines = (source.folder(seed) / f"site-{number}.jsonl").read_text().strip().split("\n")
        rows = [{"q": row["prompt"], "a": row["answer"]} for row in map(json.loads, lines)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{site}.jsonl").write_text(text)


def preset_settings(
    name: str, preset: str, model: Path, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """What all runs of a preset have in common."""
    from gradualdiff.reproduction.presets import load_preset

    loaded = load_preset(preset)
    tables: dict[str, Any] = loaded.tables()
    tables["base"]["model"] = str(model)
    tables["run"] = {
        "name": name,
        "seed": seed,
        "rounds": options.rounds or loaded.reproduce.rounds,
        "participants": list(SITES),
    }
    tables["training"] |= {
        "local_steps": options.steps or loaded.reproduce.local_steps,
        "batch_size": loaded.reproduce.batch_sizes[0],
        "learning_rate": options.learning_rate,
    }
    return tables


def write_text(folder: Path, seed: int) -> None:
    """Each site's sentences: one grammar, with words that some sites use more than others."""
    animals = ["cat", "dog", "fox", "owl", "hen", "cow", "bee", "elk", "ant", "yak"]
    places = ["barn", "river", "field", "wood", "house", "tower"]
    colours = ["red", "blue", "green", "white", "black"]
    for number, site in enumerate(SITES):
        draw = random.Random(f"{seed}-{site}")
        liked = [4 if (i + number) % len(SITES) == 0 else 1 for i in range(len(animals))]
        rows = []
        for _ in range(EXAMPLES):
            (animal,) = draw.choices(animals, liked)
            place = draw.choice(places)
            colour = colours[(animals.index(animal) + places.index(place)) % len(colours)]
            rows.append({"q": f"{animal} {place}", "a": f"the {colour} {animal} is in the {place}"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{site}.jsonl").write_text(text)


def settings(name: str, model: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "run": {
            "name": name, "seed": seed, "rounds": options.rounds or 6, "participants": list(SITES),
        },
        "base": {"model": str(model), "quantisation": "none"},
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "codec": {"name": "fp32", "down": "whole"},  # what a rule does, and no rounding beside it
        "training": {
            "local_steps": options.steps or 12,
            "batch_size": 4,
            "learning_rate": options.learning_rate,
            "max_prompt_tokens": 48,
            "max_answer_tokens": 48,
            "cpu_threads": 1,
            "max_grad_norm": 1.0,
        },
    }  # fmt: skip


def run_one(
    config: FederationConfig, folder: Path, text: Path, pool: ModelPool, rewrite: Rewrite | None
) -> tuple[float, float]:
    """The final and the first adapter's loss over the good sites' text."""
    from coordinator.audit.verification import verify_run
    from coordinator.history import read_history
    from gradualdiff.embedded.federation import Embedding, run_embedded
    from participant.learner.torch_learner import TorchLearner
    from shared.config import DataSection
    from shared.protocol.ledger import Ledger
    from shared.protocol.manifest import pool_held_out
    from shared.stores.directory import DirectoryStore

    learners: dict[str, Learner] = {}
    for site in SITES:
        data = DataSection(path=f"{site}.jsonl", prompt="q", answer="a", held_out_fraction=0.25)
        learners[site] = TorchLearner(site, data, text, pool)
    if rewrite is not None:
        learners[BAD] = BadLearner(learners[BAD], rewrite)
    store = DirectoryStore(folder / "store")
    embedding = Embedding(store=store, folder=folder, report=lambda *_: None, moved=lambda _: None)
    run_embedded(config, learners, embedding)
    run, scratch = config.run.name, folder / "scratch"
    scratch.mkdir()
    found = verify_run(Ledger(store, run, "benchmark", time.time), scratch, lambda _: None)
    if found.findings:
        raise SystemExit(f"{run}: {found.findings}")
    history = read_history(store, run)
    losses = []
    for number in (config.run.rounds, 0):
        known = history.held_out(number)
        pooled = pool_held_out(loss for site, loss in known.items() if site != BAD)
        assert pooled is not None
        losses.append(pooled.nll)
    return losses[0], losses[1]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every attack under every defence for every seed."""
    from participant.learner.model_pool import ModelPool
    from shared.config import FederationConfig, parse
    from shared.log import configure

    configure(level="error")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        model, pool = _model(top, options), ModelPool("cpu")
        for seed in options.seeds:
            text = top / f"text-{seed}"
            text.mkdir()
            if options.preset:
                preset_text(text, options.preset, seed)
            else:
                write_text(text, seed)
            for attack, rewrite in ATTACKS.items():
                for defence, aggregation in DEFENCES.items():
                    reference = rewrite is None and defence == "none"
                    wanted = attack in options.attacks and defence in options.defences
                    if not reference and not wanted:
                        continue
                    label = f"s{seed}-{len(found)}"
                    if options.preset:
                        values = preset_settings(label, options.preset, model, seed, options)
                    else:
                        values = settings(label, model, seed, options)
                    config = parse(FederationConfig, {**values, "aggregation": aggregation}, label)
                    began = time.monotonic()
                    nll, before = run_one(config, top / label, text, pool, rewrite)
                    row = {
                        "seed": seed, "attack": attack, "defence": defence, "nll": nll,
                        "untrained": before, "seconds": round(time.monotonic() - began, 1),
                    }  # fmt: skip
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    found.append(row)
                    shutil.rmtree(top / label)  # a real model's run is gigabytes
    return found


def _model(top: Path, options: argparse.Namespace) -> Path:
    if not options.preset:
        from tests.tiny_model import make_tiny_model

        return make_tiny_model(top / "model")
    from gradualdiff.cli.demo import packaged_model
    from gradualdiff.cli.progress import make_display

    with make_display(quiet=True) as display:
        return packaged_model(display)


def compared(found: list[dict[str, Any]], figure: str) -> dict[tuple[str, str], list[float]]:
    """By attack and defence one value a seed.

    ``loss``: nats. ``ratio``: to the undisturbed, undefended run of the seed. ``gain``: how much of
    what that run learnt is kept, 1 for all of it, below 0 where the loss rose.
    """
    clean = {
        row["seed"]: row["nll"]
        for row in found
        if row["defence"] == "none" and ATTACKS[row["attack"]] is None
    }
    values: dict[tuple[str, str], list[float]] = {}
    for row in found:
        best, before, loss = clean[row["seed"]], row["untrained"], row["nll"]
        value = {"loss": loss, "ratio": loss / best, "gain": (before - loss) / (before - best)}
        values.setdefault((row["attack"], row["defence"]), []).append(value[figure])
    return values


def table(found: list[dict[str, Any]], figure: str, digits: int = 4) -> list[str]:
    """Attacks as rows, defences as columns: mean +- standard deviation over the seeds."""
    values = compared(found, figure)
    defences = [one for one in DEFENCES if any(defence == one for _, defence in values)]
    lines = [
        "| " + " | ".join(["the bad site sends", *defences]) + " |",
        "|---|" + "---:|" * len(defences),
    ]
    for attack in dict.fromkeys(attack for attack, _ in values):
        cells = []
        for defence in defences:
            here = values.get((attack, defence))
            if here is None:
                cells.append("not run")
                continue
            spread = f" ± {statistics.stdev(here):.{digits}f}" if len(here) > 1 else ""
            cells.append(f"{statistics.mean(here):.{digits}f}{spread}")
        lines.append("| " + " | ".join([attack, *cells]) + " |")
    return lines


def main() -> None:
    """Run all, or read what was run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, help="6, or the preset's")
    parser.add_argument("--steps", type=int, help="in a round; 12, or the preset's")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--preset", help="a preset of `gradualdiff reproduce`, as cpu")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=[*DEFENCES])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[*ATTACKS])
    parser.add_argument("--json", type=Path, help="write the figures of every run here")
    parser.add_argument("--read", type=Path, help="run nothing: tables of such a file")
    options = parser.parse_args()
    found = json.loads(options.read.read_text()) if options.read else measure(options)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    before = statistics.mean(row["untrained"] for row in found)
    print(f"held-out loss; {before:.4f} before training\n")
    print("\n".join(table(found, "loss")), "\n")
    print("ratio to the run in which nobody is bad, without a defence\n")
    print("\n".join(table(found, "ratio")), "\n")
    print("share that is kept of what that run learnt\n")
    print("\n".join(table(found, "gain", 2)))


if __name__ == "__main__":
    main()
