"""The one place that knows LoRA's two factors: an adapter adds B A to a layer's weight.

A is (rank, inputs) and B is (outputs, rank), under PEFT's names. Which of them a site trains in a
round is the averaging mode's to say (``shared/methods/averaging``). Pure. All other code handles
named tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from shared.config import LoraSection
    from shared.protocol.manifest import Manifest, TensorSpec

A: Final = ".lora_A.weight"
B: Final = ".lora_B.weight"


class Pair(NamedTuple):
    """The factors of one layer."""

    a: TensorSpec
    b: TensorSpec


def is_a(name: str) -> bool:
    """Whether a tensor is the factor next to the layer's input."""
    return name.endswith(A)


def is_b(name: str) -> bool:
    """Whether a tensor is the factor next to the layer's output."""
    return name.endswith(B)


def layer_of(name: str) -> str:
    """The layer that a factor belongs to. Raises ValueError for a tensor that is no factor."""
    for suffix in (A, B):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    raise ValueError(f"{name}: expected a name that ends in {A} or {B}")


def pairs(manifest: Manifest) -> tuple[Pair, ...]:
    """Every layer's factors, by the layer's name; tensors that have no partner are left out."""
    by_name = {spec.name: spec for spec in manifest.tensors}
    found = []
    for name, spec in by_name.items():
        partner = by_name.get(layer_of(name) + B) if is_a(name) else None
        if partner is not None and _fit(spec, partner):
            found.append(Pair(spec, partner))
    return tuple(found)


def is_factors_only(manifest: Manifest) -> bool:
    """Whether every tensor of an adapter is one of two factors that can be multiplied."""
    return 2 * len(pairs(manifest)) == len(manifest.tensors)


def factors(manifest: Manifest, suffix: str, averaging: str) -> Manifest:
    """One of the two factors of every layer. Raises ConfigError for an adapter without such."""
    tensors = tuple(spec for spec in manifest.tensors if spec.name.endswith(suffix))
    if not tensors:
        raise ConfigError(
            f'aggregation.averaging = "{averaging}": expected an adapter with tensors *{suffix}, '
            'got one without; set it to "fedavg"'
        )
    return manifest.model_copy(update={"tensors": tensors})


def rank_of(lora: LoraSection, site: str) -> int:
    """The rank of a site's own adapter."""
    return lora.ranks.get(site, lora.rank)


def lora_for(lora: LoraSection, site: str) -> LoraSection:
    """The settings for one site: its rank, and the alpha that keeps the product's scale.

    The scale is alpha / rank (``classic``) or alpha / sqrt(rank) (``rslora``). Were it another at
    each site, the sum of their products would be of no one scale.
    """
    if not lora.ranks:
        return lora
    return lora_of_rank(lora, rank_of(lora, site))


def lora_of_rank(lora: LoraSection, rank: int) -> LoraSection:
    """The settings at another rank, with the alpha that keeps the product's scale."""
    part = rank / lora.rank
    alpha = lora.alpha * (part if lora.scaling == "classic" else math.sqrt(part))
    return lora.model_copy(update={"rank": rank, "alpha": alpha, "ranks": {}})


def whole_manifest(manifest: Manifest, lora: LoraSection) -> Manifest:
    """The run's adapter, from the manifest of any site."""
    return of_rank(manifest, lora.rank) if lora.ranks else manifest


def site_manifest(manifest: Manifest, lora: LoraSection, site: str) -> Manifest:
    """A site's own adapter, from the manifest of the run's or of any other site's."""
    return of_rank(manifest, rank_of(lora, site)) if lora.ranks else manifest


def leading(name: str, values: NDArray[Any], rank: int) -> NDArray[Any]:
    """The first ``rank`` rows of A or columns of B, as a view; all of any other tensor.

    What a site of that rank trains. With ``svd`` the directions come in the order of their weight,
    so these are the best adapter of that rank; with ``flora`` they all begin anew in each round.
    """
    if is_a(name):
        return values[:rank]
    if is_b(name):
        return values[:, :rank]
    return values


def beyond(name: str, values: NDArray[Any], rank: int) -> NDArray[Any]:
    """What ``leading`` leaves of a factor, as a view: all of it but the first directions.

    Raises ValueError for a tensor that is no factor.
    """
    if is_a(name):
        return values[rank:]
    if is_b(name):
        return values[:, rank:]
    raise ValueError(f"{name}: expected a name that ends in {A} or {B}")


def of_rank(manifest: Manifest, rank: int) -> Manifest:
    """The same layers with factors of another rank."""
    return manifest.model_copy(update={"tensors": tuple(_ranked(manifest, rank))})


def _fit(a: TensorSpec, b: TensorSpec) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]


def _ranked(manifest: Manifest, rank: int) -> Iterator[TensorSpec]:
    for spec in manifest.tensors:
        shape = spec.shape
        if is_a(spec.name):
            shape = (rank, *shape[1:])
        elif is_b(spec.name):
            shape = (*shape[:1], rank, *shape[2:])
        yield spec.model_copy(update={"shape": shape})
