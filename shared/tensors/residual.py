"""Error feedback: what a codec left out of a site's delta, kept at the site and added to its next.

    u = delta + e        what is to travel: what was trained, and what is still owed
    z = decode(encode(u))    what travels, and what the coordinator adds up
    e' = u - z           the next residual, once z is accepted

So the sum of all z is the sum of all deltas but for the last residual, however coarse the codec
(Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847). All is fp32, one operation a value:
the same bytes on every machine.

A residual is a safetensors file: fp32 of the delta's tensors by their names, and of those that an
earlier delta had and this one has not. It never leaves its site.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field

from shared.config import Name, canonical_json
from shared.errors import DecodeError
from shared.protocol.manifest import Schema
from shared.tensors.tensor_file import FileDigest, TensorFile, TensorLayout, TensorWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.protocol.manifest import TensorSpec

RESIDUAL_KEY: Final = "gradualdiff.residual"


class ResidualHeader(Schema):
    """Whose residual this is, and which codec left it."""

    run: Name
    site: Name
    codec: str
    codec_version: Annotated[int, Field(ge=1)]


class Feedback:
    """One delta's: the residual that it starts from, and where the next one goes.

    ``before``: the residual of the delta accepted last, None for zeros. ``owed``: whether there
    should be one. Afterwards ``state`` says what became of it, ``problem`` why it is lost, and
    ``written`` what the next one is.
    """

    def __init__(self, before: Path | None, after: Path, *, owed: bool) -> None:
        self._before, self._after = before, after
        self.state: Literal["none", "kept", "lost"] = "lost" if owed else "none"
        self.problem = "its file is missing or altered" if owed else ""
        self.written: FileDigest | None = None

    def open(self, header: ResidualHeader, specs: Sequence[TensorSpec]) -> Residual:
        """For a delta of ``specs``. A residual that does not fit it is lost: zeros instead."""
        before = None
        if self._before is not None:
            try:
                before = _fitting(self._before, header, specs)
                self.state, self.problem = "kept", ""
            except (OSError, DecodeError) as error:
                self.state, self.problem = "lost", str(error)
        return Residual(before, self._after, header, specs)


class Residual:
    """A residual while it is read and the next one written, tensor by tensor, sorted by name."""

    def __init__(
        self,
        before: TensorFile | None,
        after: Path,
        header: ResidualHeader,
        specs: Sequence[TensorSpec],
    ) -> None:
        known = before.layouts if before is not None else {}
        mine = {spec.name: TensorLayout(spec.name, "F32", spec.shape) for spec in specs}
        self._before = before
        self._waiting = deque(sorted(known.keys() - mine))  # not trained this time: as they are
        layouts = {**known, **mine}
        self._writer = TensorWriter(
            after, [layouts[name] for name in sorted(layouts)], {RESIDUAL_KEY: _text(header)}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._before is not None:
            self._before.close()

    def added(self, spec: TensorSpec, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        """u: fp32 of ``spec.shape``, what is to travel."""
        if self._before is None or spec.name not in self._before.layouts:
            return delta
        with np.errstate(over="ignore"):  # whoever encodes it refuses what is not finite
            wanted: NDArray[np.float32] = np.add(delta, self._before.read(spec.name))
        self._before.release(spec.name)
        return wanted

    def keep(
        self, spec: TensorSpec, wanted: NDArray[np.float32], sent: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What is left of it, e' = u - z, which is written. Specs come sorted, each once."""
        while self._waiting and self._waiting[0] < spec.name:
            self._copy(self._waiting.popleft())
        with np.errstate(over="ignore", invalid="ignore"):
            left = np.subtract(wanted, sent)
        self._writer.add(left)
        return left

    def finish(self) -> FileDigest:
        """Give the new file its name; what was written."""
        while self._waiting:
            self._copy(self._waiting.popleft())
        return self._writer.finish()

    def _copy(self, name: str) -> None:
        assert self._before is not None  # whose tensor it is
        self._writer.add(self._before.read(name))
        self._before.release(name)


def _fitting(path: Path, header: ResidualHeader, specs: Sequence[TensorSpec]) -> TensorFile:
    """Raises DecodeError for a residual of something else, or of other shapes."""
    file = TensorFile(path)
    if file.metadata != {RESIDUAL_KEY: _text(header)}:
        raise DecodeError(f"expected the residual of {_text(header)}, got another's")
    shapes = {spec.name: spec.shape for spec in specs}
    for name, layout in file.layouts.items():
        wanted = shapes.get(name, layout.shape)
        if layout.dtype != "F32" or layout.shape != wanted:
            raise DecodeError(
                f"tensor {name!r}: expected F32 {wanted}, got {layout.dtype} {layout.shape}"
            )
    return file


def _text(header: ResidualHeader) -> str:
    return canonical_json(header.model_dump(mode="json")).decode()
