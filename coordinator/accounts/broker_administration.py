"""Broker administration: accounts by the management API, or by ``rabbitmqctl`` on its machine.

No password passes either: what is sent is RabbitMQ's own hash, in a body or on standard input and
never on a command line. No error repeats a hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from base64 import b64encode
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import urllib3

from shared.config import canonical_json
from shared.config.servers import secret_sources
from shared.credentials import broker_account, existing_file, is_loopback, read_secret
from shared.errors import AccessRefusedError, BrokerError, BrokerUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shared.config import OperatedBrokerSection

ANSWER_SECONDS = 30.0
COMMAND_SECONDS = 60.0
NO_SUCH_USER = 67  # exit codes of rabbitmqctl, from sysexits.h
NODE_UNAVAILABLE = 69
SHORT = 200


class BrokerAdmin(Protocol):
    """A way to the broker's accounts. All of it may be repeated.

    Every method raises BrokerUnavailableError, AccessRefusedError or BrokerError.
    """

    def apply(self, definitions: Mapping[str, Any]) -> None:
        """Make or replace the accounts and rights in ``definitions``; others stay as they are."""

    def delete(self, account: str) -> None:
        """Remove an account with its rights; none there is no error. Its queue stays."""

    def accounts(self) -> list[str]:
        """The names of all accounts on the broker."""

    def disconnect(self, account: str) -> None:
        """Close the account's open connections: a password is checked at log-in only."""


