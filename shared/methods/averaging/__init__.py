"""How sites' factors become one adapter: one file in this folder per mode, found by its name.

A new mode is a new file here that sets ``MODE``, or another package's: ``shared/modes.py``. What
the program has to know of a mode it asks of that object: settings, announcement, closing,
verification, export and branching compare no name. Federated averaging is what :class:`Averaging`
itself says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from shared import modes
from shared.adapters import kind_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from shared.adapters import AdapterSettings
    from shared.config import FederationConfig
    from shared.methods.inputs import Inputs
    from shared.protocol.manifest import Manifest
    from shared.protocol.records import ClosingRecord


class Averaging:
    """The paper's: every tensor is trained, and the mean of the deltas is added, value by value."""

    by_value: bool = True
    """Whether values are joined one by one, so that robust rules and optimisers can take them."""

    factors_only: bool = False
    """Whether every tensor of the adapter must be one of a layer's two factors."""

    takes_ranks: bool = False
    """Whether sites may have adapters of several ranks."""

    renews: str = ""
    """Why what was remembered of factors cannot outlive a round, as a verb; empty: it can."""

    merges: bool = False
    """Whether sites merge past rounds into their base, so that the adapter's rank grows."""

    makes_bases: bool = False
    """Whether a run makes bases for other runs and no model: a site sends one gradient a round, of
    the tensors that are trained, and nobody measures or exports an adapter.
    """

    consent: str = ""
    """The setting of a site's ``[accept]`` that must allow this mode; empty: none."""

    shows: str = ""
    """What ``consent`` is asked for, as a clause."""

    joined: str = ""
    """How a round's adapter came of the one before, for the model card; empty: by rule and step."""

    no_branch_to: str = ""
    """Why a run with this mode cannot begin with another run's adapter; empty: it can."""

    no_branch_from: str = ""
    """Why no run can begin with an adapter of a run with this mode; empty: it can."""

    tolerance: float = 0.0
    """How far a recomputed adapter may be from the stored one by :meth:`distance`; 0: nowhere."""

    def misfits(self, _config: FederationConfig, /) -> Iterator[str]:
        """Settings that this mode does not go with: field, what to do."""
        yield from ()

    def depths(self, _rank: int, /) -> tuple[int, ...]:
        """The ranks whose part of the gradient is on record, for a mode that makes bases."""
        return ()

    def trained_in(self, manifest: Manifest, _number: int, /) -> Manifest:
        """The tensors that are trained in a round and sent after it; the others stay.

        Raises ConfigError for an adapter without such tensors.
        """
        return manifest

    def join(
        self, _inputs: Inputs, _threads: int, /
    ) -> tuple[Manifest, Generator[NDArray[np.float32]]]:
        """The next adapter's manifest and its tensors in order, where not joined by value.

        ``_threads``: how many may work.
        """
        raise NotImplementedError

    def distance(self, _one: Path, _other: Path, _manifest: Manifest, /) -> float:
        """How far two adapters are apart, where ``tolerance`` is not 0."""
        raise NotImplementedError

    def settings_in(self, _adapter: Path, settings: AdapterSettings, /) -> AdapterSettings:
        """The run's settings as PEFT needs them for this adapter file."""
        return settings

    def settings_after(
        self,
        _closings: Iterable[ClosingRecord | None],
        settings: AdapterSettings,
        /,
    ) -> AdapterSettings | None:
        """The same from all decisions so far; None where one that it follows from is missing."""
        return settings


def get_averaging(name: str) -> Averaging:
    """The mode of this name. Raises ConfigError that lists the known ones."""
    return cast("Averaging", modes.get("averaging", name))


def delta_manifest(
    manifest: Manifest, config: FederationConfig, site: str, number: int
) -> Manifest:
    """What a delta of ``site`` from round ``number`` is made of; ``manifest``: the run's."""
    own = kind_of(manifest).manifest_for(manifest, config.lora, site)
    return get_averaging(config.aggregation.averaging).trained_in(own, number)
