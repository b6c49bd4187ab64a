"""Where the broker and the store are, and what one site may cause at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from shared.config.section import Section
from shared.config.values import Positive, StoreUrl, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class LimitsSection(Section):
    """What one site may cause; beyond it, it is counted and dropped. See ``sites list``.

    ``records``: refusals on record, by site and round; ``uploads``: deltas it may upload for a
    round. ``messages_per_second``: of its messages that are looked at, after ``burst`` at once.
    """

    records: Positive = 16
    uploads: Positive = 8
    messages_per_second: Annotated[float, Field(gt=0)] = 50.0
    burst: Positive = 500


class BrokerSection(Section):
    """RabbitMQ as this account reaches it. Files are relative to the TOML file.

    ``url``: ``amqps://ACCOUNT@HOST:PORT/VHOST``, without a password. ``transport``: plain text to
    another machine is refused unless it says ``"plaintext"``.
    """

    url: Annotated[str, StringConstraints(pattern=r"^amqps?://[^@/\s]+@[^@\s]+$")]
    password_file: str
    ca_file: str | None = None
    transport: Transport = "tls"


class OperatedBrokerSection(BrokerSection):
    """The coordinator's view of the broker, with one of two ways to manage its accounts.

    ``site_url``: HOST:PORT as sites reach it, if that differs. ``management_account`` and its
    password file: an administrator of the management API, if the coordinator's account is none.
    """

    site_url: str | None = None
    management_url: str | None = None
    management_account: str | None = None
    management_password_file: str | None = None
    rabbitmqctl: tuple[str, ...] | None = None


class StoreSection(Section):
    """Where the ledger lives: a directory, relative to the TOML file, or a bucket of an S3 server.

    ``site_url``: the server as sites reach it, if that differs; signed URLs carry it.
    """

    directory: str = "store"
    url: StoreUrl | None = None
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{2,62}$")] = "gradualdiff"
    region: str = "us-east-1"
    access_key_file: str | None = None
    secret_key_file: str | None = None
    site_url: StoreUrl | None = None
    ca_file: str | None = None
    transport: Transport = "tls"

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A server wants keys."""
        return (self._keys_go_with_the_url,)

    def _keys_go_with_the_url(self) -> Iterator[str]:
        if self.url is not None and (self.access_key_file is None or self.secret_key_file is None):
            yield "url needs access_key_file and secret_key_file"


class SiteStoreSection(Section):
    """The one store that this site fetches from and sends to, ``https://HOST:PORT``."""

    url: StoreUrl
