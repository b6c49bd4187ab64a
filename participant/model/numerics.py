"""What the bytes of a local training depend on in addition to config and data.

Equal versions, CPU type, thread count and compute dtype are what "same bytes" is promised for.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Literal

import torch

from shared.errors import ConfigError
from shared.protocol.manifest import Numerics

ComputeDtype = Literal["auto", "bfloat16", "float32"]
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def settle_threads(count: int) -> None:
    """Pin ``count`` threads and deterministic algorithms for this process.

    Safe to call again. Sums are split among threads, so another count gives other last bits.
    """
    os.environ["MKL_DYNAMIC"] = "FALSE"
    # cuBLAS repeats its sums in one order only with a workspace of its own; read at CUDA's start.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        # Torch takes this once per process, before its first parallel work. One stream of work at
        # a time runs here anyway, so a process that is past that point loses nothing.
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError as error:
            if "set number of interop threads" not in str(error):
                raise
    torch.use_deterministic_algorithms(mode=True)
    # The mode also fills every fresh tensor with NaN, to show up reads of unset memory: a quarter
    # of the time of an evaluation on the CPU, and no effect on any result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pick_device(kind: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that ``site.toml`` names. Raises ConfigError if there is no such GPU."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'device.kind: expected a GPU that torch can use for "cuda", found none; '
            'use "auto" or "cpu", or install a CUDA build of torch'
        )
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_compute_dtype(wanted: ComputeDtype, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it natively, else float32."""
    if wanted == "bfloat16":
        return torch.bfloat16
    if wanted == "float32":
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("amx_tile"))
    return torch.bfloat16 if native else torch.float32


def describe_numerics(device: torch.device, compute_dtype: torch.dtype) -> Numerics:
    """The process as it stands; call it after :func:`settle_threads`."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Numerics(
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
        device=name,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_threads=torch.get_num_threads(),
        compute_dtype=str(compute_dtype).removeprefix("torch."),
    )
