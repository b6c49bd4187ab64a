"""The adapter on a frozen base: made by PEFT, then read and written as named tensors.

Names are those of PEFT's saved files (``base_model.model.….weight``), so that an adapter in
the ledger loads anywhere PEFT does. Values live in float32 parameters and are replaced in place:
with bfloat16 masters most Adam-sized updates at a learning rate of 1e-5 would change nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch

from participant.model.kinds import wrap
from shared.adapters import kind_of
from shared.errors import ModelError
from shared.protocol.manifest import Init, Manifest, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from participant.model.bases import Bases
    from participant.model.libraries import transformers
    from shared.adapters import AdapterKind
    from shared.config import LoraSection

_ADAPTER = "default"
_IN_A_BLOCK = re.compile(r"\.\d+\.")


def add_adapter(
    network: transformers.PreTrainedModel, lora: LoraSection, bases: Path | None = None
) -> tuple[torch.nn.Module, Manifest, Bases | None]:
    """Put an adapter on ``network``; the wrapped network, what the adapter is made of, its bases.

    ``bases``: their file; None: they are found in the weights, where the kind has any. Raises
    ModelError if a target module does not exist, or the file does not fit.
    """
    kind = kind_of(lora)
    wrapped, found = wrap(network, lora, bases)
    parameters = trainable(wrapped)
    tensors = tuple(
        TensorSpec(name=name, shape=tuple(parameter.shape), init=_init(kind, name))
        for name, parameter in parameters.items()
    )
    suffixes = {kind.layer_of(name).rsplit(".", 1)[-1] for name in parameters}
    modules = tuple(sorted(suffixes))
    manifest = Manifest(
        tensors=tensors,
        target_modules=modules,
        kind=lora.kind,
        bases=found.sha if found is not None and bases is not None else None,
    )
    return wrapped, manifest, found


def trainable(wrapped: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by saved name, in name order. Raises ModelError unless float32."""
    found: dict[str, torch.nn.Parameter] = {
        name.replace(f".{_ADAPTER}.", ".").removesuffix(f".{_ADAPTER}"): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    wrong = [name for name, parameter in found.items() if parameter.dtype != torch.float32]
    if wrong:
        raise ModelError(f"{wrong[0]}: expected a float32 adapter, got {found[wrong[0]].dtype}")
    return dict(sorted(found.items()))


def exposed_layers(wrapped: torch.nn.Module, manifest: Manifest) -> tuple[str, ...]:
    """Of the adapted layers those whose adapter tells tokens: embeddings, head, and what is near.

    By what the loaded layers are, not by what they were called when they were asked for: one that
    is the model's input or output embedding or shares its weight (tied), that is as wide as the
    vocabulary, or that stands in none of the numbered blocks, where attention and MLP are.
    """
    network = cast("Any", wrapped)
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    weights = {id(weight) for end in ends if (weight := _weight(end)) is not None}
    vocabulary = network.config.get_text_config().vocab_size
    found, kind = [], kind_of(manifest)
    for layer in sorted({kind.layer_of(spec.name) for spec in manifest.tensors}):
        inner = _inner(wrapped.get_submodule(layer))
        widths = (getattr(inner, side, None) for side in ("in_features", "out_features", "nf"))
        weight = _weight(inner)
        if (
            any(inner is _inner(end) for end in ends)
            or id(weight) in weights
            or vocabulary in (*widths, *(weight.shape if weight is not None else ()))
            or not _IN_A_BLOCK.search(layer)
        ):
            found.append(layer.removeprefix("base_model.model."))
    return tuple(found)


def _inner(layer: Any) -> Any:
    """The base's own layer, without the adapter around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _weight(layer: Any) -> Any:
    return getattr(_inner(layer), "weight", None)


def write_parameters(
    parameters: Mapping[str, torch.nn.Parameter], read: Callable[[str], NDArray[Any]]
) -> None:
    """Replace every value in place with ``read(name)``: float32, the parameter's shape.

    Raises ModelError for a tensor that is missing or does not fit; then some may be replaced.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            try:
                value = read(name)
            except KeyError:
                raise ModelError(
                    f"adapter: expected a tensor {name}, found none; "
                    "is it an adapter of this base model and these lora settings?"
                ) from None
            if value.shape != tuple(parameter.shape) or value.dtype != "float32":
                raise ModelError(
                    f"adapter: {name}: expected float32 {tuple(parameter.shape)}, "
                    f"got {value.dtype} {value.shape}"
                )
            # A copy first: the array may be a read-only view of a file.
            parameter.copy_(torch.from_numpy(value.copy()))


def read_parameter(parameter: torch.Tensor) -> NDArray[np.float32]:
    """The values as float32 on the host; on the CPU a view, valid until the next change."""
    values: NDArray[np.float32] = parameter.detach().cpu().numpy()
    return values


def _init(kind: AdapterKind, name: str) -> Init:
    init = kind.init(name)
    if init is None:
        raise ModelError(
            f"{name}: expected only linear layers with {kind.name} adapters; drop this target"
        )
    return init
