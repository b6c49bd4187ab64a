"""A learner without torch: small tensors pulled toward a number that is the site's own.

Deterministic, exact and fast; the protocol cannot tell it from the real one. ``fault`` is asked
before each training and may raise or return a function that spoils the delta's values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from participant.learner.port import DELTA_FILE, Learned, Progress, Readiness
from shared.adapters import kind_of
from shared.config import AcceptSection, LoraSection
from shared.errors import InterruptedRunError
from shared.methods.averaging import get_averaging
from shared.protocol.manifest import (
    BasesFound,
    HeldOut,
    LocalMetrics,
    Manifest,
    Numerics,
    TensorSpec,
)
from shared.seeds import derive_seed
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable


def manifest_of(width: int) -> Manifest:
    """Two tensors of 4 x ``width`` and 4 x 8 numbers."""
    return Manifest(
        tensors=(
            TensorSpec(name="layer.lora_A.weight", shape=(4, width), init="kaiming_uniform"),
            TensorSpec(name="layer.lora_B.weight", shape=(8, 4), init="zeros"),
        ),
        target_modules=("layer",),
    )


MANIFEST = manifest_of(8)
CORE = Manifest(
    tensors=(TensorSpec(name="layer.lora_R.weight", shape=(8, 8), init="zeros"),),
    target_modules=("layer",),
    kind="core",
)
BASES = BasesFound(sha="b" * 64, least=0.5, median=0.5, most=0.5)  # of the weights, with CORE
NUMERICS = Numerics(
    versions={"numpy": "any"},
    device="cpu",
    cpu_capability="any",
    cpu_threads=1,
    compute_dtype="float32",
)


# What a site accepts in a test that is not about what it accepts: one step of one example is fine.
ANYTHING = AcceptSection(
    models=("m", "none"),
    flora=True,
    gradients=True,
    min_steps=1,
    min_examples=1,
    min_batch=1,
    min_answer_tokens=1,
    min_held_out=1,
)


def full_gradient(site, layer, shape):
    """What a site's text says of a layer: most of it all sites', some its own. Spectrum 1 / i."""

    def orthogonal(width, *parts):
        generator = np.random.Generator(np.random.Philox(derive_seed("gradient", layer, *parts)))
        return np.linalg.qr(generator.standard_normal((width, min(shape))))[0]

    found = 0
    for part, whose in ((1.0, "all"), (0.2, site)):
        left, right = orthogonal(shape[0], whose, "left"), orthogonal(shape[1], whose, "right")
        found = found + part * (left / np.arange(1, min(shape) + 1)) @ right.T
    return found


@dataclass
class NumpyLearner:
    """Implements the ``Learner`` port. ``trained``: the rounds it trained, in order.

    ``cores``: the runs it got ready for whose adapters are of the kind ``core``.
    """

    site: str
    examples: int = 10
    fingerprint: str = "f" * 64
    numerics: Numerics = NUMERICS
    manifest: Manifest = MANIFEST
    fault: Callable[[object], object] = lambda task: None
    trained: list[int] = field(default_factory=list)
    prepared: set[str] = field(default_factory=set)
    cores: set[str] = field(default_factory=set)
    gradient: Callable[[str, tuple[int, int]], object] | None = None

    @property
    def rank(self):
        side_of = kind_of(self.manifest).side
        return next(s.shape[0] for s in self.manifest.tensors if side_of(s.name) == "right")

    def manifest_in(self, run):
        return CORE if run in self.cores else self.manifest

    def prepare(self, announced, report):
        report(Progress("load", 1, 1))
        self.prepared.add(announced.run)
        if announced.lora.kind == "core":
            self.cores.add(announced.run)
            return Readiness(CORE, self.fingerprint, self.numerics, self.examples, bases=BASES)
        rank = announced.lora.rank
        own = LoraSection(rank=rank, ranks={self.site: rank})
        if rank < self.rank:
            self.manifest = kind_of(own).manifest_for(self.manifest, own, self.site)
        return Readiness(self.manifest, self.fingerprint, self.numerics, self.examples)

    def learn(self, task, source, state, folder, should_stop, report, checkpoints, feedback=None):
        assert task.run in self.prepared
        spoil = self.fault(task)
        if should_stop():
            raise InterruptedRunError("stopped")
        header = DeltaHeader.of(
            task.codec,
            run=task.run,
            number=task.round,
            site=self.site,
            source_sha=task.source_sha,
        )
        target = np.float32(derive_seed("target", self.site) % 1000 / 1000)
        with TensorFile(source) as adapter:

            def read(name):
                if task.run in self.cores:
                    return adapter.read(name)
                return kind_of(self.manifest).leading(name, adapter.read(name), self.rank)

            mode = get_averaging(task.averaging)
            manifest = mode.trained_in(self.manifest_in(task.run), task.round)

            def values(spec):
                noise = np.random.Generator(
                    np.random.Philox(derive_seed(task.seed, self.site, spec.name))
                ).standard_normal(spec.shape, dtype=np.float32)
                delta = (target - read(spec.name)) * np.float32(0.5) + noise / 64
                if mode.makes_bases:
                    delta = self.gradient_of(spec.name, read)
                return spoil(spec, delta) if spoil else delta

            delta = write_delta(
                folder / DELTA_FILE,
                manifest,
                task.codec,
                header,
                values,
                task.seed,
                feedback,
                packed=task.packed,
            )
        report(Progress("train", 1, 1, 1.0))
        self.trained.append(task.round)
        metrics = LocalMetrics(
            steps=1,
            train_nll=1.0,
            first_step_nll=1.0,
            last_step_nll=1.0,
            mean_grad_norm=1.0,
            held_out=None if mode.makes_bases else self.evaluate(task.run, source, report),
            seconds={"train": 0.0},
        )
        return Learned(delta, self.examples, self.examples * 7, metrics, "fresh")

    def gradient_of(self, name, read):
        """Of one factor, the other one being what ``read`` gives: G A^T or B^T G."""
        kind = kind_of(self.manifest)
        layer = next(one for one in kind.layers(self.manifest) if one.name == kind.layer_of(name))
        shape = layer.left.shape[0], layer.right.shape[1]
        make = self.gradient or (lambda name, shape: full_gradient(self.site, name, shape))
        whole = make(layer.name, shape)
        if name == layer.left.name:
            return (whole @ read(layer.right.name).T).astype(np.float32)
        return (read(layer.left.name).T @ whole).astype(np.float32)

    def evaluate(self, run, source, report):
        assert run in self.prepared
        target = derive_seed("target", self.site) % 1000 / 1000
        with TensorFile(source) as adapter:
            specs = self.manifest_in(run).tensors
            gaps = [np.mean((adapter.read(s.name) - target) ** 2) for s in specs]
        return HeldOut(nll=float(np.mean(gaps)), tokens=self.examples, examples=1)
