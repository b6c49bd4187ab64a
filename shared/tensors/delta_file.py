"""A delta on disk: a file of tensors that says whose it is and how to read it, and its checks.

The coordinator trusts nothing in it. ``check_delta`` is the border: what it lets through has the
run's tensors and no others, all values finite, a bounded norm, and the header that was agreed on.
Reasons of a refusal name tensor, expected and got, and never a path: they travel to the site.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
from pydantic import Field, StringConstraints, ValidationError

from shared import modes
from shared.config import Name, Sha256, canonical_json
from shared.errors import ConfigError, DecodeError, DeltaRefusedError
from shared.protocol.manifest import Schema
from shared.seeds import derive_seed
from shared.tensors.arithmetic import is_finite, significant, squared_norm
from shared.tensors.codecs import Codec, get_codec
from shared.tensors.residual import ResidualHeader
from shared.tensors.tensor_file import (
    MAX_HEADER_BYTES,
    FileDigest,
    TensorFile,
    TensorLayout,
    write_tensors,
)

LARGEST_NORM: Final = 1e30  # far from fp32's end at 3.4e38: no sum of such deltas reaches it

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.tensors.residual import Feedback, Residual

HEADER_KEY: Final = "gradualdiff"


class DeltaHeader(Schema):
    """Whose delta this is, from which adapter, and how it is written."""

    run: Name
    round: Annotated[int, Field(ge=1)]
    site: Name
    source_sha: Sha256
    codec: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,20}$")]
    codec_version: Annotated[int, Field(ge=1)]

    @classmethod
    def of(
        cls, codec_name: str, *, run: str, number: int, site: str, source_sha: str
    ) -> DeltaHeader:
        """Of a site's delta of a round, as that codec writes it here. Raises ConfigError."""
        codec = get_codec(codec_name)
        return cls(
            run=run,
            round=number,
            site=site,
            source_sha=source_sha,
            codec=codec.name,
            codec_version=codec.version,
        )

    @property
    def metadata(self) -> dict[str, str]:
        """As it stands in the file."""
        return {HEADER_KEY: canonical_json(self.model_dump(mode="json")).decode()}


@dataclass(frozen=True)
class DeltaCheck:
    """What a check found beside that all is well. ``norm``: L2 over all tensors, 9 digits."""

    norm: float


def write_delta(
    path: Path,
    manifest: Manifest,
    codec_name: str,
    header: DeltaHeader,
    values: Callable[[TensorSpec], NDArray[np.float32]],
    seed: int,
    feedback: Feedback | None = None,
    *,
    packed: bool = False,
) -> FileDigest:
    """Encode a delta tensor by tensor; ``values(spec)`` is fp32 of ``spec.shape``, asked for once.

    With ``feedback`` the residual of earlier deltas is added before, and what the codec leaves out
    of the sum is written as the next residual. Each tensor's codec seed is derived from ``seed``
    and its name. ``packed``: the file's form. Raises ConfigError for an unknown codec,
    DeltaRefusedError for a value that is not finite (the training diverged: the coordinator would
    refuse it), ValueError for another shape, dtype, codec or codec version.
    """
    codec = get_codec(codec_name)
    if (header.codec, header.codec_version) != (codec.name, codec.version):
        raise ValueError(
            f"header: expected codec {codec.name} version {codec.version}, "
            f"got {header.codec} version {header.codec_version}"
        )
    places = _layouts(manifest, codec)
    layouts = [layout for layout, _ in places.values()]
    metadata = header.metadata
    if feedback is None:
        parts = _encoded(places, codec, values, seed)
        return write_tensors(path, layouts, parts, metadata, packed=packed)
    whose = ResidualHeader(**header.model_dump(include=set(ResidualHeader.model_fields)))
    with feedback.open(whose, manifest.tensors) as residual:
        parts = _encoded(places, codec, values, seed, residual)
        written = write_tensors(path, layouts, parts, metadata, packed=packed)
        feedback.written = residual.finish()
    return written


