"""LoRA directions merged into the weights of a base that is not quantised, for a while or for good.

W = W0 + scale B A, computed in float32 and rounded once to the weight's type, always from W0: so
rounding does not add up over rounds. W0 is kept on the host and copied back, never got back by
subtracting: afterwards the base has the bytes that it was loaded with. On the CPU this takes the
memory of the adapted layers a second time.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from participant.model.fingerprint import fingerprint_of
from participant.model.libraries import offline, peft, transformers
from participant.model.loading import LOADING_ERRORS, find_folder, quantisation_facts
from shared.adapters import kind_of
from shared.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from shared.adapters import Layer
    from shared.config import BaseSection
    from shared.protocol.manifest import Manifest


class AdaptedLayer(NamedTuple):
    """A layer of the base with an adapter. ``scale``: of the product of its ``factors``.

    ``is_transposed``: the weight is (inputs, outputs), as in GPT-2's Conv1D.
    """

    factors: Layer
    weight: torch.nn.Parameter
    scale: float
    is_transposed: bool


def adapted_layers(network: torch.nn.Module, manifest: Manifest) -> list[AdaptedLayer]:
    """The layers of an adapter, each with a weight that can be merged into.

    ``network``: as PEFT wrapped it. Raises ModelError for a weight that is quantised, or that
    another layer uses too: merged there, the adapter would act in both.
    """
    uses: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    layers = []
    for factors in kind_of(manifest).layers(manifest):
        name = factors.name
        module: Any = network.get_submodule(name)
        weight = module.base_layer.weight
        if not weight.is_floating_point():
            raise ModelError(
                f"{name}: expected a weight that is not quantised to merge an adapter into, got "
                f'{weight.dtype}; use base.quantisation = "none", or another averaging than flora'
            )
        if uses[id(weight)] > 1:
            raise ModelError(
                f"{name}: expected a weight of its own to merge an adapter into, got one that "
                "another layer shares; leave it out of lora.target_modules"
            )
        (scale,) = module.scaling.values()
        layers.append(AdaptedLayer(factors, weight, scale, module.fan_in_fan_out))
    return layers


@contextlib.contextmanager
def merged(layers: Iterable[AdaptedLayer], read: Callable[[str], NDArray[Any]]) -> Iterator[None]:
    """Inside the block each weight is W0 + scale B A; afterwards W0, whatever happened.

    ``read(name)``: float32 factors of any one rank, 0 too. Raises ModelError for one that does not
    fit the weight.
    """
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                b, a = read(layer.factors.left.name), read(layer.factors.right.name)
                product = _product(layer, b, a)
                if product is None:
                    continue
                kept.append((layer.weight, layer.weight.detach().to("cpu", copy=True)))
                layer.weight.copy_(layer.weight.float() + layer.scale * product)
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def save_merged(base: BaseSection, fingerprint: str, adapter: Path, target: Path) -> None:
    """Write ``base`` with a PEFT adapter merged into it, and its tokenizer, as a model of its own.

    The base's own weights are taken, in their own type, also of a run that held them quantised.
    Raises ModelError for one that cannot be loaded or has not the run's ``fingerprint``.
    """
    folder = find_folder(base.model)
    found = fingerprint_of(folder, quantisation_facts(base))
    if found != fingerprint:
        raise ModelError(
            f"base.model: expected fingerprint {fingerprint}, which the run was trained over, got "
            f"{found} of {folder}; name the folder or hub id of that model by --base"
        )
    with offline():
        try:
            network = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except LOADING_ERRORS as error:
            raise ModelError(f"base.model: {folder} cannot be loaded: {error}") from error
        whole: Any = peft.PeftModel.from_pretrained(network, str(adapter))
        whole.merge_and_unload(safe_merge=True).save_pretrained(target)
        tokenizer.save_pretrained(target)


def _product(
    layer: AdaptedLayer, b: NDArray[np.float32], a: NDArray[np.float32]
) -> torch.Tensor | None:
    """B A in float32, of the weight's shape; None where it is zero."""
    used = b.any(axis=0)
    if not used.any():
        return None
    device = layer.weight.device
    left, right = (torch.from_numpy(part.copy()).to(device) for part in (b[:, used], a[used]))
    product = left @ right
    if layer.is_transposed:
        product = product.T
    if product.shape != layer.weight.shape:
        raise ModelError(
            f"adapter: {layer.factors.name}: expected factors of a weight "
            f"{tuple(layer.weight.shape)}, got B A of "
            f"{tuple(product.shape)}; is it an adapter of this base model?"
        )
    return product
