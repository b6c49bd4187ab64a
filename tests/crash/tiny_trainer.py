"""A trainer in a few lines of torch: a low-rank correction of a linear map, AdamW kept by round.

Deterministic in site, round and seed. Each step is a line in ``steps.txt`` beside the site's file,
so that a test can count what was really trained. One fault may be ordered, which happens once in a
site's life: ``failed`` (the first training raises), ``declined`` (the first preparation finds the
wrong model), ``unfit`` (it finds another model than the other site has), ``spoilt`` (the first
upload sends other bytes than were announced). Or one that lasts: ``undrawn`` (the site draws
another first adapter than the coordinator), ``kept`` (an audit blocks each delta), and ``late`` at
both sites: a's first round ends when a
has heard that it closed, and its second when the first delta may go; b's second never does.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING

import torch

from gradualdiff.cli.serve import make_context, stopped_by_signal
from participant import fetching
from participant.audit.report import AuditReport
from participant.checkpoints import Tensors, TrainingProgress
from participant.daemon import serve
from participant.learner.optimizer_state import load_optimizer, save_optimizer
from participant.learner.port import DELTA_FILE, STATE_FILE, Learned, Progress, Readiness
from participant.privacy import Spend
from shared.config import load_site
from shared.errors import InterruptedRunError, ModelError
from shared.log import configure
from shared.protocol.manifest import AuditFigures, HeldOut, LocalMetrics
from shared.protocol.privacy import PrivacySpent
from shared.seeds import derive_seed
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorFile, TensorLayout, write_tensors
from tests.numpy_learner import MANIFEST, NUMERICS

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 3
EXAMPLES = 16
# Site and round of who is late, and the point in its trace that it waits for, if any.
LATE = {
    ("a", 1): "acknowledge.after:RoundClosed",
    ("a", 2): "acknowledge.after:UploadGranted",
    ("b", 2): None,
}
KEPT = AuditReport(figures=AuditFigures(verdict="blocked", gate=True, hits=3, records=16))


class TinyTrainer:
    """The ``Learner`` port for ``site``; ``folder`` is where it keeps ``steps.txt`` and faults.

    ``trace``: where its process writes every point that it reaches.
    """

    def __init__(self, site: str, folder: Path, fault: str = "", trace: Path | None = None) -> None:
        self._site = site
        self._folder = folder
        self._fault = fault
        self._trace = trace

    def take_budget(self, budget):
        self._budget = budget

    def prepare(self, announced, report):
        report(Progress("load", 1, 1))
        if self.strikes("declined"):
            raise ModelError("base.model: expected the run's, got another; give it the same files")
        base = "e" if self.strikes("unfit") else "f"
        return Readiness(MANIFEST, base * 64, NUMERICS, EXAMPLES)

    def learn(self, task, source, state, folder, should_stop, report, checkpoints, feedback=None):
        if self.strikes("failed"):
            raise RuntimeError("the first training fails, as was ordered")
        if self._fault == "late":
            self._wait(task.round, should_stop)
        privacy = self._paid(task) if task.privacy is not None else None
        torch.set_num_threads(1)
        before = _read(source)
        factors = {name: torch.nn.Parameter(value.clone()) for name, value in before.items()}
        optimizer = torch.optim.AdamW(factors.values(), lr=0.05)
        losses = self._resumed(checkpoints, factors, optimizer, state)
        draw = torch.Generator().manual_seed(derive_seed(task.seed, self._site) % 2**63)
        inputs = [torch.randn((EXAMPLES, 8), generator=draw) for _ in range(STEPS)]
        for step in range(len(losses), STEPS):
            loss = self._loss(factors, inputs[step])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            self._say(f"{task.round} {step}")
            report(Progress("train", step + 1, STEPS, losses[-1]))
            if checkpoints.due():
                self._keep(checkpoints, factors, optimizer, losses)
        header = DeltaHeader.of(
            task.codec,
            run=task.run,
            number=task.round,
            site=self._site,
            source_sha=task.source_sha,
        )

        def change(spec):
            return (factors[spec.name].detach() - before[spec.name]).numpy()

        path = folder / DELTA_FILE
        delta = write_delta(
            path, MANIFEST, task.codec, header, change, task.seed, feedback, packed=task.packed
        )
        save_optimizer(optimizer, factors, folder / STATE_FILE)
        metrics = LocalMetrics(
            steps=STEPS,
            train_nll=sum(losses) / STEPS,
            first_step_nll=losses[0],
            last_step_nll=losses[-1],
            mean_grad_norm=1.0,
            held_out=self.evaluate(task.run, source, report),
            seconds={"train": 0.0},
        )
        known = "fresh" if state is None else "kept"
        audit = KEPT if self._fault == "kept" else None
        return Learned(delta, EXAMPLES, EXAMPLES * 7, metrics, known, privacy=privacy, audit=audit)

    def _paid(self, task):
        """What a private round costs; the noise itself is left out, for it is each site's own."""
        training = hashlib.sha256(f"{task.run} {task.round} {task.source_sha}".encode()).hexdigest()
        spend = Spend(
            run=task.run,
            round=task.round,
            training=training,
            text="d" * 64,
            rate=0.5,
            multiplier=task.privacy.noise_multiplier,
            steps=STEPS,
        )
        _, spent = self._budget.charge(spend, ["e" * 64], 1e-3, begun=task.round > 1)
        assert spent.steps == task.round * STEPS  # none forgotten, none paid for twice
        return PrivacySpent(
            epsilon=spent.run,
            total_epsilon=spent.total,
            delta=1e-3,
            steps=spent.steps,
            rate=0.5,
            clip=task.privacy.clip,
            noise_multiplier=task.privacy.noise_multiplier,
        )

    def _wait(self, number, should_stop):
        assert self._trace is not None  # who is late has one
        key = (self._site, number)
        while key in LATE and not (LATE[key] and LATE[key] in self._trace.read_text()):
            if should_stop():
                raise InterruptedRunError("stopped")
            time.sleep(0.01)

    def _resumed(self, checkpoints, factors, optimizer, state):
        """Adapter and optimiser as the newest checkpoint has them; the losses up to there."""
        found = checkpoints.newest("0" * 64)
        if found is None:
            if state is not None:
                load_optimizer(optimizer, factors, state)
            return []
        for name, value in _read(found.adapter).items():
            factors[name].data.copy_(value)
        load_optimizer(optimizer, factors, found.optimizer)
        return list(found.progress.nll)

    def _keep(self, checkpoints, factors, optimizer, losses):
        layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in MANIFEST.tensors]

        def write_adapter(path):
            values = (factors[spec.name].detach().numpy() for spec in MANIFEST.tensors)
            return write_tensors(path, layouts, values, ADAPTER_METADATA)

        count = len(losses)
        progress = TrainingProgress(
            step=count, nll=tuple(losses), tokens=(1,) * count, norms=(1.0,) * count
        )
        writers = Tensors(write_adapter, lambda path: save_optimizer(optimizer, factors, path))
        assert checkpoints.save(progress, writers)

    def evaluate(self, run, source, report):
        inputs = torch.randn((EXAMPLES, 8), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            loss = self._loss(_read(source), inputs).item()
        return HeldOut(nll=loss, tokens=EXAMPLES, examples=1)

    def strikes(self, fault: str) -> bool:
        """Whether the ordered fault is this one and has not happened yet; now it has."""
        if fault != self._fault:
            return False
        mark = self._folder / f"{fault}.happened"
        happened = mark.exists()
        mark.touch()
        return not happened

    def _loss(self, factors, inputs):
        draw = torch.Generator().manual_seed(derive_seed("target", self._site) % 2**63)
        target = torch.randn((8, 8), generator=draw)
        made = inputs @ factors["layer.lora_A.weight"].T @ factors["layer.lora_B.weight"].T
        return (made - inputs @ target).square().mean()

    def _say(self, line: str) -> None:
        handle = os.open(self._folder / "steps.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)


class SpoilingTransfer:
    """A ``Transfer`` whose first upload sends other bytes, if that was ordered."""

    def __init__(self, transfer, trainer: TinyTrainer) -> None:
        self._transfer = transfer
        self._trainer = trainer

    def check(self, url):
        self._transfer.check(url)

    def download(self, url, path, sha256):
        return self._transfer.download(url, path, sha256)

    def upload(self, url, path, start, length):
        if self._trainer.strikes("spoilt"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 255
            path = path.with_name("spoilt")
            path.write_bytes(data)
        self._transfer.upload(url, path, start, length)


def _read(path: Path) -> dict[str, torch.Tensor]:
    with TensorFile(path) as file:
        return {
            spec.name: torch.from_numpy(file.read(spec.name).copy()) for spec in MANIFEST.tensors
        }


def take_part(site_toml: Path, fault: str, trace: Path) -> None:
    """As ``gradualdiff participant`` does, but for the trainer."""
    configure()
    config, folder = load_site(site_toml), site_toml.resolve().parent
    trainer = TinyTrainer(config.site.name, folder, fault, trace)
    if fault == "undrawn":
        draw = fetching.draw_adapter
        fetching.draw_adapter = lambda manifest, seed, path: draw(manifest, seed + 1, path)
    stopping = threading.Event()
    with stopped_by_signal(stopping):
        context = make_context(config, folder, trainer, stopping)
        object.__setattr__(context, "transfer", SpoilingTransfer(context.transfer, trainer))
        serve(context)
