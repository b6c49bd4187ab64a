"""Epsilon against held-out loss, for LoRA, its B alone (ffa), and cores: record-level privacy.

    python benchmarks/privacy_table.py [--records 4000] [--rounds 3] [--seeds 1]

A Llama of two layers with random weights over NF4 (the tests' tiny model) learns the form of short
notes at two sites, with the product's training, clipping, sampling, noise and accountant, and no
servers. Noise is chosen for epsilon over the whole run at delta = 1 / (10 n). The clip is the
median norm of an example's gradient at the first adapter, over held-out text that counts as public.
Without privacy: the same steps over batches of that size, not clipped by example and not noisy.
Prints a Markdown table; minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from participant.data import TokenisedExample
from participant.learner.evaluation import evaluate_held_out
from participant.learner.private_steps import PrivateSteps
from participant.learner.training import Beginning, RoundPlace, train_round
from participant.model import LocalModel, settle_threads
from participant.privacy import Mechanism, Secret, mechanism
from shared.config import BaseSection, LoraSection, PrivacySection, TrainingSection
from shared.methods.averaging import get_averaging
from shared.seeds import derive_seed
from tests.tiny_model import make_tiny_model

SITES, STEPS, BATCH, HELD_OUT = 2, 6, 32, 100
EPSILONS = (None, 8.0, 2.0)
KINDS = {  # adapter, averaging, learning rate
    "lora, rank 8": (LoraSection(rank=8, dropout=0.0), "fedavg", 0.02),
    "ffa, rank 8": (LoraSection(rank=8, dropout=0.0), "ffa", 0.02),
    "core, rank 16": (LoraSection(kind="core", rank=16, dropout=0.0), "fedavg", 0.05),
}
Values = dict[str, np.ndarray]


def main() -> None:
    """Run every kind at every epsilon, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    settle_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch) / "model")
        rows = []
        for kind, (lora, averaging, rate) in KINDS.items():
            base = BaseSection(model=str(folder), quantisation="nf4")
            trial = Trial(LocalModel(base, lora, torch.device("cpu")), averaging, rate, given)
            found = [trial.losses(epsilon) for epsilon in EPSILONS]
            rows.append((kind, trial, found))
            print(kind, found, file=sys.stderr, flush=True)
            steps = [trial.noise(epsilon) for epsilon in EPSILONS if epsilon]
    print(f"{SITES} sites of {given.records} records, {given.rounds} rounds of {STEPS} steps, ")
    print(f"expected batch {BATCH} (q = {steps[0].noise.rate:g}), delta {steps[0].delta:g}, ")
    print(f"{given.seeds} seed(s); {time.process_time() - began:.0f} s of CPU\n")
    print(
        "| | numbers | clip | before |", *("none |" if e is None else f"{e:g} |" for e in EPSILONS)
    )
    print("|---|---:|---:|---:|" + "---:|" * len(EPSILONS))
    print("| sigma | | | | |", *(f"{one.noise.multiplier:.3f} |" for one in steps))
    for kind, trial, found in rows:
        about = f"| {kind} | {trial.numbers:,} | {trial.clip:.3g} | {trial.before:.3f} |"
        print(about, *(f"{mean(one):.3f} |" for one in found))
        if given.seeds > 1:
            print(
                "| by seed | | | |", *(", ".join(f"{x:.3f}" for x in one) + " |" for one in found)
            )


class Trial:
    """One kind of adapter: held-out loss after a run, by epsilon."""

    def __init__(
        self, model: LocalModel, averaging: str, rate: float, given: argparse.Namespace
    ) -> None:
        self._model, self._given = model, given
        trained = get_averaging(averaging).trained_in(model.manifest(), 1).tensors
        self._only = [spec.name for spec in trained]
        self.numbers = sum(spec.elements for spec in trained)
        self._training = TrainingSection(
            local_steps=STEPS, batch_size=BATCH, learning_rate=rate, weight_decay=0.0
        )
        self._held_out = notes(model, "held-out", HELD_OUT)
        self.clip = self._median_norm()
        self.before = self._loss(self._first(1))

    def noise(self, epsilon: float) -> Mechanism:
        """What keeps a run within ``epsilon``."""
        privacy = PrivacySection(clip=self.clip, target_epsilon=epsilon)
        return mechanism(privacy, BATCH, self._given.records, STEPS, self._given.rounds)

    def losses(self, epsilon: float | None) -> list[float]:
        """Held-out loss after a run, nats per token, for each seed."""
        return [self._run(epsilon, seed) for seed in range(1, self._given.seeds + 1)]

    def _run(self, epsilon: float | None, seed: int) -> float:
        texts = [notes(self._model, f"site {n} {seed}", self._given.records) for n in range(SITES)]
        held = self._first(seed)
        for number in range(1, self._given.rounds + 1):
            changes = [self._train(held, texts[n], n, number, epsilon, seed) for n in range(SITES)]
            held = {
                name: value + sum(change[name] for change in changes) / np.float32(SITES)
                for name, value in held.items()
            }
        return self._loss(held)

    def _loss(self, held: Values) -> float:
        self._model.load_adapter(held.__getitem__)
        return evaluate_held_out(self._model, self._held_out, lambda: False, lambda _: None).nll

    def _train(
        self,
        held: Values,
        text: list[TokenisedExample],
        site: int,
        number: int,
        epsilon: float | None,
        seed: int,
    ) -> Values:
        private = None
        if epsilon is not None:  # no secret, so that the table can be printed again
            secret = Secret(bytes(32)).derive(site, number, seed)
            private = PrivateSteps(text, self.noise(epsilon), secret)
        rounds = self._given.rounds
        place = RoundPlace(f"site-{site}", number, seed, (number - 1) / rounds, number / rounds)
        self._model.load_adapter(held.__getitem__)
        train_round(
            self._model,
            text,
            self._training,
            place,
            begin=Beginning(only=self._only, private=private),
            should_stop=lambda: False,
            report=lambda _: None,
        )
        return {name: self._model.read(name) - value for name, value in held.items()}

    def _first(self, seed: int) -> Values:
        """The adapter that a run begins with."""
        drawn = np.random.Generator(np.random.Philox(derive_seed("first", seed)))
        return {
            spec.name: np.zeros(spec.shape, np.float32)
            if spec.init == "zeros"
            else drawn.uniform(-1, 1, spec.shape).astype(np.float32)
            / np.float32(spec.shape[1] ** 0.5)
            for spec in self._model.manifest().tensors
        }

    def _median_norm(self) -> float:
        self._model.load_adapter(self._first(1).__getitem__)
        norms = []
        with self._model.training(gradient_checkpointing=False, only=self._only):
            trained = [self._model.parameters[name] for name in self._only]
            for example in self._held_out:
                tokens = len(example.input_ids) - example.answer_start
                (self._model.answer_nll([example]) / tokens).backward()
                squares = [float(p.grad.square().sum()) for p in trained if p.grad is not None]
                norms.append(sum(squares) ** 0.5)
                for parameter in trained:
                    parameter.grad = None
        return median(norms)


def notes(model: LocalModel, whose: str, count: int) -> list[TokenisedExample]:
    """Different short notes, of which the form can be learnt and the rest is chance."""
    chance = random.Random(whose)
    made: dict[str, None] = {}
    while len(made) < count:
        ward = chance.choice(("north", "south", "east"))
        made[f"Bed {chance.randrange(10**6)}, {ward} ward: seen at {chance.randrange(24)} h"] = None
    rows = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in made]
    return [TokenisedExample(tuple(row), 4) for row in rows]


if __name__ == "__main__":
    main()