class DeltaFile:
    """A delta whose header, names, shapes and dtypes fit ``manifest``; read tensor by tensor.

    Raises DeltaRefusedError where they do not, OSError where the file cannot be opened. Whether
    values are finite is ``check_delta``'s part.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        try:
            self._file = TensorFile(path, header_limit(spec.name for spec in manifest.tensors))
        except DecodeError as error:
            raise DeltaRefusedError(f"not a delta file: {error}") from None
        self.header = decode_header(self._file.metadata)
        self.manifest = manifest
        self._codec = _codec(self.header)
        places = _layouts(manifest, self._codec)
        _match(self._file.layouts, {name: layout for name, (layout, _) in places.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; arrays that were read keep it mapped until they are gone."""
        self._file.close()

    def share(self, other: DeltaFile) -> None:
        """Hold what both files say of their tensors once."""
        self._file.share(other._file)

    def release(self, spec: TensorSpec) -> None:
        """Give back the pages of a tensor that was read."""
        for layout in self._codec.layout(spec):
            self._file.release(layout.name)

    def read(self, spec: TensorSpec) -> NDArray[np.float32]:
        """The decoded values: fp32 of ``spec.shape``; read-only for a codec that copies nothing.

        Raises DeltaRefusedError for parts that the codec cannot have written.
        """
        parts = [self._file.read(layout.name) for layout in self._codec.layout(spec)]
        try:
            with modes.at_work("codecs", self.header.codec):
                values = self._codec.decode(spec, parts)
                _check_form(spec, values)
        except DecodeError as error:
            raise DeltaRefusedError(f"tensor {spec.name!r}: {error}") from None
        return values


def header_limit(names: Iterable[str]) -> int:
    """The most bytes of JSON in the header of a delta of these tensors, by whatever codec.

    16 parts a tensor, each with 128 bytes beside its name: what a small file says to hold is
    bounded by what the run has.
    """
    parts = sum(16 * (len(name.encode()) + 128) for name in names)
    return min(MAX_HEADER_BYTES, 2**16 + parts)


def check_header(got: DeltaHeader, expected: DeltaHeader) -> None:
    """Raises DeltaRefusedError for a delta that says to be another."""
    for field in DeltaHeader.model_fields:
        wanted, found = getattr(expected, field), getattr(got, field)
        if found != wanted:
            raise DeltaRefusedError(f"header {field}: expected {wanted}, got {found}")


def check_delta(
    path: Path,
    manifest: Manifest,
    expected: DeltaHeader,
    max_norm: float | None,
    not_zero: str | None = None,
) -> DeltaCheck:
    """Read the whole delta once, tensor by tensor. Raises DeltaRefusedError with the reason.

    ``not_zero``: the setting by which a delta that is zero throughout is refused.
    """
    squares = []
    with DeltaFile(path, manifest) as delta:
        check_header(delta.header, expected)
        for spec in manifest.tensors:
            values = delta.read(spec)
            if not is_finite(values):
                raise DeltaRefusedError(_not_finite(spec, values))
            squares.append(squared_norm(values))
            delta.release(spec)
    norm = math.sqrt(math.fsum(squares))
    if norm > LARGEST_NORM:
        raise DeltaRefusedError(
            f"norm: expected at most {LARGEST_NORM:g}, got {norm:.6g}; no training comes to it"
        )
    if max_norm is not None and norm > max_norm:
        raise DeltaRefusedError(
            f"norm: expected at most {max_norm:g} (aggregation.max_delta_norm), got {norm:.6g}"
        )
    if not_zero is not None and norm == 0:
        raise DeltaRefusedError(
            f"norm: expected above 0 ({not_zero}: zeros are no step to scale), got 0; nothing was "
            "trained: look at the site's training.learning_rate and data"
        )
    return DeltaCheck(significant(norm))


