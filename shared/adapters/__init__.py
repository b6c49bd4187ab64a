"""What an adapter is made of: one file in this folder per kind, which sets ``KIND``. Pure.

All that the program has to know of a kind's tensors and settings it asks of that object, and no
tensor is named elsewhere. Only the model itself makes one: participant/model/kinds/.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shared.config import BaseSection, LoraSection
    from shared.protocol.manifest import Init, Manifest, TensorSpec

AdapterSettings: TypeAlias = "LoraSection"  # of whatever kind
Side = Literal["left", "right"]


class Factor(NamedTuple):
    """One of the two factors of every layer: how its tensors' names end, and how they begin."""

    ending: str
    init: Init


class Layer(NamedTuple):
    """A layer of the base to whose weight the adapter adds ``left @ right``, scaled.

    ``left``: (outputs, rank). ``right``: (rank, inputs).
    """

    name: str
    left: TensorSpec
    right: TensorSpec


class AdapterKind:
    """A kind says what its factors and its settings are; what follows from them is said here.

    ``name``: as the model card's tags have it. ``factors``: by their side of a layer's product. A
    kind of other tensors has none: then no mode that needs factors takes it (``factors_only``).
    """

    name: ClassVar[str]
    factors: ClassVar[Mapping[Side, Factor]]
    no_lora: ClassVar[str] = ""
    """Why such an adapter cannot be written as a LoRA adapter; empty: it can."""
    has_bases: ClassVar[bool] = False
    """Whether its tensors mean nothing without frozen bases of the same layers."""

    # Settings ----------------------------------------------------------------------------------

    def rank(self, settings: AdapterSettings, site: str = "") -> int:
        """The rank of a site's own adapter; without a site, of the run's."""
        raise NotImplementedError

    def at_rank(self, settings: AdapterSettings, rank: int) -> AdapterSettings:
        """The settings of an adapter of this rank, of which a layer's product counts as much."""
        raise NotImplementedError

    def scale(self, settings: AdapterSettings) -> dict[str, Any]:
        """What makes equal tensors another model, by its field of ``origin.json``."""
        raise NotImplementedError

    def describe(self, settings: AdapterSettings) -> str:
        """The adapter in a sentence of the model card."""
        raise NotImplementedError

    def peft_config(
        self, base: BaseSection, settings: AdapterSettings, manifest: Manifest
    ) -> bytes:
        """``adapter_config.json`` beside an adapter's tensors, so that PEFT loads them."""
        raise NotImplementedError

    # Tensors -----------------------------------------------------------------------------------

    def init(self, tensor: str) -> Init | None:
        """How a tensor begins; None for one that is not of this kind."""
        side = self.side(tensor)
        return None if side is None else self.factors[side].init

    def side(self, tensor: str) -> Side | None:
        """Which factor a tensor is: the left one stands next to the layer's output."""
        for side, factor in self.factors.items():
            if tensor.endswith(factor.ending):
                return side
        return None

    def layer_of(self, tensor: str) -> str:
        """The layer that a factor belongs to. Raises ValueError for a tensor that is no factor."""
        side = self.side(tensor)
        if side is None:
            endings = " or ".join(sorted(factor.ending for factor in self.factors.values()))
            raise ValueError(f"{tensor}: expected a name that ends in {endings}")
        return tensor.removesuffix(self.factors[side].ending)

    def layers(self, manifest: Manifest) -> tuple[Layer, ...]:
        """Every layer with both its factors; tensors that have no partner are left out."""
        sides: dict[Side, dict[str, TensorSpec]] = {"left": {}, "right": {}}
        for spec in manifest.tensors:
            side = self.side(spec.name)
            if side is not None and len(spec.shape) == 2:
                sides[side][self.layer_of(spec.name)] = spec
        lefts = sides["left"]
        return tuple(
            Layer(name, lefts[name], right)
            for name, right in sides["right"].items()
            if name in lefts and lefts[name].shape[1] == right.shape[0]
        )

    def is_factors_only(self, manifest: Manifest) -> bool:
        """Whether every tensor of an adapter is one of two factors that can be multiplied."""
        return 2 * len(self.layers(manifest)) == len(manifest.tensors)

    def only(self, manifest: Manifest, side: Side, averaging: str) -> Manifest:
        """One of the two factors of every layer. Raises ConfigError for an adapter without such."""
        tensors = tuple(spec for spec in manifest.tensors if self.side(spec.name) == side)
        if not tensors:
            wanted = f"*{self.factors[side].ending}" if side in self.factors else "of two factors"
            raise ConfigError(
                f'aggregation.averaging = "{averaging}": expected an adapter with tensors '
                f'{wanted}, got one without; set it to "fedavg"'
            )
        return manifest.model_copy(update={"tensors": tensors})

    # Ranks -------------------------------------------------------------------------------------

    def for_site(self, settings: AdapterSettings, site: str) -> AdapterSettings:
        """The settings as one site is told them. It is not told the others' names."""
        return self.at_rank(settings, self.rank(settings, site)) if settings.ranks else settings

    def manifest_for(
        self, manifest: Manifest, settings: AdapterSettings, site: str = ""
    ) -> Manifest:
        """A site's own adapter from the manifest of any site's or the run's; no site: the run's."""
        if not settings.ranks:
            return manifest
        return self.of_rank(manifest, self.rank(settings, site))

    def of_rank(self, manifest: Manifest, rank: int) -> Manifest:
        """The same layers with factors of another rank."""
        tensors = []
        for spec in manifest.tensors:
            shape = list(spec.shape)
            side = self.side(spec.name)
            if side is not None:
                shape[0 if side == "right" else 1] = rank
            tensors.append(spec.model_copy(update={"shape": tuple(shape)}))
        return manifest.model_copy(update={"tensors": tuple(tensors)})

    def directions(self, tensor: str, values: NDArray[Any]) -> NDArray[Any]:
        """A factor as a view with a row for each direction: the right one is that already.

        Raises ValueError for a tensor that is no factor.
        """
        self.layer_of(tensor)
        return values if self.side(tensor) == "right" else values.swapaxes(0, 1)

    def leading(self, tensor: str, values: NDArray[Any], rank: int) -> NDArray[Any]:
        """A factor's first ``rank`` directions, as a view; all of any other tensor.

        What a site of that rank trains. With ``svd`` the directions come in the order of their
        weight, so these are the best adapter of that rank; with ``flora`` they all begin anew in
        each round.
        """
        if self.side(tensor) is None:
            return values
        return self.directions(tensor, self.directions(tensor, values)[:rank])

    def beyond(self, tensor: str, values: NDArray[Any], rank: int) -> NDArray[Any]:
        """What ``leading`` leaves of a factor, as a view.

        Raises ValueError for a tensor that is no factor.
        """
        return self.directions(tensor, self.directions(tensor, values)[rank:])


def kind_of(described: AdapterSettings | Manifest, /) -> AdapterKind:
    """The kind of the adapter that settings or a manifest describe."""
    return cast("AdapterKind", importlib.import_module(f"{__name__}.{described.kind}").KIND)
