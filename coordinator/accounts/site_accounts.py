"""The sites' accounts on the broker: made, renewed, taken away, and made again after a loss.

The store is the truth, the broker a copy of it: ``sites/<name>.json`` holds each account's password
as the hash that the broker itself keeps, so that a wiped broker gets its accounts back and the
sites' passwords keep working. A password is in nobody's records.

A change is recorded first, then made on the broker, then recorded as done. Between the first and
the last the record says what is under way and still holds the hash of the password that the site
really has. Repeating the same call heals a crash anywhere: ``add`` and ``rotate`` choose another
password, since the first one was given to nobody; ``remove`` removes again.

One person at a time changes a site's account: a record that somebody else changed meanwhile is a
ConfigError, and ``rotate`` fixes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from base64 import b64encode
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from shared.config import NAME_PATTERN, RESERVED_NAMES, Name, canonical_json
from shared.errors import ConfigError, LedgerDamagedError, ObjectExistsError, ObjectMissingError
from shared.protocol.manifest import Schema
from shared.topology import (
    EVENTS_EXCHANGE,
    INBOX,
    account_key,
    account_prefix,
    site_of_inbox,
    site_rights,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.accounts.broker_administration import BrokerAdmin
    from shared.stores.port import ObjectStore

PASSWORD_BYTES = 32
MOST_CONNECTIONS = 8  # of one site: it has one, a second while its doctor runs, some that are dying
MOST_CHANNELS = 64
WARN_SECONDS = 14 * 86_400.0  # before an account ends
NAME_RULE = "1 to 40 of a-z 0-9 -, no - at the beginning"


# What an account is ------------------------------------------------------------------------------


def hash_password(password: str) -> str:
    """RabbitMQ's salted sha256, base64(salt + sha256(salt + password)) with four bytes of salt."""
    salt = secrets.token_bytes(4)
    return b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(site: str, password_hash: str, vhost: str) -> dict[str, list[dict[str, Any]]]:
    """What RabbitMQ imports to give ``site`` its account, with the rights of ``site_rights``."""
    rights = site_rights(site)
    return {
        "users": [
            {
                "name": site,
                "password_hash": password_hash,
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
                "limits": {"max-connections": MOST_CONNECTIONS, "max-channels": MOST_CHANNELS},
            }
        ],
        "permissions": [
            {
                "user": site,
                "vhost": vhost,
                "configure": rights.configure.pattern,
                "write": rights.write.pattern,
                "read": rights.read.pattern,
            }
        ],
        "topic_permissions": [
            {
                "user": site,
                "vhost": vhost,
                "exchange": EVENTS_EXCHANGE,
                "write": rights.topic_write.pattern,
                "read": "^$",
            }
        ],
    }


class SiteAccount(Schema):
    """A site's record."""

    site: Name
    version: Annotated[int, Field(ge=1)]
    """Grows with every change."""
    state: Literal["adding", "active", "rotating", "removing", "removed"]
    """What is under way, or done."""
    password_hash: str | None
    """The password's salted hash, as RabbitMQ keeps it; none where there is none."""
    created: float
    """When it was made, seconds since the epoch."""
    changed: float
    """When it was changed, seconds since the epoch."""
    expires_at: float | None = None
    """When it ends, seconds since the epoch; none: it does not end by itself."""

    def ended(self, now: float) -> str:
        """Why the site is out; empty where it is in. ``now``: seconds since the epoch."""
        if self.state in ("removing", "removed"):
            return f"the account of {self.site} was removed"
        if self.expires_at is not None and self.expires_at <= now:
            return f"the account of {self.site} ended on {_day(self.expires_at)}"
        return ""

    def ends_soon(self, now: float) -> str:
        """That it will end within two weeks, and what to do; empty where it will not."""
        if self.expires_at is None or self.expires_at - now > WARN_SECONDS:
            return ""
        return (
            f"the account of {self.site} ends on {_day(self.expires_at)}; gradualdiff sites renew "
            f"{self.site} --valid-days N"
        )


def list_accounts(store: ObjectStore) -> list[SiteAccount]:
    """Every site's record, by name, removed ones too. Raises LedgerDamagedError."""
    accounts = []
    for info in store.list(account_prefix()):
        with contextlib.suppress(ObjectMissingError):
            accounts.append(_read(store, info.key))
    return accounts


