"""Whose key may sign a message to the coordinator: asked for each, looked up seldom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from coordinator.site_keys import SiteKeys
from shared import topology
from shared.errors import SignatureError, StoreUnavailableError
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.stores.port import ObjectStore
    from shared.trust.keys import PublicKey

LOOK_SECONDS = 5.0  # a revocation counts so soon
UNKNOWN_SECONDS = 1.0  # an unknown key is looked up at most so often, whoever shows it


class KeyBook:
    """Which key may sign a message, asked once for each. ``timer``: seconds that only grow."""

    def __init__(
        self,
        store: ObjectStore,
        coordinator: PublicKey,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys = SiteKeys(store, coordinator)
        self._timer = timer
        self._looked: float | None = None

    def key_of(self, sender: str, by: str) -> PublicKey:
        """The key named ``by``, if the sender may sign by it now.

        Raises SignatureError if not, StoreError where nobody can look, LedgerDamagedError.
        """
        if sender == topology.COORDINATOR:
            if by == self.keys.coordinator.text:
                return self.keys.coordinator
            raise SignatureError(f"signature: expected the coordinator's own, got one by {by}")
        try:
            self._look(LOOK_SECONDS)
        except StoreUnavailableError as error:
            if self._looked is None:
                raise
            get_logger().debug("keys.skipped", reason=str(error))
        if self.keys.find(sender, by) is None:
            self._look(UNKNOWN_SECONDS)
        found = self.keys.find(sender, by)
        if found is None:
            raise SignatureError(
                f"signature: expected one by the key enrolled for {sender}, got one by {by}; if "
                "the site has a new key, have its fingerprint read out, then: gradualdiff sites "
                f"key {sender} --key {by}"
            )
        if found.revoked is not None:
            raise SignatureError(
                f"signature: the key {found.public.fingerprint} of {sender} was revoked "
                f"({found.reason}); it counts for nothing since"
            )
        return found.public

    def _look(self, seconds: float) -> None:
        """Read what is new, unless that was done so many seconds ago."""
        now = self._timer()
        if self._looked is not None and now - self._looked < seconds:
            return
        self.keys.read_on()
        self._looked = now
