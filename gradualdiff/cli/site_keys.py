"""For ``sites`` and ``setup``: the sites' public keys, enrolled by the coordinator's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradualdiff.cli.kits import signer_of

if TYPE_CHECKING:
    from coordinator.site_keys import SiteKeys
    from gradualdiff.cli.kits import Servers
    from shared.trust.keys import PublicKey


def known_keys(servers: Servers) -> SiteKeys:
    """Every site's keys. Raises ConfigError, StoreError, LedgerDamagedError."""
    from coordinator.site_keys import SiteKeys

    return SiteKeys(servers.store, signer_of(servers).public).read_on()


def enrol_key(servers: Servers, site: str, public: PublicKey, reason: str) -> bool:
    """Make it the site's key from now on; whether it was not so. Raises ConfigError."""
    from coordinator.runs.operating import operator
    from coordinator.site_keys import enrol

    signer = signer_of(servers)
    return enrol(known_keys(servers), signer, site, public, reason, operator())


def revoke_key(servers: Servers, site: str, reason: str) -> str | None:
    """End the site's key now; its fingerprint, None where it has none in force."""
    from coordinator.runs.operating import operator
    from coordinator.site_keys import revoke

    gone = revoke(known_keys(servers), signer_of(servers), site, reason, operator())
    return None if gone is None else gone.public.fingerprint


def keys_told(servers: Servers, site: str) -> list[dict[str, Any]]:
    """A site's keys as they are shown, oldest first; none where nobody signs."""
    from coordinator.liveness import moment

    if servers.config.trust is None:
        return []
    return [
        {
            "key": key.public.text,
            "fingerprint": key.public.fingerprint,
            "enrolled": moment(key.enrolled),
            "revoked": moment(key.revoked),
            "reason": key.reason,
        }
        for key in known_keys(servers).sites.get(site, ())
    ]
