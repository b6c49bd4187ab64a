"""From a TOML file's connection settings to addresses: secrets read, transport checked.

Secrets stand in files of their own, never in the TOML file, a URL, an error or a log line.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import BrokerSection

AMQP_PORT = 5672
AMQPS_PORT = 5671


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and who we are there. ``ca_file`` None: the system's authorities.

    ``cert_file``, ``key_file``: the certificate that we show, None without one.
    """

    host: str
    port: int
    vhost: str
    account: str
    password: str = field(repr=False)
    tls: bool = True
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def broker_address(section: BrokerSection, folder: Path) -> BrokerAddress:
    """The address in ``section``, whose files are relative to ``folder``. Raises ConfigError."""
    parts = urlsplit(section.url)
    check_transport("broker", section.url, section.transport)
    tls = parts.scheme == "amqps"
    try:
        port = parts.port or (AMQPS_PORT if tls else AMQP_PORT)
    except ValueError:
        raise ConfigError(
            f"broker.url: expected a port from 1 to 65535, got {parts.netloc}"
        ) from None
    if parts.password is not None:
        raise ConfigError("broker.url: expected no password; put it into broker.password_file")
    return BrokerAddress(
        host=parts.hostname or "",
        port=port,
        vhost=unquote(parts.path.removeprefix("/")) or "/",
        account=unquote(parts.username or ""),
        password=read_secret(folder / section.password_file, "broker.password_file"),
        tls=tls,
        ca_file=existing_file(folder, section.ca_file, "broker.ca_file"),
        cert_file=existing_file(folder, section.cert_file, "broker.cert_file"),
        key_file=existing_file(folder, section.key_file, "broker.key_file"),
    )


def read_secret(path: Path, setting: str) -> str:
    """The file's one line. Raises ConfigError naming ``setting`` when it is missing or empty."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigError(
            f"{setting}: expected a file with the secret at {path}, got: {reason}; fix the path"
        ) from None
    if not secret:
        raise ConfigError(f"{setting}: expected a secret in {path}, got an empty file")
    return secret


def existing_file(folder: Path, name: str | None, setting: str) -> Path | None:
    """``folder / name``, None without a name. Raises ConfigError when there is no such file."""
    if name is None:
        return None
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{setting}: expected a file at {path}, got none; fix the path")
    return path


def check_transport(section: str, url: str, transport: str) -> None:
    """Refuse plain text to another machine unless ``transport`` says it in so many words."""
    parts = urlsplit(url)
    if parts.scheme in ("amqps", "https") or transport == "plaintext":
        return
    if not is_loopback(parts.hostname or ""):
        raise ConfigError(
            f"{section}.url: expected TLS ({parts.scheme}s://) to {parts.hostname}, got plain "
            f"text, which anybody on the network path can read and alter; use TLS, or say "
            f'{section}.transport = "plaintext"'
        )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine by its very name or number."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
