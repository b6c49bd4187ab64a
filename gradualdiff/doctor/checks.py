"""Checks that a federation and a site have in common. Each yields what it found; none raises."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.errors import BrokerError, ConfigError, GradualDiffError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.brokers.rabbitmq import RabbitConnection
    from shared.config import BrokerSection
    from shared.config.section import Section
    from shared.credentials import BrokerAddress

Verdict = Literal["OK", "WARN", "FAIL", "SKIP"]
WARN_SKEW_SECONDS = 60.0
FAIL_SKEW_SECONDS = 900.0  # S3 refuses what was signed further away
CERTIFICATE_DAYS = 30
WARN_FREE_BYTES = 5 * 10**9
FAIL_FREE_BYTES = 500 * 10**6
TLS_SECONDS = 10.0


@dataclass(frozen=True)
class CheckResult:
    """What one check found. ``says``: what there is, and for WARN and FAIL what to do."""

    check: str
    verdict: Verdict
    says: str


def attempt(check: str, call: Callable[[], str]) -> Iterator[CheckResult]:
    """OK with what ``call`` says, or FAIL with its error."""
    try:
        yield CheckResult(check, "OK", call())
    except GradualDiffError as error:
        yield CheckResult(check, "FAIL", str(error))
    except OSError as error:
        where = error.filename or "a file"
        yield CheckResult(check, "FAIL", f"{where}: {error.strerror or error}; fix that path")


def check_secret(section: Section, name: str, folder: Path, table: str) -> Iterator[CheckResult]:
    """A secret can be had, and of one in a file nobody but its owner reads it."""
    from shared.config.servers import secret_sources
    from shared.credentials import read_secret

    for setting, value in secret_sources(section, name).items():
        where = f"{table}.{setting}"
        try:
            read_secret(section, name, folder, table)
            if setting.endswith("_file"):
                yield from check_permissions(where, folder / str(value))
            else:
                place = value if isinstance(value, str) else value[0]
                yield CheckResult("secret", "OK", f"{where}: {place} gives one")
        except (ConfigError, OSError) as error:
            yield CheckResult("secret", "FAIL", str(error))


def check_permissions(setting: str, path: Path) -> Iterator[CheckResult]:
    """A file that is its owner's alone."""
    from shared.trust.keys import mode_for_others

    try:
        mode = mode_for_others(path)
    except OSError as error:
        told = f"{setting}: {path}: {error.strerror}; fix that path"
        yield CheckResult("secret", "FAIL", told)
        return
    if mode:
        told = f"{setting}: {path} has mode {mode:04o}: others may use it; run: chmod 600 {path}"
        yield CheckResult("secret", "WARN", told)
    else:
        yield CheckResult("secret", "OK", f"{setting}: {path} is its owner's alone")


def check_key(path: Path) -> Iterator[CheckResult]:
    """A signing key: it is there, it is one, and nobody but its owner reads it."""
    from shared.trust.keys import SigningKey

    def says() -> str:
        public = SigningKey.load(path, "trust.key_file").public
        return f"{path}: its owner's alone; public key {public.text}, {public.fingerprint}"

    yield from attempt("signing key", says)


@contextlib.contextmanager
def connection(
    section: BrokerSection, folder: Path, found: list[CheckResult]
) -> Iterator[RabbitConnection | None]:
    """A connection, or None with the reason among ``found``."""
    from shared.brokers.rabbitmq import connect
    from shared.credentials import broker_address

    try:
        address = broker_address(section, folder)
        broker = connect(address)
    except GradualDiffError as error:
        found.append(CheckResult("broker", "FAIL", str(error)))
        yield None
        return
    with broker:
        where = f"{address}, virtual host {address.vhost}, account {address.account}"
        found.append(CheckResult("broker", "OK", f"logged in to {where}"))
        yield broker


def check_tls(section: BrokerSection, folder: Path) -> Iterator[CheckResult]:
    """Version and certificate of ``amqps``; plain text on the way is worth a word."""
    from shared.credentials import broker_address, is_loopback

    try:
        address = broker_address(section, folder)
    except ConfigError:
        return  # told where the log-in is tried
    if address.tls:
        yield from _check_certificate(address)
    elif is_loopback(address.host):
        yield CheckResult("tls", "OK", "none needed: the broker is on this machine")
    else:
        yield CheckResult(
            "tls",
            "WARN",
            f"broker.url is plain text to {address.host}: anybody on the network path can "
            "read passwords and alter messages; use amqps://",
        )


