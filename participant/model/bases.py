"""The bases that a core adapter's R's stand between: found in the base's weights, or from a file.

In the weights W (outputs, inputs) by a range finder (Halko, Martinsson, Tropp, arXiv:0909.4061):
Y = (W W^T)^q W Omega with q = 2, B = qr+(Y), A = qr+(W^T B)^T, where qr+ is the Q whose R has no
negative diagonal. Unlike an SVD this is smooth in W: no sign and no rotation is left to chance, so
machines that round otherwise differ by little more. Omega's entries are uniform, from a counter and
the layer's name alone: the bases are a function of the base model and the rank, a branch keeps
them, and nothing has to be sent. All is float64 on the CPU, and rounded to float32 once.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch

from participant.model.libraries import peft
from shared.adapters.core import ENDING, KIND
from shared.disk.files import digest_file
from shared.errors import DecodeError, ModelError
from shared.protocol.manifest import BasesFound
from shared.seeds import derive_seed
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

POWERS: Final = 2
DIGITS: Final = 4


@dataclass(frozen=True)
class Bases:
    """What the bases of all layers are. ``sha``: of the file, or of names and values.

    ``held``: by layer the part of ||W||_F^2 that B B^T W A^T A keeps; empty where not known.
    """

    sha: str
    layers: int
    held: dict[str, float]

    def figures(self) -> dict[str, float]:
        """The least, the median and the most of ``held``; empty where not known."""
        parts = list(self.held.values())
        if not parts:
            return {}
        found = {"least": min(parts), "median": statistics.median(parts), "most": max(parts)}
        return {name: round(value, DIGITS) for name, value in found.items()}

    def told(self) -> BasesFound:
        """What goes on record of them."""
        return BasesFound(sha=self.sha, **self.figures())


class Maker:
    """Finds each layer's bases in its weight. Layers must come in the order of their names."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._digest = hashlib.sha256()
        self._held: dict[str, float] = {}

    def of(self, name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """B (outputs, rank) and A (rank, inputs), float32 on the CPU."""
        weight = dense_weight(layer)
        b, a, self._held[name] = range_of(weight, self._rank, name)
        for tensor in (b, a):
            self._digest.update(f"{name} {tuple(tensor.shape)}".encode())
            self._digest.update(tensor.numpy().tobytes())
        return b, a

    def result(self) -> Bases:
        """Of all layers so far."""
        return Bases(self._digest.hexdigest(), len(self._held), self._held)


class Given:
    """Takes them from a file under the names that a LoRA adapter's factors have.

    Of bases of a higher rank the first directions, as those of a gradient stand in their order.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        self._sha = digest_file(path)[0]
        try:
            self._file = TensorFile(path)
        except (OSError, DecodeError) as error:
            raise ModelError(f"lora.bases: cannot be read: {error}; fetch it again") from error
        self._layers = 0

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def of(self, name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Maker.of``. Raises ModelError for a layer that it lacks or that does not fit."""
        left, right = KIND.lora_names(name + ENDING)
        self._layers += 1
        return (
            self._read(left, (layer.out_features, self._rank)),
            self._read(right, (self._rank, layer.in_features)),
        )

    def _read(self, name: str, wanted: tuple[int, int]) -> torch.Tensor:
        try:
            value: NDArray[Any] = self._file.read(name)
        except KeyError:
            raise ModelError(
                f"lora.bases: expected a tensor {name}, found none; make the bases for this base "
                "model and these lora.target_modules"
            ) from None
        first = KIND.first_directions(name, value, self._rank) if value.ndim == 2 else value
        if first.shape != wanted or first.dtype != "float32":
            raise ModelError(
                f"lora.bases: {name}: expected float32 {wanted}, got {value.dtype} {value.shape}; "
                "make the bases for this base model, and give at most their rank as lora.rank"
            )
        return torch.from_numpy(first.copy())

    def result(self) -> Bases:
        """Of all layers so far."""
        return Bases(self._sha, self._layers, {})


def range_of(
    weight: torch.Tensor, rank: int, name: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """B, A (float32) of one weight (outputs, inputs) of any dtype, and the part that they hold.

    Directions beyond the smaller side of the weight are zeros.
    """
    w = weight.to("cpu", torch.float64)
    y = w @ torch.from_numpy(_omega(w.shape[1], rank, name))
    for _ in range(POWERS):
        y = w @ (w.T @ _q(y))
    b = _q(y)
    inner = w.T @ b
    a = _q(inner)
    whole = float(torch.linalg.vector_norm(w)) ** 2
    part = float(torch.linalg.vector_norm(inner)) ** 2 / whole if whole else 0.0
    left, right = _padded(b, rank), _padded(a, rank).T.contiguous()
    return left.float(), right.float(), part


def dense_weight(layer: Any) -> torch.Tensor:
    """The base layer's weight as (outputs, inputs), as what its packed values stand for."""
    base = layer.get_base_layer()
    dense: torch.Tensor = peft.utils.integrations.dequantize_module_weight(base)
    return dense.detach().T if layer.fan_in_fan_out else dense.detach()


def _omega(inputs: int, rank: int, name: str) -> NDArray[np.float64]:
    """(inputs, rank), uniform in [-1, 1): Philox's raw words, the same everywhere."""
    words = np.random.Philox(key=derive_seed(0, "bases", name)).random_raw(inputs * rank)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (2 * uniform - 1).reshape(inputs, rank)


def _q(y: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor
    q, r = torch.linalg.qr(y)
    return q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)


def _padded(q: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(q, (0, rank - q.shape[1]))