def _layouts(manifest: Manifest, codec: Codec) -> dict[str, tuple[TensorLayout, TensorSpec]]:
    """Every part of every tensor with the tensor it belongs to, sorted by the part's name."""
    places = [(part, spec) for spec in manifest.tensors for part in codec.layout(spec)]
    places.sort(key=lambda place: place[0].name)
    return {part.name: (part, spec) for part, spec in places}


def _encoded(
    places: Mapping[str, tuple[TensorLayout, TensorSpec]],
    codec: Codec,
    values: Callable[[TensorSpec], NDArray[np.float32]],
    seed: int,
    residual: Residual | None = None,
) -> Iterator[NDArray[Any]]:
    """The parts in the file's order. A part waits here only while another tensor's goes first."""
    waiting: dict[str, NDArray[Any]] = {}
    for name, (_, spec) in places.items():
        if name not in waiting:
            tensor = values(spec)
            _check_form(spec, tensor)
            if residual is not None:
                tensor = residual.added(spec, tensor)
            if not is_finite(tensor):
                raise DeltaRefusedError(_not_finite(spec, tensor))
            with modes.at_work("codecs", codec.name):
                parts = codec.encode(spec, tensor, derive_seed(seed, spec.name))
                names = [layout.name for layout in codec.layout(spec)]
                waiting.update(zip(names, parts, strict=True))
                if residual is not None:
                    sent = codec.decode(spec, parts)
                    _check_form(spec, sent)
            if residual is not None:
                left = residual.keep(spec, tensor, sent)
                if not is_finite(left):
                    raise DeltaRefusedError(_not_finite(spec, left))
        yield waiting.pop(name)


def _check_form(spec: TensorSpec, values: NDArray[np.float32]) -> None:
    if values.dtype != np.float32 or values.shape != spec.shape:
        raise ValueError(
            f"{spec.name}: expected float32 {spec.shape}, got {values.dtype} {values.shape}"
        )


def decode_header(metadata: Mapping[str, str]) -> DeltaHeader:
    """What a delta's file says of itself; no codec is asked. Raises DeltaRefusedError."""
    if list(metadata) != [HEADER_KEY]:
        got = ", ".join(repr(key[:40]) for key in sorted(metadata)[:5]) or "none"
        raise DeltaRefusedError(f"header: expected the one metadata key {HEADER_KEY!r}, got {got}")
    try:
        return DeltaHeader.model_validate_json(metadata[HEADER_KEY])
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "JSON"
        raise DeltaRefusedError(f"header {field}: {detail['msg']}") from None


def _codec(header: DeltaHeader) -> Codec:
    with contextlib.suppress(ConfigError):
        codec = get_codec(header.codec)
        if codec.version == header.codec_version:
            return codec
    raise DeltaRefusedError(
        f"header codec: expected one that is known here, got {header.codec} "
        f"version {header.codec_version}; update the older of the two programs"
    )


def _match(got: Mapping[str, TensorLayout], wanted: Mapping[str, TensorLayout]) -> None:
    """Raise DeltaRefusedError for a tensor that is missing, too many, or of another form."""
    for name, layout in wanted.items():
        found = got.get(name)
        if found is None:
            raise DeltaRefusedError(f"tensor {name!r}: expected it, got a file without it")
        if not layout.holds(found.shape):
            raise DeltaRefusedError(
                f"tensor {name!r}: expected shape {layout.form}, got {found.shape}"
            )
        if found.dtype != layout.dtype:
            raise DeltaRefusedError(
                f"tensor {name!r}: expected dtype {layout.dtype}, got {found.dtype}"
            )
    extra = sorted(got.keys() - wanted.keys())
    if extra:
        raise DeltaRefusedError(
            f"tensor {extra[0][:100]!r}: expected {len(wanted)} tensors without it, got {len(got)}"
        )


def _not_finite(spec: TensorSpec, values: NDArray[np.float32]) -> str:
    flat = values.reshape(-1)
    index = int(np.flatnonzero(~np.isfinite(flat))[0])
    return f"tensor {spec.name!r}: expected finite values, got {flat[index]} at flat index {index}"