def _check_certificate(address: BrokerAddress) -> Iterator[CheckResult]:
    import socket
    import ssl

    from shared.brokers.rabbitmq.tls import tls_context

    try:
        with (
            socket.create_connection((address.host, address.port), TLS_SECONDS) as plain,
            tls_context(address).wrap_socket(plain, server_hostname=address.host) as secure,
        ):
            version = secure.version()
            ends = str((secure.getpeercert() or {}).get("notAfter", ""))
    except ssl.SSLCertVerificationError as error:
        yield CheckResult(
            "tls",
            "FAIL",
            f"broker {address}: its certificate is not accepted: "
            f"{error.verify_message}; check broker.ca_file, the clock, and the certificate",
        )
        return
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        yield CheckResult("tls", "FAIL", f"broker {address}: no TLS: {reason}; check broker.url")
        return
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400
    text = f"{version}; the broker's certificate ends in {days:.0f} days"
    if days < CERTIFICATE_DAYS:
        yield CheckResult("tls", "WARN", f"{text}; have it renewed")
    else:
        yield CheckResult("tls", "OK", text)


def check_clock(url: str, ca_file: Path | None, setting: str) -> Iterator[CheckResult]:
    """The clock of this machine against the HTTP date of the server at ``url``."""
    import urllib3

    from shared.stores.http import http_pool, network_error

    try:
        pool = http_pool(ca_file, setting, urllib3.Retry(1, raise_on_status=False))
        before = time.time()
        try:
            response = pool.request("HEAD", url, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise network_error(error, "store", setting) from None
        middle = (before + time.time()) / 2
    except GradualDiffError as error:
        yield CheckResult("clock", "FAIL", str(error))
        return
    try:
        there = parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        yield CheckResult("clock", "SKIP", "the store's answer has no date to compare with")
        return
    # The date is cut to whole seconds.
    yield judge_skew(middle - there - 0.5)


def judge_skew(skew: float) -> CheckResult:
    """``skew``: seconds that this machine is ahead of the store."""
    if abs(skew) <= WARN_SKEW_SECONDS:
        return CheckResult("clock", "OK", f"within {WARN_SKEW_SECONDS:.0f} s of the store's")
    way = "ahead of" if skew > 0 else "behind"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    text = f"{abs(skew):.0f} s {way} the store's (here it is {now} UTC); set both, best by NTP"
    if abs(skew) > FAIL_SKEW_SECONDS:
        return CheckResult("clock", "FAIL", f"{text}: past 15 minutes S3 refuses every request")
    return CheckResult("clock", "WARN", text)


def check_folder(check: str, folder: Path, *, make: bool) -> Iterator[CheckResult]:
    """A folder that can be written to, or whose parent can, and room on its disk."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        yield CheckResult(
            check,
            "FAIL",
            f"{existing}: cannot be written to: {error.strerror or error}; give "
            "another folder, or this one its rights",
        )
        return
    later = "" if folder.exists() or not make else " (made at the first start)"
    text = f"{folder}{later}: {free / 1e9:.1f} GB free"
    if free < FAIL_FREE_BYTES:
        yield CheckResult(check, "FAIL", f"{text}; free some: deltas and adapters go there")
    elif free < WARN_FREE_BYTES:
        yield CheckResult(check, "WARN", f"{text}; that may be too little for deltas and adapters")
    else:
        yield CheckResult(check, "OK", text)


def check_publishing(broker: RabbitConnection, key: str) -> str:
    """Publish to a key that no queue is bound to. Raises AccessRefusedError, BrokerError."""
    from shared.brokers.port import Message
    from shared.errors import UnroutableError
    from shared.topology import EVENTS_EXCHANGE

    try:
        broker.publish([Message(EVENTS_EXCHANGE, key, b"doctor")])
    except UnroutableError:
        return "may publish events"
    raise BrokerError(f"{EVENTS_EXCHANGE}: expected no queue to be bound for {key}, got one")
