"""From pika's errors to those of our tree: which cause, what to do."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING

import pika.exceptions

from shared.errors import (
    AccessRefusedError,
    BrokerError,
    BrokerSilentError,
    BrokerUnavailableError,
    QueueMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.credentials import BrokerAddress

_ARGUMENTS = {
    "type": "kind",
    "x-max-length": "max_length",
    "x-single-active-consumer": "single_active_consumer",
    "x-delivery-limit": "delivery_limit",
    "x-queue-type": "delivery_limit",  # a queue without a delivery limit is a classic one
    "x-max-length-bytes": "max_bytes",
    "x-overflow": "refuses",
}
# How OpenSSL tells that the server wants a certificate of its authority; pika hands on the text
# alone. In TLS 1.3 it comes after our side is done, and is lost where we write first: an EOF.
_NO_CERTIFICATE = re.compile(
    r"ALERT_CERTIFICATE_REQUIRED|ALERT_BAD_CERTIFICATE|ALERT_UNKNOWN_CA|SSLEOFError"
)
_NAMED = re.compile(r"(queue|exchange) '([^']*)'")
# pika takes any end in the middle of the login for a refusal; only these are the broker's word.
_REFUSAL = re.compile(r"ConnectionClosedByBroker: \((403|530)\)")
_INEQUIVALENT = re.compile(r"inequivalent arg '([^']+)'")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that pika wrapped into it."""
    yield error
    inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None)]
    inner += [item for item in error.args if isinstance(item, BaseException)]
    for item in inner:
        if isinstance(item, BaseException) and item is not error:
            yield from _causes(item)


def translate(error: BaseException, address: BrokerAddress) -> BaseException:
    """Turn pika's error into one of ours, naming cause and remedy."""
    if isinstance(error, BrokerError):
        return error
    causes = list(_causes(error))
    for cause in causes:
        known = _known(cause, address)
        if known is not None:
            return known
    text = str(causes[-1]) or type(causes[-1]).__name__
    reason = _NO_CERTIFICATE.search(text)
    if reason:
        return BrokerUnavailableError(
            f"broker {address}: ended the TLS connection ({reason[0]}); if it demands a "
            "certificate, check broker.cert_file and broker.key_file, else the network"
        )
    return BrokerUnavailableError(f"broker {address}: {text}; check broker.url and the network")


def _known(error: BaseException, address: BrokerAddress) -> BrokerError | None:
    where = f"broker {address}"
    found: BrokerError | None = None
    match error:
        case (
            pika.exceptions.ProbableAuthenticationError()
            | pika.exceptions.ProbableAccessDeniedError()
        ) if not _REFUSAL.search(str(error)):
            found = BrokerUnavailableError(
                f"{where}: the connection ended in the middle of the login ({error}); if it "
                "happens again, see the broker's log"
            )
        case pika.exceptions.ChannelClosedByBroker(reply_code=code, reply_text=text):
            found = _refused(code, text, address)
        case pika.exceptions.ProbableAuthenticationError():
            found = AccessRefusedError(
                f"{where}: refuses the account {address.account} or its password; "
                "check broker.url and broker.password_file"
            )
        case pika.exceptions.ProbableAccessDeniedError():
            found = AccessRefusedError(
                f"{where}: {address.account} may not use the virtual host {address.vhost}, or "
                "it does not exist; check the end of broker.url"
            )
        case pika.exceptions.ConnectionClosedByBroker(reply_code=code, reply_text=text):
            found = _closed(code, text, where)
        case ssl.SSLCertVerificationError(verify_message=reason):
            found = BrokerError(
                f"{where}: its certificate is not accepted: {reason}; check the clock, "
                "broker.ca_file, and with whoever runs the broker its certificate"
            )
        case ssl.SSLError():
            found = BrokerError(
                f"{where}: no TLS there ({error.reason or error}); check the port in broker.url"
            )
        case OSError(strerror=reason) if reason:
            found = BrokerUnavailableError(f"{where}: {reason}; check broker.url and the network")
    return found


def _closed(code: int, text: str, where: str) -> BrokerError:
    if code in {403, 530}:
        return AccessRefusedError(
            f"{where}: {text}; check the account and the virtual host in broker.url"
        )
    if code == 541:
        return BrokerSilentError(
            f"{where}: failed on a request and closed the connection: {text}; see its log"
        )
    return BrokerUnavailableError(f"{where}: closed the connection: {text}")


def _refused(code: int, text: str, address: BrokerAddress) -> BrokerError:
    named = _NAMED.search(text)
    what = f"{named[1]} {named[2]}" if named else address.vhost
    argument = _INEQUIVALENT.search(text)
    if code == 406 and argument:
        field = _ARGUMENTS.get(argument[1], argument[1])
        error = BrokerError(
            f"{what}: {field}: was declared with other properties ({text}); "
            "delete it on the broker or ask for what is there"
        )
        error.declared_otherwise = named[2] if named else None
        return error
    if code == 403:
        return AccessRefusedError(f"{what}: not allowed to {address.account} ({text})")
    if code == 404:
        kind = QueueMissingError if named and named[1] == "queue" else BrokerError
        return kind(f"{what}: does not exist; declare the topology first ({text})")
    return BrokerError(f"{what}: {text}")


def because(error: BaseException) -> str:
    """The cause in brackets; nothing when we closed it ourselves."""
    if isinstance(error, pika.exceptions.ConnectionClosedByClient):
        return ""
    return f" ({str(error) or type(error).__name__})"
