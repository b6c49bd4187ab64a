"""What closing a round costs at LLaMA-2-7B's size: memory, and seconds beside plain numpy.

The shape is r=64 on q, k, v, o, gate, up and down of 32 layers: 448 tensors, 159,907,840 values,
640 MB a delta in fp32. For each K the round is closed in a fresh process while a thread samples
its anonymous memory (``RssAnon`` of ``/proc/self/status``: what the kernel cannot take back;
mapped file pages are not counted). Beside it, in a process of its own and on the same bytes in a
warm page cache, the plain way: an fp64 numpy mean, tensor by tensor, nothing hashed or written
(``numpy``), and the same with its result hashed, written and synced (``saved``): with few deltas
most of a closing is the writing, whose speed is the machine's.
Each K is closed with one summing thread (phases in wall seconds; hashing and writing overlap with
summing) and with one for each processor (phases are summed over threads, waiting included).

    python benchmarks/closing_memory.py [--dir FOLDER] [--participants 2 8] [--repeats 3]

Needs Linux, some 7 GB of disk and as much free memory for the page cache. Aims: growth below
300 MB whatever K; read + accumulate within 2x of numpy's mean; the whole within 4x.
"""

from __future__ import annotations

import argparse
import hashlib
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
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta
from shared.tensors.genesis import draw_adapter
from shared.tensors.stopwatch import Stopwatch
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

HIDDEN, FEED_FORWARD, LAYERS, RANK = 4096, 11_008, 32, 64
MODULES = {
    "mlp.down_proj": (FEED_FORWARD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FEED_FORWARD),
    "mlp.up_proj": (HIDDEN, FEED_FORWARD),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
}
PHASES = ("read", "accumulate", "measure", "gap", "hash", "write")


def llama_manifest() -> Manifest:
    """LLaMA-2-7B's adapter as PEFT names it."""
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


def delta_path(folder: Path, index: int) -> Path:
    """Where the delta of participant ``index`` lies."""
    return folder / f"site-{index}.safetensors"


def generate(folder: Path, participants: int) -> None:
    """Write a source adapter and ``participants`` deltas of normal noise, rms 1e-3."""
    manifest = llama_manifest()
    source = draw_adapter(manifest, 1, folder / "source.safetensors")
    for index in range(participants):
        header = DeltaHeader(
            run="benchmark", round=1, site=f"site-{index}", source_sha=source.sha256,
            codec="fp32", codec_version=get_codec("fp32").version,
        )  # fmt: skip

        def draw(spec: TensorSpec, index: int = index) -> NDArray[np.float32]:
            noise = np.random.default_rng(derive_seed(index, spec.name))
            return noise.standard_normal(spec.shape, np.float32) * np.float32(1e-3)

        write_delta(delta_path(folder, index), manifest, "fp32", header, draw, seed=1)


def close_round(
    folder: Path, participants: int, threads: int, method: Method | None = None
) -> dict[str, float]:
    """Seconds by phase and in all, and by how many MB anonymous memory grew at its peak."""
    deltas = [
        WeightedDelta(f"site-{index}", delta_path(folder, index), 1 / participants)
        for index in range(participants)
    ]
    manifest, watch = llama_manifest(), Stopwatch()
    before = anonymous_mb()
    samples, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous_mb())

    sampler = threading.Thread(target=sample)
    sampler.start()
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    start, processor = time.perf_counter(), time.process_time()
    aggregate(source, deltas, manifest, target, watch, threads, method)
    whole, processor = time.perf_counter() - start, time.process_time() - processor
    done.set()
    sampler.join()
    growth = max(samples) - before
    return {**watch.seconds, "whole": whole, "processor": processor, "growth_mb": growth}


def plain_mean(folder: Path, participants: int) -> dict[str, float]:
    """Seconds of the plain way, the mean alone and with its result hashed, written and synced."""
    start = time.perf_counter()
    for _ in means(folder, participants):
        pass
    middle = time.perf_counter()
    sha256 = hashlib.sha256()
    with (folder / "plain").open("wb") as file:
        for mean in means(folder, participants):
            data = mean.astype(np.float32).data
            sha256.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"mean": middle - start, "saved": time.perf_counter() - middle}


def means(folder: Path, participants: int) -> Iterator[NDArray[np.float64]]:
    """Map each file, and for each tensor add in fp64 and divide."""
    with TensorFile(delta_path(folder, 0)) as first:
        layouts = list(first.layouts.values())
    data_bytes = sum(layout.size_bytes for layout in layouts)
    maps = []
    for index in range(participants):
        path = delta_path(folder, index)
        maps.append(np.memmap(path, np.float32, "r", path.stat().st_size - data_bytes))
    offset = 0
    for layout in layouts:
        end = offset + layout.size_bytes // 4
        total = maps[0][offset:end].astype(np.float64)
        for values in maps[1:]:
            total += values[offset:end]
        total /= participants
        yield total
        offset = end


def anonymous_mb() -> float:
    """Anonymous memory of the calling process, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("/proc/self/status: expected a line RssAnon; run this on Linux")


def in_process(folder: Path, participants: int, threads: int) -> dict[str, float]:
    """Measure in a fresh interpreter: closing with ``threads``, or the plain mean for 0."""
    command = [sys.executable, __file__, "--dir", str(folder), "--only", str(threads)]
    answer = subprocess.run(
        [*command, "--participants", str(participants)], check=True, capture_output=True, text=True
    )
    values: dict[str, float] = json.loads(answer.stdout)
    return values


def report(folder: Path, participants: int, repeats: int) -> None:
    """Print two lines of the table: medians over ``repeats``, the ways taking turns."""
    ways = (0, 1, os.cpu_count() or 1)
    runs = [{way: in_process(folder, participants, way) for way in ways} for _ in range(repeats)]
    mean, saved = (statistics.median(run[0][key] for run in runs) for key in ("mean", "saved"))
    for threads in ways[1:]:
        closing = {
            key: statistics.median(run[threads][key] for run in runs) for key in runs[0][threads]
        }
        summing = closing["read"] + closing["accumulate"]
        phases = "".join(f"{closing[phase]:>11.2f}" for phase in PHASES)
        print(
            f"{participants:>3}{threads:>9}{closing['growth_mb']:>11.0f}{phases}"
            f"{closing['whole']:>9.2f}{mean:>9.2f}{saved:>9.2f}{summing / mean:>11.2f}"
            f"{closing['whole'] / mean:>13.2f}{closing['whole'] / saved:>13.2f}",
            flush=True,
        )


def main() -> None:
    """Generate the files, measure, print the table, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Memory and seconds of closing a round.")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go for a while")
    parser.add_argument("--participants", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        values = (
            close_round(given.dir, given.participants[0], given.only)
            if given.only
            else plain_mean(given.dir, given.participants[0])
        )
        print(json.dumps(values))
        return
    if given.dir is not None:
        given.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="closing-") as name:
        folder = Path(name)
        generate(folder, max(given.participants))
        phases = "".join(f"{phase:>11}" for phase in PHASES)
        print(
            f"{'K':>3}{'threads':>9}{'growth MB':>11}{phases}{'whole':>9}{'numpy':>9}{'saved':>9}"
            f"{'sum/numpy':>11}{'whole/numpy':>13}{'whole/saved':>13}",
            flush=True,
        )
        for participants in given.participants:
            report(folder, participants, given.repeats)


if __name__ == "__main__":
    main()
