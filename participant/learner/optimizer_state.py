"""AdamW's moments on disk, for runs that keep them from round to round: safetensors, no pickle.

``exp_avg.<tensor>`` and ``exp_avg_sq.<tensor>`` are float32 of that tensor's shape; ``step`` is one
int64, the number of updates so far (all tensors are updated together).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.errors import DecodeError, ModelError
from shared.tensors.tensor_file import FileDigest, TensorFile, TensorLayout, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_optimizer(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter], path: Path
) -> FileDigest:
    """Write the state of every parameter; the bytes are a function of the state alone."""
    layouts = [
        TensorLayout(f"{moment}.{name}", "F32", tuple(parameters[name].shape))
        for moment in _MOMENTS
        for name in sorted(parameters)
    ]
    layouts.append(TensorLayout("step", "I64", (1,)))

    def values() -> Iterator[NDArray[Any]]:
        for moment in _MOMENTS:
            for name in sorted(parameters):
                yield optimizer.state[parameters[name]][moment].cpu().numpy()
        first = optimizer.state[next(iter(parameters.values()))]
        yield np.array([int(first["step"])], dtype=np.int64)

    return write_tensors(path, layouts, values())


def load_optimizer(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter], path: Path
) -> None:
    """Give ``optimizer``, made over ``parameters`` in their order, the state in ``path``.

    Raises ModelError if the file is damaged or does not fit the adapter.
    """
    try:
        with TensorFile(path) as file:
            step = float(file.read("step")[0])
            state = {
                index: {
                    "step": torch.tensor(step),
                    **{moment: _moment(file, moment, name, p) for moment in _MOMENTS},
                }
                for index, (name, p) in enumerate(parameters.items())
            }
    except (OSError, KeyError, IndexError, DecodeError) as error:
        raise ModelError(
            f"optimiser state {path.name} cannot be used: {error}; "
            "remove it to continue with a fresh optimiser"
        ) from error
    # Through load_state_dict, which puts each tensor where the optimiser wants it.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _moment(
    file: TensorFile, moment: str, name: str, parameter: torch.nn.Parameter
) -> torch.Tensor:
    value = file.read(f"{moment}.{name}")
    if value.shape != tuple(parameter.shape) or value.dtype != np.float32:
        raise ModelError(
            f"optimiser state: {moment}.{name}: expected float32 {tuple(parameter.shape)}, "
            f"got {value.dtype} {value.shape}; remove the file to continue with a fresh optimiser"
        )
    return torch.from_numpy(value.copy())
