"""A broker that lets nobody in who shows no certificate of its authority: a real one, over TLS."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from shared.brokers.rabbitmq import connect
from shared.brokers.rabbitmq.tls import tls_context
from shared.config import BrokerSection
from shared.credentials import BrokerAddress, broker_address
from shared.errors import AccessRefusedError, BrokerError, ConfigError
from tests.servers.faults import make_certificate
from tests.servers.rabbitmq import ADMIN, RabbitServer


def signed(folder, name, authority):
    """A certificate by this authority, a pair of files, and its key."""
    certificate, key, request = (folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
    for words in (
        f"req -new -newkey rsa:2048 -nodes -subj /CN={name} -keyout {key} -out {request}",
        (
            f"x509 -req -in {request} -CA {authority[0]} -CAkey {authority[1]} -CAcreateserial"
            f" -out {certificate} -days 2"
        ),
    ):
        subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The broker's own certificate is its authority too; ``stolen`` is another authority's."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = make_certificate(folder, 2)
    signed(folder, "coordinator", authority)
    (folder / "other").mkdir()
    signed(folder, "stranger", make_certificate(folder / "other", 2))
    (folder / "password").write_text("x\n")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """The administrator's, over TLS and without a certificate."""
    certificate, key = folder / "cert2.pem", folder / "key2.pem"
    server = RabbitServer(folder, tls=(certificate, key, certificate), mutual=True)
    server.start()
    yield BrokerAddress(
        "127.0.0.1", server.tls_port, "/", ADMIN, server.password, ca_file=certificate
    )
    server.stop()


def test_with_a_certificate_of_its_authority_the_account_is_let_in(address, folder):
    """The password is asked for all the same."""
    mine = {"cert_file": folder / "coordinator.pem", "key_file": folder / "coordinator.key"}
    with connect(replace(address, **mine)) as broker:
        assert broker.version
    with pytest.raises(AccessRefusedError, match="or its password"):
        connect(replace(address, password="wrong", **mine))


@pytest.mark.parametrize("certificate", [None, "stranger"])
def test_a_stolen_password_alone_opens_nothing(address, folder, certificate):
    """No certificate, or another authority's: refused before a password is asked for."""
    if certificate is not None:
        address = replace(
            address,
            cert_file=folder / f"{certificate}.pem",
            key_file=folder / f"{certificate}.key",
        )
    with pytest.raises(BrokerError, match=r"broker.cert_file"):
        connect(address)


def section(**more):
    given = {"url": "amqps://a@127.0.0.1/", "password_file": "password", **more}
    return BrokerSection.model_validate(given)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cert_file": "a"}, "go together"),
        ({"key_file": "a"}, "go together"),
        ({"url": "amqp://a@127.0.0.1/", "cert_file": "a", "key_file": "b"}, "needs TLS"),
    ],
)
def test_settings_that_do_not_fit_are_named(more, said):
    """Before anything is connected to."""
    with pytest.raises(ValueError, match=said):
        section(**more)


def test_files_that_are_none_or_locked_are_named(folder):
    """A key with a passphrase too: nobody is there to type it."""
    locked = folder / "locked.key"
    words = f"rsa -aes256 -passout pass:x -in {folder / 'coordinator.key'} -out {locked}"
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    with pytest.raises(ConfigError, match=r"broker.cert_file: expected a file"):
        broker_address(section(cert_file="absent", key_file="coordinator.key"), folder)
    for key in ("locked.key", "stranger.key", "password"):
        given = broker_address(section(cert_file="coordinator.pem", key_file=key), folder)
        with pytest.raises(ConfigError, match=r"broker.cert_file: .* without a passphrase"):
            tls_context(given)
