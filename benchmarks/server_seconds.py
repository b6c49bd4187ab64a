"""What the server's optimiser adds to closing a round: seconds, memory and bytes, beside plain.

The shape is LLaMA-2-7B's at r=16 (q, k, v, o, gate, up and down of 32 layers: 448 tensors,
39,976,960 values, 160 MB of fp32). Each optimiser closes a round that goes on from the state of the
round before, in a fresh process, while a thread samples its anonymous memory (``RssAnon`` of
``/proc/self/status``; mapped file pages are not counted). The state is written, hashed and synced
with the adapter; sending both to the store is not in it. Medians; the optimisers take turns.

    python benchmarks/server_seconds.py [--dir FOLDER] [--participants 5] [--repeats 3]

Needs Linux, some 2 GB of disk and as much free memory for the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coordinator.aggregation.closing import Method, aggregate
from coordinator.aggregation.server_optimizer import StateFiles
from shared import modes
from shared.config import ServerSection
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.genesis import draw_adapter
from shared.tensors.stopwatch import Stopwatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

HIDDEN, FEED_FORWARD, LAYERS, RANK = 4096, 11_008, 32, 16
MODULES = {
    "mlp.down_proj": (FEED_FORWARD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FEED_FORWARD),
    "mlp.up_proj": (HIDDEN, FEED_FORWARD),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
}
OPTIMIZERS = modes.names("server_optimizers")
PHASES = ("read", "accumulate", "measure", "state", "hash", "write")


def adapter_manifest() -> Manifest:
    """The adapter as PEFT names it."""
    specs = []
    for layer in range(LAYERS):
        for module, (inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            specs += [
                TensorSpec(
                    name=f"{name}.lora_A.weight", shape=(RANK, inputs), init="kaiming_uniform"
                ),
                TensorSpec(name=f"{name}.lora_B.weight", shape=(outputs, RANK), init="zeros"),
            ]
    specs.sort(key=lambda spec: spec.name)
    targets = sorted(module.split(".")[1] for module in MODULES)
    return Manifest(tensors=tuple(specs), target_modules=tuple(targets))


def generate(folder: Path, participants: int) -> None:
    """A source adapter, deltas of normal noise with rms 1e-3, and each optimiser's first state."""
    manifest = adapter_manifest()
    source = draw_adapter(manifest, 1, folder / "source")
    for index in range(participants):
        header = DeltaHeader(
            run="benchmark", round=1, site=f"site-{index}", source_sha=source.sha256,
            codec="fp32", codec_version=get_codec("fp32").version,
        )  # fmt: skip

        def draw(spec: TensorSpec, index: int = index) -> NDArray[np.float32]:
            noise = np.random.default_rng(derive_seed(index, spec.name))
            return noise.standard_normal(spec.shape, np.float32) * np.float32(1e-3)

        write_delta(folder / f"site-{index}", manifest, "fp32", header, draw, seed=1)


def close(folder: Path, participants: int, optimizer: str, before: Path | None) -> dict[str, float]:
    """Seconds by phase and in all, growth of anonymous memory in MB, MB of state written."""
    given = {"optimizer": optimizer} if optimizer == "plain" else {
        "optimizer": optimizer, "learning_rate": 0.1
    }  # fmt: skip
    method = Method(server=ServerSection.model_validate(given))
    deltas = [
        WeightedDelta(f"site-{index}", folder / f"site-{index}", 1 / participants)
        for index in range(participants)
    ]
    manifest, watch, after = adapter_manifest(), Stopwatch(), folder / f"after-{optimizer}"
    start_mb = anonymous_mb()
    samples, done = [start_mb], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous_mb())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    result = aggregate(
        folder / "source", deltas, manifest, folder / "target", watch,
        method=method, state=StateFiles(before, after),
    )  # fmt: skip
    whole = time.perf_counter() - start
    done.set()
    sampler.join()
    written = result.stepped.state.size / 1e6 if result.stepped else 0.0
    growth = max(samples) - start_mb
    return {"state": 0.0, **watch.seconds, "whole": whole, "growth_mb": growth, "mb": written}


def anonymous_mb() -> float:
    """Anonymous memory of the calling process, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("/proc/self/status: expected a line RssAnon; run this on Linux")


def in_process(folder: Path, participants: int, optimizer: str) -> dict[str, float]:
    """Close in a fresh interpreter, from the state that is there."""
    command = [sys.executable, __file__, "--dir", str(folder), "--only", optimizer]
    answer = subprocess.run(
        [*command, "--participants", str(participants)], check=True, capture_output=True, text=True
    )
    values: dict[str, float] = json.loads(answer.stdout)
    return values


def measure(folder: Path, participants: int, repeats: int) -> None:
    """Print the table. One optimiser's states are on disk at a time."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in OPTIMIZERS}
    for _ in range(repeats):
        for name in OPTIMIZERS:
            before, after = folder / "before", folder / f"after-{name}"
            if name != "plain":
                close(folder, participants, name, None)
                after.replace(before)
            runs[name].append(in_process(folder, participants, name))
            after.unlink(missing_ok=True)
            before.unlink(missing_ok=True)
    phases = "".join(f"{phase:>11}" for phase in PHASES)
    print(
        f"{os.cpu_count()} processors, {participants} deltas; seconds (phases summed over threads)"
    )
    print(f"{'optimizer':<11}{'growth MB':>10}{'state MB':>10}{phases}{'whole':>8}{'/ plain':>9}")
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    for name, values in middle.items():
        phases = "".join(f"{values[phase]:>11.2f}" for phase in PHASES)
        ratio = values["whole"] / middle["plain"]["whole"]
        print(
            f"{name:<11}{values['growth_mb']:>10.0f}{values['mb']:>10.0f}{phases}"
            f"{values['whole']:>8.2f}{ratio:>9.2f}"
        )


def main() -> None:
    """Generate the files, measure, print the table, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Seconds of closing a round, by optimiser.")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go for a while")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        before = given.dir / "before"
        values = close(
            given.dir, given.participants, given.only, before if before.exists() else None
        )
        print(json.dumps(values))
        return
    if given.dir is not None:
        given.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="server-") as name:
        folder = Path(name)
        generate(folder, given.participants)
        measure(folder, given.participants, given.repeats)


if __name__ == "__main__":
    main()
