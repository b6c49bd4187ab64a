"""Where the broker and the store are, and what one site may cause at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from shared.config.section import Section
from shared.config.values import Positive, StoreUrl, Transport
from shared.trust.keys import PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


Command = Annotated[tuple[str, ...], Field(min_length=1)]


def secret_sources(section: Section, name: str) -> dict[str, str | tuple[str, ...]]:
    """Where a table says that a secret comes from: of ``NAME_file``, ``_env``, ``_command``."""
    settings = (f"{name}_{how}" for how in ("file", "env", "command"))
    given = {setting: getattr(section, setting, None) for setting in settings}
    return {setting: value for setting, value in given.items() if value is not None}


def _one_source(section: Section, name: str, *, needed: bool = True) -> Iterator[str]:
    given = secret_sources(section, name)
    if len(given) > 1 or (needed and not given):
        got = " and ".join(given) or "none"
        yield f"expected one of {name}_file, {name}_env and {name}_command, got {got}"


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
    read_url_seconds: Annotated[float, Field(ge=60, le=604_800)] = 21_600.0
    """How long a signed URL reads an adapter. It does so also after ``sites remove``."""
    write_url_seconds: Annotated[float, Field(ge=60, le=604_800)] = 900.0
    """How long a signed URL takes a piece of a delta: 16 MiB at 150 kbit/s by default. What is
    missing then is asked for again.
    """


class BrokerSection(Section):
    """RabbitMQ as this account reaches it. Files are relative to the TOML file."""

    url: Annotated[str, StringConstraints(pattern=r"^amqps?://[^@/\s]+@[^@\s]+$")]
    """``amqps://ACCOUNT@HOST:PORT/VHOST``, without the password."""
    password_file: str | None = None
    """File with the account's password, relative to this file. One of these three says it."""
    password_env: str | None = None
    """Environment variable with it."""
    password_command: Command | None = None
    """Command, word by word, that prints it: a vault's. Run in this file's folder, without a shell,
    whenever it is needed; no word of it may be a secret.
    """
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
        """One place for the password; a certificate wants its key, and TLS."""
        return (self._one_password, self._a_certificate_goes_with_its_key)

    def _one_password(self) -> Iterator[str]:
        yield from _one_source(self, "password")

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
    management_password_env: str | None = None
    """Or the environment variable with it."""
    management_password_command: Command | None = None
    """Or the command that prints it."""
    rabbitmqctl: tuple[str, ...] | None = None
    """Or the command that reaches the broker's own tool, word by word."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """And one place for the administrator's."""
        return (*super().rules(), self._one_management_password)

    def _one_management_password(self) -> Iterator[str]:
        yield from _one_source(self, "management_password", needed=False)


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
    access_key_env: str | None = None
    """Or the environment variable with it."""
    access_key_command: Command | None = None
    """Or the command that prints it, as ``broker.password_command``."""
    secret_key_file: str | None = None
    """File with the secret key."""
    secret_key_env: str | None = None
    """Or the environment variable with it."""
    secret_key_command: Command | None = None
    """Or the command that prints it."""
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
        for name in ("access_key", "secret_key"):
            yield from _one_source(self, name, needed=self.url is not None)


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
    """This site's private key, as ``gradualdiff site init`` made it, relative to this file. Without
    it nothing is signed.
    """
    coordinator: PublicText | None = None
    """The coordinator's public key. With it, what is not signed by it is refused."""
