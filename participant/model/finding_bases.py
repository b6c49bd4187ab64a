"""The bases that a run's sites found in their base model, found again and written into a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from participant.model.local_model import LocalModel
from participant.model.numerics import pick_device
from shared.adapters.core import KIND
from shared.errors import ModelError
from shared.log import get_logger
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorLayout, write_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from shared.config import BaseSection, LoraSection


def write_bases(
    base: BaseSection, lora: LoraSection, fingerprint: str, known: Collection[str], target: Path
) -> None:
    """Write ``target``: float32 (rank, inputs) A and (outputs, rank) B of each layer, by name.

    ``known``: what the sites' bases are on record as. Another machine rounds otherwise: where these
    are none of them, the log says so. Raises ModelError for another base model than the run's.
    """
    model = LocalModel(base, lora, pick_device("cpu"))
    if model.fingerprint != fingerprint:
        raise ModelError(
            f"base.model: expected fingerprint {fingerprint}, which the run was trained over, got "
            f"{model.fingerprint}; name the folder or hub id of that model by --base"
        )
    assert model.bases is not None  # the caller asks for a kind that has them
    if model.bases.sha not in known:
        get_logger().warning("bases.rounded_otherwise", sha256=model.bases.sha, known=sorted(known))
    names = [spec.name for spec in model.manifest().tensors]

    def values() -> Iterator[NDArray[np.float32]]:
        for name in names:
            b, a = model.frozen(KIND.layer_of(name))
            yield from (a, b)

    layouts = []
    for name in names:
        b, a = model.frozen(KIND.layer_of(name))
        left, right = KIND.lora_names(name)
        layouts += [TensorLayout(right, "F32", a.shape), TensorLayout(left, "F32", b.shape)]
    write_tensors(target, layouts, values(), ADAPTER_METADATA)
