"""The sites of a simulation: their files, and one learner for each over one base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shared.config import load_site
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from pathlib import Path

    from participant.learner.model_pool import ModelPool
    from participant.learner.torch_learner import TorchLearner
    from shared.config import FederationConfig, SiteConfig


def load_learners(
    config: FederationConfig, folder: Path, pool: ModelPool | None = None
) -> dict[str, TorchLearner]:
    """One learner per participant over one shared base model, from the sites' files.

    ``pool``: where that model may be already. Raises as ``load_sites`` does, and where the sites
    do not agree on a device.
    """
    sites = load_sites(config, folder)
    devices = {site.device.kind for site, _ in sites}
    if len(devices) > 1:
        raise ConfigError(
            f"device.kind: expected one for all sites of a simulation, got {sorted(devices)}: "
            "they share one base model"
        )
    pool = pool or make_pool(devices.pop(), folder)
    from participant.learner.torch_learner import TorchLearner

    return {
        site.site.name: TorchLearner(site.site.name, site.data, base, pool, site.privacy)
        for site, base in sites
    }


def make_pool(device: Literal["auto", "cpu", "cuda"], folder: Path) -> ModelPool:
    """An empty place for a base model. Raises MissingPackageError."""
    try:
        from participant.learner.model_pool import ModelPool
    except ImportError as error:
        raise MissingPackageError(
            f"training needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant]'"
        ) from None
    return ModelPool(device, folder)


def load_sites(config: FederationConfig, folder: Path) -> list[tuple[SiteConfig, Path]]:
    """The sites of a simulation, each with the folder that its paths are relative to.

    Raises ConfigError when the files are not those of the run's participants.
    """
    paths = [folder / name for name in config.simulation.sites]
    if not paths:
        raise ConfigError("simulation.sites: expected the sites' files, got none; list them")
    sites: list[tuple[SiteConfig, Path]] = []
    mistakes: list[str] = []
    for path in paths:
        try:
            sites.append((load_site(path), path.resolve().parent))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    names = [site.site.name for site, _ in sites]
    wanted = sorted(config.run.participants)
    if sorted(names) != wanted:
        raise ConfigError(
            f"simulation.sites: expected the files of {', '.join(wanted)} (run.participants), "
            f"got those of {', '.join(sorted(names))}"
        )
    return sites
