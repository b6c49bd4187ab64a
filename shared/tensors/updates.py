"""An update: what leads from one global adapter to the next, on disk as a delta of the coordinator.

    c = Q(x - w)        what travels: x the exact adapter, w the one that every replica holds
    w' = w + c          the next one, in fp32, one addition a value

There is no second residual: what Q leaves out is still in x - w' (EF21-P: Gruntkowska, Tyurin and
Richtarik, ICML 2023, arXiv:2209.15218). Everybody who holds w comes to the same bytes of w'. An
update holds the tensors that the round trained, all others stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from shared.errors import DecodeError, DeltaRefusedError, LedgerError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.arithmetic import difference, is_finite
from shared.tensors.delta_file import (
    DeltaFile,
    DeltaHeader,
    check_header,
    decode_header,
    header_limit,
    write_delta,
)
from shared.tensors.tensor_file import ADAPTER_METADATA, FileDigest, TensorFile, write_tensors
from shared.topology import COORDINATOR

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


def update_header(run: str, number: int, source_sha: str, codec_name: str) -> DeltaHeader:
    """Of the update that round ``number`` made, from the adapter ``source_sha``."""
    return DeltaHeader.of(
        codec_name, run=run, number=number, site=COORDINATOR, source_sha=source_sha
    )


def write_update(
    path: Path,
    exact: Path,
    source: Path,
    manifest: Manifest,
    header: DeltaHeader,
    seed: int,
    *,
    packed: bool = False,
) -> FileDigest:
    """Write c = Q(x - w) for the tensors of ``manifest``; what was written.

    ``exact``: x, ``source``: w, both fp32. ``seed``: for codecs that round at random. ``packed``:
    the file's form. Raises LedgerError where a difference leaves fp32's range.
    """
    with TensorFile(exact) as wanted, TensorFile(source) as held:

        def owed(spec: TensorSpec) -> NDArray[np.float32]:
            with np.errstate(over="ignore"):
                values = difference(wanted.read(spec.name), held.read(spec.name))
            wanted.release(spec.name)
            held.release(spec.name)
            return values

        try:
            return write_delta(path, manifest, header.codec, header, owed, seed, packed=packed)
        except DeltaRefusedError as error:
            raise LedgerError(
                f"round {header.round}, from the adapter before to this one: {error}; a delta is "
                "too large: set aggregation.max_delta_norm"
            ) from None


def apply_update(source: Path, update: Path, target: Path, expected: DeltaHeader) -> FileDigest:
    """Write w' = w + c to ``target``; what was written.

    Memory is that of one tensor. Raises DecodeError for an update that is torn, is not the one
    that is expected, holds what w does not, or gives a value that is not finite.
    """
    try:
        with TensorFile(source) as held, DeltaFile(update, _held(held, update, expected)) as change:
            layouts = [held.layouts[name] for name in sorted(held.layouts)]
            return write_tensors(target, layouts, _added(held, change), ADAPTER_METADATA)
    except (DecodeError, DeltaRefusedError) as error:
        raise DecodeError(f"update of round {expected.round}: {error}") from None


def _held(held: TensorFile, update: Path, expected: DeltaHeader) -> Manifest:
    """Those of w's tensors that an update names; which others it holds is checked against it.

    Its header comes first: no codec is run but the one that is expected.
    """
    with TensorFile(update, header_limit(held.layouts)) as file:
        check_header(decode_header(file.metadata), expected)
        named = file.layouts.keys()
    tensors = [
        TensorSpec(name=name, shape=layout.shape, init="zeros")
        for name, layout in sorted(held.layouts.items())
        if name in named
    ]
    try:
        return Manifest(tensors=tuple(tensors), target_modules=())
    except ValidationError:
        raise DecodeError("expected at least one tensor of the adapter, got none") from None


def _added(held: TensorFile, change: DeltaFile) -> Iterator[NDArray[np.float32]]:
    """The tensors of w' in the order of their names."""
    changed = {spec.name: spec for spec in change.manifest.tensors}
    for name in sorted(held.layouts):
        values = held.read(name)
        spec = changed.get(name)
        if spec is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.add(values, change.read(spec))
            change.release(spec)
            if not is_finite(values):
                raise DecodeError(f"tensor {name!r}: expected finite values, got others")
        yield values
        held.release(name)
