"""A broker that lets nobody in who shows no certificate of its authority: a real one, over TLS."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from gradualdiff.cli.main import app
from shared.brokers.rabbitmq import connect
from shared.brokers.rabbitmq.tls import tls_context
from shared.config import BrokerSection, load_site
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
    for name in ("coordinator", "north"):
        signed(folder, name, authority)
    (folder / "other").mkdir()
    signed(folder, "stranger", make_certificate(folder / "other", 2))
    (folder / "password").write_text("x\n")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """It demands a certificate of its authority from everybody."""
    certificate, key = folder / "cert2.pem", folder / "key2.pem"
    server = RabbitServer(folder, tls=(certificate, key, certificate), mutual=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def address(server, folder):
    """The administrator's, over TLS and without a certificate."""
    return BrokerAddress(
        "127.0.0.1", server.tls_port, "/", ADMIN, server.password, ca_file=folder / "cert2.pem"
    )


@pytest.fixture
def office(server, folder, tmp_path):
    """A federation.toml at that broker; its folder. The certificates are copied there."""
    (tmp_path / "password").write_text(server.password)
    (tmp_path / "federation.toml").write_text(
        f"""
[run]
name = "night"
participants = ["north"]
[base]
model = "some/model"
[broker]
url = "amqps://{ADMIN}@127.0.0.1:{server.tls_port}/"
password_file = "password"
ca_file = "{folder / "cert2.pem"}"
cert_file = "{folder / "coordinator.pem"}"
key_file = "{folder / "coordinator.key"}"
management_url = "{server.management_url}"
"""
    )
    return tmp_path


def add_site(office, *options):
    """``gradualdiff sites add``; errors of ours come out as they are."""
    command = ["sites", "add", "north", "--federation", str(office / "federation.toml")]
    done = CliRunner().invoke(app, [*command, *map(str, options)])
    if done.exception is not None:
        raise done.exception


def kit_address(office):
    """What the kit's site.toml says, with the data's path filled in."""
    path = office / "kits" / "north" / "site.toml"
    path.write_text(path.read_text().replace('path = ""', 'path = "text.jsonl"'))
    return broker_address(load_site(path).broker, path.parent)


@pytest.mark.parametrize("carries_key", [True, False])
def test_a_kit_with_its_certificate_is_let_in(server, office, folder, carries_key):
    """Certificate and key in one kit; or the site's own key, which never leaves the site."""
    options = ["--cert", folder / "north.pem"]
    if carries_key:
        options += ["--cert-key", folder / "north.key"]
    add_site(office, *options)
    key = office / "kits" / "north" / "certificate.key"
    if not carries_key:
        with pytest.raises(ConfigError, match=r"broker.key_file: expected a file"):
            kit_address(office)
        key.write_bytes((folder / "north.key").read_bytes())
        key.chmod(0o600)
    assert key.stat().st_mode & 0o777 == 0o600
    with connect(kit_address(office)) as broker:
        assert broker.identity == "north"
    server.api("DELETE", "users/north")


def test_a_kit_for_such_a_broker_names_the_files_that_it_lacks(server, office):
    """The coordinator shows a certificate: so must the site, and its file says which."""
    add_site(office)
    with pytest.raises(
        ConfigError, match=r"broker.cert_file: expected a file at .*certificate.pem"
    ):
        kit_address(office)
    server.api("DELETE", "users/north")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cert-key", "coordinator.key"], "--cert-key: expected --cert"),
        (["--cert", "absent.pem"], "--cert: expected a file"),
        (["--cert", "north.pem", "--cert-key", "stranger.key"], "--cert: expected a certificate"),
    ],
)
def test_files_that_are_no_pair_make_no_account(server, office, folder, options, said):
    """Nothing is written, at the broker or here."""
    given = [word if word.startswith("--") else folder / word for word in options]
    with pytest.raises(ConfigError, match=said):
        add_site(office, *given)
    assert not (office / "kits").exists()
    assert "north" not in {user["name"] for user in server.api("GET", "users")}


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
