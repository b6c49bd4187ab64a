"""TLS to the broker: whom we believe, and with which certificate we say who we are."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from shared.credentials import BrokerAddress


def tls_context(address: BrokerAddress) -> ssl.SSLContext:
    """TLS 1.2 or newer, the broker's name checked. Raises ConfigError for an unreadable file."""
    try:
        context = ssl.create_default_context(
            cafile=None if address.ca_file is None else str(address.ca_file)
        )
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"broker.ca_file: expected certificates (PEM) in {address.ca_file}, got: {error}"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if address.cert_file is not None and address.key_file is not None:
        load_certificate(context, address.cert_file, address.key_file, "broker.cert_file")
    return context


def load_certificate(context: ssl.SSLContext, cert: Path, key: Path, setting: str) -> None:
    """What ``context`` shows of itself. Raises ConfigError naming ``setting`` if it is no pair."""
    try:
        # Without a word of ours OpenSSL would ask a terminal for a passphrase, and wait: an empty
        # one fails at once where the key has any.
        context.load_cert_chain(cert, key, password="")  # nosec B106
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{setting}: expected a certificate (PEM) in {cert} and its private key without a "
            f"passphrase in {key}, got: {error}"
        ) from None
