"""Where the broker and the store are, and what one site may cause at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from shared.config.section import Section
from shared.config.values import Positive, StoreUrl, Transport
from shared.trust.keys import PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class LimitsSection(Section):
    """What one site may cause; beyond it, it is counted and dropped. See ``sites list``."""

    records: Positive = 16
    """Refusals of one site that are recorded in a round; more are only counted."""
    uploads: Positive = 8
    """Deltas that one site may upload for a round, each up to the largest size."""
    messages_per_second: Annotated[float, Field(gt=0)] = 50.0
    """Messages of one site that are looked at, after ``burst`` at once; more are dropped."""
    burst: Positive = 500
    """Messages of one site that are looked at however fast they come."""


class BrokerSection(Section):
    """RabbitMQ as this account reaches it. Files are relative to the TOML file."""

    url: Annotated[str, StringConstraints(pattern=r"^amqps?://[^@/\s]+@[^@\s]+$")]
    """``amqps://ACCOUNT@HOST:PORT/VHOST``, without the password."""
    password_file: str
    """File with the account's password, relative to this file."""
    ca_file: str | None = None
    """Certificate of the authority that signed the broker's (at a site: and the store's). Without
    it: the system's authorities.
    """
    cert_file: str | None = None
    """This account's certificate (PEM, with those between it and its authority), for a broker that
    demands one of who connects. With ``key_file``.
    """
    key_file: str | None = None
    """The certificate's private key (PEM, without a passphrase)."""
    transport: Transport = "tls"
    """``"plaintext"`` allows a connection without TLS to another machine."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A certificate wants its key, and TLS."""
        return (self._a_certificate_goes_with_its_key,)

    def _a_certificate_goes_with_its_key(self) -> Iterator[str]:
        if (self.cert_file is None) != (self.key_file is None):
            yield "cert_file and key_file go together; give both or neither"
        elif self.cert_file is not None and not self.url.startswith("amqps://"):
            yield "cert_file needs TLS; use amqps:// in url"


class OperatedBrokerSection(BrokerSection):
    """The coordinator's view of the broker, with one of two ways to manage its accounts."""

    site_url: str | None = None
    """HOST:PORT of the broker as sites reach it, if that differs."""
    management_url: str | None = None
    """The management API, for ``sites`` and exact counts of ``queues list``."""
    management_account: str | None = None
    """Its administrator, if the coordinator's account is not one. Then ``setup`` makes the
    coordinator's account, with the rights to what is ours alone.
    """
    management_password_file: str | None = None
    """That account's password."""
    rabbitmqctl: tuple[str, ...] | None = None
    """Or the command that reaches the broker's own tool, word by word."""


class StoreSection(Section):
    """Where the ledger lives: a directory, or a bucket of an S3 server."""

    directory: str = "store"
    """The ledger's folder, relative to this file. Not with ``url``."""
    url: StoreUrl | None = None
    """The S3 server: ``https://HOST:PORT``."""
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{2,62}$")] = "gradualdiff"
    """Its bucket; one bucket holds any number of runs."""
    region: str = "us-east-1"
    """As the server names it."""
    access_key_file: str | None = None
    """File with the access key, relative to this file."""
    secret_key_file: str | None = None
    """File with the secret key."""
    site_url: StoreUrl | None = None
    """The server as sites reach it, if that differs; signed URLs carry it."""
    ca_file: str | None = None
    """Certificate of the authority that signed the server's."""
    transport: Transport = "tls"
    """``"plaintext"`` allows a connection without TLS to another machine."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A server wants keys."""
        return (self._keys_go_with_the_url,)

    def _keys_go_with_the_url(self) -> Iterator[str]:
        if self.url is not None and (self.access_key_file is None or self.secret_key_file is None):
            yield "url needs access_key_file and secret_key_file"


class SiteStoreSection(Section):
    """The one store that this site fetches from and sends to, ``https://HOST:PORT``."""

    url: StoreUrl
    """The S3 server: ``https://HOST:PORT``."""


class TrustSection(Section):
    """With this table all that the coordinator says and records is signed, and its sites must sign.

    The key is made once, by ``gradualdiff setup`` or ``gradualdiff init``, and every coordinator of
    the run has the same one.
    """

    key_file: str = "coordinator.key"
    """The coordinator's private key, relative to this file."""


class SiteTrustSection(Section):
    """Whom this site believes, and what it signs with."""

    key_file: str | None = None
    """This site's private key, made here, relative to this file. Without it nothing is signed.
    """
    coordinator: PublicText | None = None
    """The coordinator's public key. With it, what is not signed by it is refused."""
