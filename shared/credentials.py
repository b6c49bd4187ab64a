"""From a TOML file's connection settings to addresses: secrets read, transport checked.

Secrets come from files of their own, the environment or a command (a vault's), and never stand in
the TOML file, a URL, a command line, an error or a log line.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from shared.config.servers import secret_sources
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import BrokerSection
    from shared.config.section import Section

AMQP_PORT = 5672
AMQPS_PORT = 5671
SECRET_SECONDS = 30.0  # a vault that has not answered by then does not


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
        account=broker_account(section),
        password=read_secret(section, "password", folder, "broker"),
        tls=tls,
        ca_file=existing_file(folder, section.ca_file, "broker.ca_file"),
        cert_file=existing_file(folder, section.cert_file, "broker.cert_file"),
        key_file=existing_file(folder, section.key_file, "broker.key_file"),
    )


def broker_account(section: BrokerSection) -> str:
    """Who we are there; needs no password."""
    return unquote(urlsplit(section.url).username or "")


def read_secret(section: Section, name: str, folder: Path, table: str) -> str:
    """A secret of a table: from the file, the variable or the command that it names.

    Raises ConfigError naming the setting when there is none, or none that can be used.
    """
    for setting, value in secret_sources(section, name).items():
        where = f"{table}.{setting}"
        if isinstance(value, tuple):
            return _one_line(_printed_by(value, folder, where), where, f"what {value[0]} prints")
        if setting.endswith("_env"):
            return _one_line(os.environ.get(value, ""), where, f"the variable {value}")
        return _one_line(_written_in(folder / value, where), where, str(folder / value))
    raise ConfigError(
        f"{table}.{name}_file: expected where the secret is, got nothing; add it, or "
        f"{name}_env or {name}_command"
    )


def _written_in(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigError(
            f"{setting}: expected a file with the secret at {path}, got: {reason}; fix the path"
        ) from None


def _printed_by(command: tuple[str, ...], folder: Path, setting: str) -> str:
    """No word of its output is repeated anywhere, nor of its complaints: they may hold it."""
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own word, without a shell
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECRET_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"nothing in {SECRET_SECONDS} s"
        raise ConfigError(
            f"{setting}: expected a command that prints the secret, got from {command[0]}: "
            f"{reason}; run it by hand"
        ) from None
    if done.returncode != 0:
        raise ConfigError(
            f"{setting}: expected {command[0]} to end with code 0, got {done.returncode}; run it "
            "by hand (what it said is not shown here)"
        )
    return done.stdout.decode("utf-8", errors="replace")


def _one_line(text: str, setting: str, place: str) -> str:
    secret = text.strip()
    if not secret:
        raise ConfigError(f"{setting}: expected a secret in {place}, got nothing")
    if not secret.isprintable():
        raise ConfigError(
            f"{setting}: expected one line of text in {place}, got several, or bytes that are none"
        )
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
