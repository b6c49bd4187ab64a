"""The keys of an embedded federation: made in its own folder, enrolled in its own store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.runs.operating import operator
from coordinator.site_keys import SiteKeys, enrol
from shared.trust.keys import IDENTITY_FILE, SigningKey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore


@dataclass(frozen=True)
class Keys:
    """What each role signs with. ``sites``: by name."""

    coordinator: SigningKey
    sites: Mapping[str, SigningKey]


def keys_of(
    config: FederationConfig,
    store: ObjectStore,
    folder: Path,
    clock: Callable[[], float] = time.time,
) -> Keys | None:
    """Every role's key, made where it has none; None without ``[trust]``: nobody signs.

    Raises ConfigError, for a site's key that was revoked too, StoreError, LedgerDamagedError.
    """
    if config.trust is None:
        return None
    signer = SigningKey.kept(folder / config.trust.key_file, "trust.key_file")
    sites = {
        site: SigningKey.kept(folder / "sites" / site / IDENTITY_FILE, f"the key of {site}")
        for site in config.run.participants
    }
    known = SiteKeys(store, signer.public)
    for site, key in sites.items():
        enrol(known, signer, site, key.public, "all in one process", operator(), clock)
    return Keys(signer, sites)
