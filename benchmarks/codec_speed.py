"""How fast each codec is on one core, and what it really makes of LLaMA-2-7B's adapter at r = 64.

    python benchmarks/codec_speed.py [--codecs fp32 int8 int4 ...] [--rounds 5] [--layers 32]

The shape is r = 64 on q, k, v, o, gate, up and down: 14 tensors a layer, 448 and 159,907,840 values
in 32 layers. Values are random and normal, every one different: a trained delta has heavier tails,
so codecs with scales lose more on it, and what an entropy coder saves is another share.

Speeds are those of one layer, tensor by tensor, the fastest of ``--rounds``, in MB of fp32 a second
(not of what travels); a copy of the same memory stands beside them. ``file`` is the delta file of
all layers as ``write_delta`` writes it, header included; ``seconds`` what writing, reading back and
checking it took, hashing and the disk included; ``growth`` how much anonymous memory the process
had meanwhile at its highest over what it had before any codec ran, in MB (the largest tensor has
2.8 MB).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared import modes
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, check_delta, write_delta

if TYPE_CHECKING:
    from collections.abc import Callable

RANK, WIDTH, INNER = 64, 4096, 11008
MODULES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH))
MODULES |= {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}


def specs(layers: int) -> tuple[TensorSpec, ...]:
    """The adapter's tensors, as PEFT names them."""
    found = []
    for layer in range(layers):
        for module, (inward, outward) in MODULES.items():
            part = "mlp" if "proj" in module and module[0] in "gud" else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            shapes = {"A": (RANK, inward), "B": (outward, RANK)}
            found += [
                TensorSpec(name=f"{name}.lora_{factor}.weight", shape=shape, init="zeros")
                for factor, shape in shapes.items()
            ]
    return tuple(sorted(found, key=lambda spec: spec.name))


def normal(spec: TensorSpec) -> np.ndarray:
    """Random values of this tensor, the same each time."""
    stream = np.random.Generator(np.random.SFC64(derive_seed(1, spec.name)))
    return stream.standard_normal(spec.shape, np.float32)


def fastest(rounds: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def speeds(name: str, layer: tuple[TensorSpec, ...], rounds: int) -> tuple[float, ...]:
    """MB of fp32 a second to encode and to decode; relative rms error."""
    codec, size, encoding, decoding, error, square = get_codec(name), 0, 0.0, 0.0, 0.0, 0.0
    for spec in layer:
        values = normal(spec)
        encoding += fastest(rounds, partial(codec.encode, spec, values, 1))
        parts = codec.encode(spec, values, 1)
        decoding += fastest(rounds, partial(codec.decode, spec, parts))
        size += values.nbytes
        error += float(np.square(codec.decode(spec, parts) - values, dtype=np.float64).sum())
        square += float(np.square(values, dtype=np.float64).sum())
    return size / encoding / 1e6, size / decoding / 1e6, (error / square) ** 0.5


class Watch(threading.Thread):
    """The highest anonymous memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._highest = 0.0

    def run(self) -> None:
        """Look until told to stop."""
        while not self._done.wait(0.002):
            self._highest = max(self._highest, anonymous())

    def stop(self) -> float:
        """In MB."""
        self._done.set()
        self.join()
        return self._highest


def anonymous() -> float:
    """Memory that is no file's, in MB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


def whole(name: str, tensors: tuple[TensorSpec, ...], folder: Path) -> tuple[float, ...]:
    """Bytes of the delta file, seconds to write and to check it, most memory in MB."""
    header = DeltaHeader.of(name, run="speed", number=1, site="one", source_sha="0" * 64)
    manifest, drawing = Manifest(tensors=tensors, target_modules=tuple(MODULES)), 0.0

    def values(spec: TensorSpec) -> np.ndarray:
        nonlocal drawing
        began = time.perf_counter()
        drawn = normal(spec)
        drawing += time.perf_counter() - began
        return drawn

    watch = Watch()
    watch.start()
    began = time.perf_counter()
    digest = write_delta(folder / name, manifest, name, header, values, seed=1)
    written = time.perf_counter()
    check_delta(folder / name, manifest, header, max_norm=None)
    checked = time.perf_counter()
    (folder / name).unlink()
    return digest.size, written - began - drawing, checked - written, watch.stop()


def main() -> None:
    """Measure every codec, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codecs", nargs="+", default=modes.names("codecs"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    layer, tensors = specs(1), specs(given.layers)
    values = sum(spec.elements for spec in tensors)
    source = normal(layer[-1])
    target = np.empty_like(source)
    copied = source.nbytes / fastest(given.rounds, partial(np.copyto, target, source)) / 1e6
    before = anonymous()
    print(f"{values:,} normal values in {len(tensors)} tensors; memcpy {copied:,.0f} MB/s\n")
    print(
        "| codec | encode, MB/s | decode, MB/s | rms error | bytes a value | file, MB "
        "| write, s | check, s | growth, MB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.codecs:
            size, writing, checking, most = whole(name, tensors, Path(scratch))
            encoding, decoding, error = speeds(name, layer, given.rounds)
            said = (
                f"| {name} | {encoding:,.0f} | {decoding:,.0f} | {error:.2%} "
                f"| {size / values:.4f} | {size / 1e6:.2f} | {writing:.2f} | {checking:.2f} "
                f"| {most - before:.0f} |"
            )
            rows.append((size, said))
    for _, row in sorted(rows, reverse=True):
        print(row)


if __name__ == "__main__":
    main()