def find_account(store: ObjectStore, site: str) -> SiteAccount | None:
    """The site's record, None without one; needs no broker.

    Raises ConfigError for a name that cannot be, LedgerDamagedError.
    """
    _check_name(site)
    try:
        return _read(store, account_key(site))
    except ObjectMissingError:
        return None


class Accounts:
    """The sites' accounts in one virtual host. ``clock``: seconds since the epoch.

    Every method raises the store's errors; those that change something the broker's too.
    """

    def __init__(
        self,
        store: ObjectStore,
        admin: BrokerAdmin,
        vhost: str,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._broker = admin
        self._vhost = vhost
        self._clock = clock

    def add(self, site: str, expires_at: float | None = None) -> str:
        """Give a site an account; the password, which is kept nowhere else.

        ``expires_at``: when it ends, seconds since the epoch; None: not by itself.

        Raises ConfigError as :meth:`check_new` does. Repeated after a crash in it: a new password.
        """
        found = self.check_new(site)
        now = self._clock()
        account = SiteAccount(
            site=site,
            version=1 if found is None else found.version + 1,
            state="adding",
            password_hash=None,
            created=now,
            changed=now,
            expires_at=expires_at,
        )
        if found is None:
            self._create(account)
        else:
            self._write(account)
        return self._give_password(account)

    def rotate(self, site: str) -> str:
        """Give a site another password and cut the old one off at once; the new password.

        Raises ConfigError when the site has no account. Repeated after a crash in it: yet another
        password; until then ``restore`` brings the old one back.
        """
        found = self._existing(site)
        if found.state == "removing":
            raise ConfigError(
                f"site {site}: is only partly removed; repeat gradualdiff sites remove {site}"
            )
        if found.ended(self._clock()):
            raise ConfigError(
                f"site {site}: {found.ended(self._clock())}; gradualdiff sites renew {site} first"
            )
        return self._give_password(self._write(self._next(found, "rotating")))

    def renew(self, site: str, expires_at: float | None) -> None:
        """Let an account last until ``expires_at`` (None: for ever), with the password it has.

        Raises ConfigError when the site has none, or one that is half made or half removed.
        Repeatable.
        """
        found = self._existing(site)
        if found.state != "active" or found.password_hash is None:
            raise ConfigError(
                f"site {site}: expected an account that is active, got one that is {found.state}; "
                "repeat that command first"
            )
        renewed = self._write(
            found.model_copy(
                update={
                    "version": found.version + 1,
                    "changed": self._clock(),
                    "expires_at": expires_at,
                }
            )
        )
        if not renewed.ended(self._clock()):
            self._broker.apply(definitions(site, found.password_hash, self._vhost))

    def expire(self) -> list[str]:
        """Cut off every site whose account has ended by itself; their names. Repeatable.

        Its record stays, so that :meth:`renew` brings it back with the same password.
        """
        on_broker = set(self._broker.accounts())
        gone = []
        for account in self.list():
            is_there = account.state not in ("removing", "removed") and account.site in on_broker
            if is_there and account.ended(self._clock()):
                self._broker.delete(account.site)
                self._broker.disconnect(account.site)
                self._clear_inbox(account.site)
                gone.append(account.site)
        return gone

    def remove(self, site: str) -> None:
        """Take a site's account away, close its connections, empty its inbox; its queue stays.

        Raises ConfigError when the site never had one. Repeated it empties the inbox again, since
        a URL outlives the account.
        """
        found = find_account(self._store, site)
        if found is None:
            raise unknown_site(site)
        if found.state == "removed":
            self._clear_inbox(site)
            return
        going = self._write(self._next(found, "removing"))
        self._broker.delete(site)
        self._broker.disconnect(site)
        self._clear_inbox(site)
        self._write(going.model_copy(update={"state": "removed", "password_hash": None}))

    def restore(self) -> list[str]:
        """Make every account anew with the password its site holds, and finish removals.

        For a wiped broker; on any other it changes only what differs from the records: also who
        has ended is cut off. Returns the names of the sites that can log in afterwards. Repeatable.
        """
        self.expire()
        everything: dict[str, list[dict[str, Any]]] = {}
        restored = []
        for account in self.list():
            if account.state == "removing":
                self.remove(account.site)
            elif account.password_hash is not None and not account.ended(self._clock()):
                restored.append(account.site)
                parts = definitions(account.site, account.password_hash, self._vhost)
                for kind, entries in parts.items():
                    everything.setdefault(kind, []).extend(entries)
        if restored:
            self._broker.apply(everything)
        return restored

    def list(self) -> list[SiteAccount]:
        """As :func:`list_accounts`."""
        return list_accounts(self._store)

    def exists(self, site: str) -> bool:
        """Whether the site has an account that nobody removed. Raises as find_account does."""
        found = find_account(self._store, site)
        return found is not None and found.state != "removed"

    def check_new(self, site: str) -> SiteAccount | None:
        """The record that ``add`` would continue from, None without one.

        Raises ConfigError for a site that is there already, for a name that cannot be, and for an
        account on the broker which is not ours: it may be the administrator's.
        """
        found = find_account(self._store, site)
        if found is None or found.state == "removed":
            if site in self._broker.accounts():
                raise ConfigError(
                    f"site {site}: the broker has an account of this name that is no site's; "
                    "choose another name"
                )
        elif found.state == "removing":
            raise ConfigError(
                f"site {site}: is only partly removed; repeat gradualdiff sites remove {site}"
            )
        elif found.state != "adding":
            raise ConfigError(
                f"site {site}: already exists; gradualdiff sites rotate {site} makes a new "
                "password and writes the kit again"
            )
        return found

    def _give_password(self, account: SiteAccount) -> str:
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        hashed = hash_password(password)
        self._broker.apply(definitions(account.site, hashed, self._vhost))
        self._broker.disconnect(account.site)
        if find_account(self._store, account.site) != account:
            raise _changed_meanwhile(account.site)
        self._write(account.model_copy(update={"state": "active", "password_hash": hashed}))
        return password

    def _clear_inbox(self, site: str) -> None:
        for info in self._store.list(INBOX):
            if site_of_inbox(info.key) == site:
                self._store.delete(info.key)

    def _existing(self, site: str) -> SiteAccount:
        found = find_account(self._store, site)
        if found is None or found.state == "removed":
            raise unknown_site(site)
        return found

    def _next(self, account: SiteAccount, state: Literal["rotating", "removing"]) -> SiteAccount:
        return account.model_copy(
            update={"state": state, "version": account.version + 1, "changed": self._clock()}
        )

    def _create(self, account: SiteAccount) -> None:
        try:
            self._store.create(account_key(account.site), _bytes(account))
        except ObjectExistsError:
            raise _changed_meanwhile(account.site) from None

    def _write(self, account: SiteAccount) -> SiteAccount:
        self._store.put(account_key(account.site), _bytes(account))
        return account


def _read(store: ObjectStore, key: str) -> SiteAccount:
    data = store.get(key)
    try:
        account = SiteAccount.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "the object"
        raise _damaged(key, f"{field}: {detail['msg']}") from None
    if account_key(account.site) != key:
        raise _damaged(key, f"it is site {account.site}'s")
    return account


def _bytes(account: SiteAccount) -> bytes:
    return canonical_json(account.model_dump(mode="json"))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _check_name(site: str) -> None:
    if not re.fullmatch(NAME_PATTERN, site) or site.startswith("-"):  # "-q" would be an option
        raise ConfigError(f"site name: expected {NAME_RULE}, got {site!r}; choose another name")
    if site in RESERVED_NAMES:
        raise ConfigError(f"site name: {site} is a reserved name; choose another")


def unknown_site(site: str) -> ConfigError:
    """What is said of a site that has no account."""
    return ConfigError(
        f"site {site}: expected a site with an account, got none of that name; see gradualdiff "
        f"sites list, or gradualdiff sites add {site}"
    )


def _changed_meanwhile(site: str) -> ConfigError:
    return ConfigError(
        f"site {site}: somebody else changed this account at the same time; agree who does, then "
        f"gradualdiff sites rotate {site}"
    )


def _damaged(key: str, problem: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"{key}: expected a site's account, but {problem}; restore this object from a copy of the "
        "store, or delete it and the broker's account of that name and add the site again"
    )
