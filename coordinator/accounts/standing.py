"""Which sites' accounts have ended, as a coordinator at work sees it: removed, or past their time.

The broker refuses whoever was cut off. What lies in queues, and who is connected still, is met by
this: nothing such a site sends is taken, and nothing is sent to it. Looked up every half minute,
and only what changed is read. A store that is away leaves what was known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coordinator.accounts.site_accounts import find_account
from shared.errors import LedgerDamagedError, StoreError
from shared.log import get_logger
from shared.topology import account_key, account_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coordinator.accounts.site_accounts import SiteAccount
    from shared.stores.port import ObjectStore

LOOK_SECONDS: Final = 30.0


class Standing:
    """Of the run's ``sites``. ``clock``: seconds since the epoch. A site without an account is in.

    An embedded federation has no accounts at all.
    """

    def __init__(
        self, store: ObjectStore, sites: tuple[str, ...], clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._keys = {account_key(site): site for site in sites}
        self._clock = clock
        self._looked: float | None = None
        self._known: dict[str, tuple[str, SiteAccount | None]] = {}  # by site, with its etag
        self._warned: set[tuple[str, float | None]] = set()

    def look(self, *, now: bool = False) -> None:
        """Read what changed, unless that was done a moment ago (``now``: all the same)."""
        if not now and self._looked is not None and self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        try:
            for info in self._store.list(account_prefix()):
                site = self._keys.get(info.key)
                if site is not None and self._known.get(site, ("", None))[0] != info.etag:
                    self._known[site] = (info.etag, self._read(site))
        except StoreError as error:
            get_logger().debug("accounts.skipped", reason=str(error))
        self._warn()

    def ended(self, site: str) -> str:
        """Why this site's account has ended; empty where it has not."""
        account = self._known.get(site, ("", None))[1]
        return "" if account is None else account.ended(self._clock())

    def all_ended(self) -> Mapping[str, str]:
        """Every such site, with why."""
        found = {site: self.ended(site) for site in sorted(self._known)}
        return {site: why for site, why in found.items() if why}

    def _read(self, site: str) -> SiteAccount | None:
        try:
            return find_account(self._store, site)
        except LedgerDamagedError as error:  # that is no word against the site
            get_logger().warning("account.damaged", site=site, reason=str(error))
            return None

    def _warn(self) -> None:
        """Tell the log once of each account that has ended, or will soon."""
        for site, (_, account) in sorted(self._known.items()):
            if account is None:
                continue
            why, soon = account.ended(self._clock()), account.ends_soon(self._clock())
            mark = (f"{site} {bool(why)}", account.expires_at)
            if mark in self._warned or not (why or soon):
                continue
            self._warned.add(mark)
            if why:
                get_logger().warning("account.ended", site=site, reason=why)
            else:
                get_logger().warning("account.expires", site=site, reason=soon)
