"""A masked delta on disk: one packed vector of a ring, cut into the run's tensors.

What is in it says nothing to anybody who has no other part of the sum, so all that can be checked
is its form: header, names, sizes. Tensors are masked in the order of their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from shared.errors import DecodeError, DeltaRefusedError
from shared.secure_sum.quantise import quantise, step_of
from shared.secure_sum.ring import ring_for
from shared.tensors.arithmetic import is_finite
from shared.tensors.delta_file import DeltaHeader, check_header, decode_header, header_limit
from shared.tensors.residual import ResidualHeader
from shared.tensors.tensor_file import FileDigest, TensorFile, TensorLayout, TensorWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import Manifest, TensorSpec
    from shared.protocol.secure import SecureTerms
    from shared.secure_sum.masking import Masking
    from shared.secure_sum.ring import Ring
    from shared.tensors.residual import Feedback

MASKED: Final = "masked"  # in a header, where a codec's name stands
_VERSION: Final = 1


def ring_of(terms: SecureTerms) -> Ring:
    """It holds every sum of the cohort's numbers. Raises ConfigError where none does."""
    return ring_for(len(terms.roster), terms.levels)


def masked_header(run: str, number: int, site: str, source_sha: str) -> DeltaHeader:
    """Of a site's masked delta of a round."""
    return DeltaHeader(
        run=run,
        round=number,
        site=site,
        source_sha=source_sha,
        codec=MASKED,
        codec_version=_VERSION,
    )


def in_order(manifest: Manifest) -> list[TensorSpec]:
    """The tensors as masks and reaches are dealt to them: by name."""
    return sorted(manifest.tensors, key=lambda spec: spec.name)


def write_masked(
    path: Path,
    manifest: Manifest,
    header: DeltaHeader,
    terms: SecureTerms,
    masking: Masking,
    values: Callable[[TensorSpec], NDArray[np.float32]],
    feedback: Feedback,
    *,
    packed: bool,
) -> FileDigest:
    """Quantise, mask and write a delta tensor by tensor; ``values(spec)``: fp32 of ``spec.shape``.

    What is cut off or rounded away becomes the next residual. Raises DeltaRefusedError for a value
    that is not finite.
    """
    whose = ResidualHeader(**header.model_dump(include=set(ResidualHeader.model_fields)))
    buffer = np.empty(max(spec.elements for spec in manifest.tensors), np.float32)
    with feedback.open(whose, manifest.tensors) as residual:

        def numbers(spec: TensorSpec, step: np.float32) -> NDArray[np.int16]:
            wanted = residual.added(spec, values(spec))
            if not is_finite(wanted):
                raise DeltaRefusedError(f"tensor {spec.name!r}: expected finite values, got others")
            sent = buffer[: spec.elements]
            found = quantise(wanted.reshape(-1), step, terms.levels, sent)
            residual.keep(spec, wanted, sent.reshape(spec.shape))
            return found

        digest = write_numbers(path, manifest, header, terms, masking, numbers, packed=packed)
        feedback.written = residual.finish()
    return digest


def write_numbers(
    path: Path,
    manifest: Manifest,
    header: DeltaHeader,
    terms: SecureTerms,
    masking: Masking,
    numbers: Callable[[TensorSpec, np.float32], NDArray[np.integer[Any]]],
    *,
    packed: bool,
) -> FileDigest:
    """Mask and write whole numbers tensor by tensor, modulo the ring.

    ``numbers(spec, step)``: of ``spec.shape``, where 1 stands for ``step``; asked for once.
    """
    ring, specs = ring_of(terms), in_order(manifest)
    layouts = [_layout(spec, ring) for spec in specs]
    with TensorWriter(path, layouts, header.metadata, packed=packed) as writer:
        for spec, reach in zip(specs, terms.reaches, strict=True):
            found = numbers(spec, step_of(reach, terms.levels))
            words = masking.mask(ring.encode(found.reshape(-1)), ring)
            writer.add(ring.pack(words))
        return writer.finish()


class MaskedFile:
    """A masked delta whose header, names and sizes fit; read tensor by tensor.

    Raises DeltaRefusedError where they do not, OSError where the file cannot be opened.
    """

    def __init__(self, path: Path, manifest: Manifest, expected: DeltaHeader, ring: Ring) -> None:
        try:
            self._file = TensorFile(path, header_limit(spec.name for spec in manifest.tensors))
        except DecodeError as error:
            raise DeltaRefusedError(f"not a delta file: {error}") from None
        check_header(decode_header(self._file.metadata), expected)
        self._ring = ring
        wanted = {spec.name: _layout(spec, ring) for spec in manifest.tensors}
        if self._file.layouts != wanted:
            odd = [name for name in wanted if self._file.layouts.get(name) != wanted[name]]
            name = (odd or sorted(self._file.layouts.keys() - wanted.keys()))[0]
            raise DeltaRefusedError(
                f"tensor {name[:100]!r}: expected {wanted.get(name, 'none of that name')}, got "
                f"{self._file.layouts.get(name, 'none')}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def words(self, spec: TensorSpec) -> NDArray[Any]:
        """A tensor's part of the vector, flat."""
        words = self._ring.unpack(self._file.read(spec.name), spec.elements)
        self._file.release(spec.name)
        return words


def check_masked(path: Path, manifest: Manifest, expected: DeltaHeader, ring: Ring) -> None:
    """That it is one of that form; any values will do. Raises DeltaRefusedError with the reason."""
    MaskedFile(path, manifest, expected, ring).close()


def _layout(spec: TensorSpec, ring: Ring) -> TensorLayout:
    return TensorLayout(spec.name, "U8", (ring.packed_bytes(spec.elements),))