class ManagementAdmin:
    """RabbitMQ's management HTTP API, as an administrator.

    ``ca_file``: the authority for https; None: the system's. Repr and errors hold no password.
    """

    def __init__(self, url: str, account: str, password: str, ca_file: Path | None) -> None:
        self._url = url.rstrip("/")
        self._account = account
        identity = b64encode(f"{account}:{password}".encode()).decode()
        self._headers = {
            "Authorization": f"Basic {identity}",
            "Content-Type": "application/json",
        }
        self._pool = urllib3.PoolManager(
            cert_reqs="CERT_REQUIRED",
            ca_certs=None if ca_file is None else str(ca_file),
            retries=False,
            timeout=urllib3.Timeout(ANSWER_SECONDS),
        )

    def apply(self, definitions: Mapping[str, Any]) -> None:
        """Make or replace the accounts and rights."""
        self._call("POST", "definitions", dict(definitions))

    def delete(self, account: str) -> None:
        """Remove an account."""
        self._call("DELETE", f"users/{quote(account, safe='')}", missing_ok=True)

    def accounts(self) -> list[str]:
        """All accounts' names."""
        return _names(self._call("GET", "users?columns=name"), "name", self._where)

    def disconnect(self, account: str) -> None:
        """Close the account's open connections."""
        self._call("DELETE", f"connections/username/{quote(account, safe='')}", missing_ok=True)

    def unacknowledged(self, vhost: str, queue: str) -> int | None:
        """Messages handed out and not acknowledged; None when the broker cannot say (yet).

        It counts them every few seconds only. Raises as the others do.
        """
        place = f"{quote(vhost, safe='')}/{quote(queue, safe='')}"
        answer = self._call("GET", f"queues/{place}", missing_ok=True)
        if not answer:
            return None
        try:
            counted = json.loads(answer).get("messages_unacknowledged")
            return None if counted is None else int(counted)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise BrokerError(
                f"{self._where}: expected RabbitMQ's view of queue {queue} as JSON, got something "
                "else; check broker.management_url"
            ) from None

    @property
    def _where(self) -> str:
        return f"RabbitMQ's management API at {self._url}"

    def _call(
        self, method: str, path: str, body: object = None, *, missing_ok: bool = False
    ) -> bytes:
        try:
            response = self._pool.request(
                method,
                f"{self._url}/api/{path}",
                body=None if body is None else canonical_json(body),
                headers=self._headers,
                redirect=False,  # the password goes to this address and no other
            )
        except urllib3.exceptions.SSLError as error:
            raise BrokerUnavailableError(
                f"{self._where}: its TLS certificate is not trusted: {error}; check "
                "broker.management_url and broker.ca_file"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise BrokerUnavailableError(
                f"{self._where}: cannot be reached: {error}; check broker.management_url and that "
                "the management plugin is enabled"
            ) from None
        if response.status in (401, 403):
            raise AccessRefusedError(
                f"{self._where}: refuses account {self._account}: {_reason(response.data)}; check "
                "broker.management_password_file (without it: broker.password_file), and that "
                "the account is tagged administrator"
            )
        if response.status == 404 and missing_ok:
            return b""
        if not 200 <= response.status < 300:
            kind = BrokerUnavailableError if response.status >= 500 else BrokerError
            raise kind(
                f"{self._where}: expected {method} {path} to be done, got status "
                f"{response.status}: {_reason(response.data)}"
            )
        return response.data


class CommandAdmin:
    """``rabbitmqctl``, here or behind ``docker exec -i`` or ``sudo -n``.

    What it must import goes through its standard input, since everyone on the machine can read
    command lines.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    def apply(self, definitions: Mapping[str, Any]) -> None:
        """Make or replace the accounts and rights."""
        self._run("import_definitions", given=canonical_json(dict(definitions)))

    def delete(self, account: str) -> None:
        """Remove an account."""
        self._run("delete_user", account, fine=(0, NO_SUCH_USER))

    def accounts(self) -> list[str]:
        """All accounts' names."""
        listed = self._run("list_users", "--formatter", "json")
        return _names(listed, "user", f"{self._command[0]} list_users")

    def disconnect(self, account: str) -> None:
        """Close the account's open connections."""
        self._run("close_all_user_connections", account, "account changed")

    def _run(self, *arguments: str, given: bytes = b"", fine: tuple[int, ...] = (0,)) -> bytes:
        # Only these two words of it are ever shown: the operator's own part may hold a secret.
        shown = f"{self._command[0]} ... {arguments[0]}"
        try:
            process = subprocess.Popen(  # noqa: S603 - the operator's own command, without a shell
                [*self._command, *arguments, "--silent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # no terminal to ask for a password; ends as one group
            )
        except OSError as error:
            raise BrokerError(
                f"broker.rabbitmqctl: expected a command that can be run, got {self._command[0]}: "
                f"{error.strerror}; give the whole path of rabbitmqctl"
            ) from None
        with process:
            try:
                output, complaint = process.communicate(given, COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                raise BrokerUnavailableError(
                    f"{shown}: no answer within {COMMAND_SECONDS:.0f} s; check that the broker runs"
                ) from None
            finally:
                if process.returncode is None:  # its children hold the pipes open
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
        if process.returncode not in fine:
            unavailable = process.returncode == NODE_UNAVAILABLE
            raise (BrokerUnavailableError if unavailable else BrokerError)(
                f"{shown}: expected exit code 0, got {process.returncode}: "
                f"{self._first_lines(complaint)}; check broker.rabbitmqctl and that the broker runs"
            )
        return output

    def _first_lines(self, complaint: bytes) -> str:
        text = complaint.decode(errors="replace")
        for option, secret in pairwise(self._command):
            if "cookie" in option:
                text = text.replace(secret, "***")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _without_hashes(" ".join(lines[:3]))[:SHORT] or "(it said nothing)"


def broker_admin(section: OperatedBrokerSection, folder: Path) -> BrokerAdmin:
    """The way that ``section`` names; the management API if it names both.

    Without a management account the coordinator's own account and password are taken. Raises
    ConfigError when neither way is given or a setting of it cannot be used.
    """
    if section.management_url is not None:
        account, password = _administrator(section, folder)
        return ManagementAdmin(
            _management_url(section),
            account,
            password,
            existing_file(folder, section.ca_file, "broker.ca_file"),
        )
    if section.rabbitmqctl:
        return CommandAdmin(section.rabbitmqctl)
    raise ConfigError(
        "broker: expected a way to the broker's accounts, got none; add broker.management_url "
        '(such as "https://HOST:15671"), or where RabbitMQ runs on this machine '
        'broker.rabbitmqctl (such as ["sudo", "-n", "rabbitmqctl"])'
    )


def _administrator(section: OperatedBrokerSection, folder: Path) -> tuple[str, str]:
    account, sources = section.management_account, secret_sources(section, "management_password")
    if (account is None) != (not sources):
        missing = "management_account" if account is None else "management_password_file"
        raise ConfigError(
            f"broker.{missing}: expected a value, got nothing; management_account and "
            "management_password_file (or _env, or _command) go together"
        )
    if account is None:
        return broker_account(section), read_secret(section, "password", folder, "broker")
    return account, read_secret(section, "management_password", folder, "broker")


def _management_url(section: OperatedBrokerSection) -> str:
    url = section.management_url or ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            "broker.management_url: expected https://HOST:PORT without an account or password, "
            f"got {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        )
    plain = parts.scheme == "http" and section.transport != "plaintext"
    if plain and not is_loopback(parts.hostname):
        raise ConfigError(
            f"broker.management_url: expected https to {parts.hostname}, got plain text, which "
            "anybody on the network path can read, the administrator's password too; use https, or "
            "say "
            'broker.transport = "plaintext"'
        )
    return url


def _names(listing: bytes, field: str, source: str) -> list[str]:
    try:
        return [str(entry[field]) for entry in json.loads(listing)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BrokerError(
            f"{source}: expected RabbitMQ's list of accounts as JSON, got something else; check "
            "that this is RabbitMQ 3.10 or newer"
        ) from None


def _reason(body: bytes) -> str:
    try:
        said = json.loads(body)["reason"]
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, TypeError, KeyError, RecursionError):
        text = body.decode(errors="replace") or "(it gave no reason)"
    return _without_hashes(" ".join(text.split()))[:SHORT]


def _without_hashes(text: str) -> str:
    """A hash of a password is 48 characters of base64; a broker may repeat what it was sent."""
    return re.sub(r"[A-Za-z0-9+/]{48}", "***", text)
