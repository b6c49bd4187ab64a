"""The command line of sites' accounts, against a real RabbitMQ: kits, secrets, questions."""

from __future__ import annotations

import json
import re
import secrets
import stat
from types import SimpleNamespace

import pika
import pika.exceptions
import pytest
from typer.testing import CliRunner

from coordinator.accounts.broker_administration import ManagementAdmin
from coordinator.accounts.site_accounts import find_account
from coordinator.audit_log import raw_entries, read_entries
from coordinator.limits import Limits
from coordinator.liveness import Liveness
from coordinator.round.machine import replay
from gradualdiff.cli.sites import app
from shared.brokers.rabbitmq import connect
from shared.config import AcceptSection, LimitsSection, load_federation, load_site
from shared.credentials import broker_address
from shared.errors import ConfigError, StoreError
from shared.stores.directory import DirectoryStore
from shared.topology import inbox_key, site_queue
from tests.servers.rabbitmq import ADMIN

pytestmark = pytest.mark.slow
STORE = "https://store.example:9000"


@pytest.fixture(params=["management", "command"])
def office(rabbit_server, vhost, tmp_path, monkeypatch, request):
    """A federation's folder as the working directory, with one of the two ways to the broker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    name = f"north-{secrets.token_hex(4)}"
    admin = {
        "management": f'management_url = "{rabbit_server.management_url}"',
        "command": f"rabbitmqctl = {json.dumps(rabbit_server.rabbitmqctl)}",
    }[request.param]
    (tmp_path / "operator-password").write_text(rabbit_server.password)
    (tmp_path / "authority.pem").write_text("an authority\n")
    (tmp_path / "federation.toml").write_text(
        f"""
[run]
name = "night"
participants = ["{name}"]
[base]
model = "some/model"
[broker]
url = "amqp://{ADMIN}@127.0.0.1:{rabbit_server.port}/{vhost}"
password_file = "operator-password"
ca_file = "authority.pem"
{admin}
[store]
directory = "store"
site_url = "{STORE}"
"""
    )
    yield SimpleNamespace(
        server=rabbit_server,
        vhost=vhost,
        name=name,
        folder=tmp_path,
        kit=tmp_path / "kits" / name,
        store=lambda: DirectoryStore(tmp_path / "store"),
    )
    ManagementAdmin(rabbit_server.management_url, ADMIN, rabbit_server.password, None).delete(name)


one_way = pytest.mark.parametrize("office", ["management"], indirect=True)


def sites(*arguments, given=None):
    """Run ``gradualdiff sites``; its result. Errors of ours come out as they are."""
    result = CliRunner().invoke(app, list(arguments), input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def mode(path):
    """Its permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def kit_config(office):
    """The kit's site.toml with the data's path filled in, as load_site reads it."""
    path = office.kit / "site.toml"
    path.write_text(path.read_text().replace('path = ""', 'path = "text.jsonl"'))
    return load_site(path)


def can_log_in(office, password):
    """Whether the broker takes this password for the site."""
    parameters = pika.ConnectionParameters(
        "127.0.0.1",
        office.server.port,
        office.vhost,
        pika.PlainCredentials(office.name, password),
        connection_attempts=1,
    )
    try:
        pika.BlockingConnection(parameters).close()
    except pika.exceptions.ProbableAuthenticationError:
        return False
    return True


def test_a_kit_is_all_that_a_site_needs(office):
    """Its site.toml connects to the site's queue, which is there before any run began."""
    result = sites("add", office.name)
    assert result.exit_code == 0
    config = kit_config(office)
    assert config.site.name == office.name
    assert config.store.url == STORE
    assert config.accept == AcceptSection(
        models=("some/model",), max_rank=64, max_steps=1000, max_rounds=15, min_participants=1
    )
    limits = set(re.findall(r"^m\w+(?= = )", (office.kit / "site.toml").read_text(), re.MULTILINE))
    assert limits >= {"min_steps", "min_examples", "min_batch", "min_answer_tokens", "models"}
    assert broker_address(config.broker, office.kit).ca_file == office.kit / "ca.pem"
    assert (office.kit / "ca.pem").read_text() == "an authority\n"
    assert len((office.kit / "README.txt").read_text().splitlines()) == 3
    with connect(broker_address(config.broker, office.kit)) as connection:
        connection.consume(site_queue(office.name))
        listed = json.loads(sites("list", "--json").stdout)
        assert [site["listens"] for site in listed] == [True]
        assert json.loads(sites("show", office.name, "--json").stdout)["listens"] is True
    shown = json.loads(sites("show", office.name, "--json").stdout)
    assert shown["listens"] is False
    assert shown["state"] == "active"
    assert shown["queue"] == site_queue(office.name)
    assert shown["may_publish_as"] in sites("show", office.name).stdout  # brackets and all


@one_way
def test_a_hospitals_kit_waits_for_a_person_and_looks_at_each_delta(office):
    """All else in it is as in any kit."""
    sites("add", office.name, "--hospital")
    config = kit_config(office)
    assert config.accept.approval
    assert config.privacy.audit == "gate"
    assert config.accept.models == ("some/model",)
    assert config.accept.privacy == AcceptSection().privacy


def test_a_password_is_in_one_file_that_only_its_owner_can_read(office):
    """Mode 0600 in a folder 0700; in no output, no other file of the kit, and not in the store."""
    told = [sites("add", office.name)]
    passwords = [(office.kit / "broker-password").read_text().strip()]
    assert mode(office.kit) == 0o700
    assert mode(office.kit / "broker-password") == 0o600
    told.append(sites("rotate", office.name, "--json"))
    passwords.append((office.kit / "broker-password").read_text().strip())
    assert mode(office.kit / "broker-password") == 0o600
    told += [sites("list"), sites("show", office.name), sites("list", "--json"), sites("restore")]
    holders = [
        path
        for path in office.folder.rglob("*")
        if path.is_file() and any(word in path.read_text() for word in passwords)
    ]
    assert holders == [office.kit / "broker-password"]
    account = find_account(office.store(), office.name)
    for result in told:
        for secret in (*passwords, account.password_hash, office.server.password):
            assert secret not in result.output
    assert len(set(passwords)) == 2


def test_rotating_leaves_an_edited_kit_alone(office):
    """Only the password is another one: the old one is refused, the new one works."""
    sites("add", office.name)
    old = (office.kit / "broker-password").read_text().strip()
    edited = (office.kit / "site.toml").read_text().replace('path = ""', 'path = "mine.jsonl"')
    (office.kit / "site.toml").write_text(edited)
    (office.kit / "README.txt").write_text("mine")
    sites("rotate", office.name)
    assert (office.kit / "site.toml").read_text() == edited
    assert (office.kit / "README.txt").read_text() == "mine"
    assert not can_log_in(office, old)
    assert can_log_in(office, (office.kit / "broker-password").read_text().strip())


def test_removing_asks_first(office):
    """A no changes nothing, nor does nobody to ask; --yes does not ask; the site can come back."""
    sites("add", office.name)
    password = (office.kit / "broker-password").read_text().strip()
    assert sites("remove", office.name, given="n\n").exit_code == 1
    with pytest.raises(ConfigError, match="--yes"):
        sites("remove", office.name, given="")
    assert can_log_in(office, password)
    chunks = [inbox_key("night", 1, site, "0" * 64, 0) for site in (office.name, "other")]
    for chunk in chunks:
        office.store().put(chunk, b"never submitted")
    assert json.loads(sites("remove", office.name, "--yes", "--json").stdout) == {
        "site": office.name,
        "state": "removed",
    }
    assert not can_log_in(office, password)
    assert [info.key for info in office.store().list("inbox/")] == chunks[1:]
    assert "removed" in sites("list").stdout
    office.store().put(chunks[0], b"by a URL that was signed before")
    sites("remove", office.name, "--yes")
    assert [info.key for info in office.store().list("inbox/")] == chunks[1:]
    sites("add", office.name, "--reason", "back again")
    assert can_log_in(office, (office.kit / "broker-password").read_text().strip())
    log = list(read_entries(raw_entries(office.store())))
    assert [entry.what for entry in log if entry.ended is None] == [
        *("kit.write", "account.add"),
        *("account.remove", "account.remove"),
        *("kit.write", "account.add"),
    ]
    assert {(entry.about, entry.broker_account) for entry in log} == {(office.name, ADMIN)}
    assert log[-1].why == "back again"


def test_a_wiped_broker_is_restored(office):
    """The kit's password works again, and the site's queue is there again."""
    sites("add", office.name)
    config = kit_config(office)
    administrator = ManagementAdmin(
        office.server.management_url, ADMIN, office.server.password, None
    )
    administrator.delete(office.name)
    office.server.api("DELETE", f"queues/{office.vhost}/{site_queue(office.name)}")
    assert json.loads(sites("show", office.name, "--json").stdout)["listens"] is None
    assert json.loads(sites("restore", "--json").stdout) == {"restored": [office.name]}
    with connect(broker_address(config.broker, office.kit)) as connection:
        connection.consume(site_queue(office.name))


@one_way
def test_a_mistake_changes_nothing(office):
    """Typos, a site twice, one that is not there, a folder that is another site's."""
    with pytest.raises(ConfigError, match="site name"):
        sites("add", "North")
    for command in ("rotate", "show", "remove"):
        with pytest.raises(ConfigError, match=f"sites add {office.name}"):
            sites(command, office.name)
    assert not (office.folder / "kits").exists()
    sites("add", office.name)
    with pytest.raises(ConfigError, match="sites rotate"):
        sites("add", office.name)
    with pytest.raises(ConfigError, match=f"that of site {office.name}"):
        sites("add", "south", "--kit", str(office.kit))
    assert find_account(office.store(), "south") is None


@one_way
def test_a_kit_lies_beside_the_federation_whatever_folder_one_is_in(office, monkeypatch):
    """Where gradualdiff setup writes them."""
    elsewhere = office.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sites("add", office.name, "--federation", str(office.folder / "federation.toml"))
    assert (office.kit / "site.toml").is_file()
    assert list(elsewhere.iterdir()) == []


@one_way
def test_a_kit_that_cannot_be_written_costs_no_password(office):
    """The folder is tried before the old password is given up."""
    sites("add", office.name)
    password = (office.kit / "broker-password").read_text().strip()
    (office.folder / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        sites("rotate", office.name, "--kit", str(office.folder / "file" / "kit"))
    assert can_log_in(office, password)


@one_way
def test_a_lost_kit_is_written_whole_by_rotating(office):
    """Whoever lost the kit, or crashed before it was written, gets all of it."""
    sites("add", office.name)
    kit = office.folder / "another"
    sites("rotate", office.name, "--kit", str(kit))
    assert {path.name for path in kit.iterdir()} == {
        "site.toml",
        "broker-password",
        "ca.pem",
        "README.txt",
    }


@one_way
def test_the_records_can_be_read_while_the_broker_is_away(office):
    """A word on stderr, and no guess about who listens."""
    sites("add", office.name)
    toml = office.folder / "federation.toml"
    toml.write_text(toml.read_text().replace(f":{office.server.port}/", ":1/"))
    result = sites("list", "--json")
    assert json.loads(result.stdout)[0]["listens"] is None
    assert "cannot say who listens" in result.stderr


@one_way
def test_who_is_over_a_limit_is_shown(office):
    """How much of which limit was dropped, from the coordinator's own count."""
    config = load_federation(office.folder / "federation.toml")
    limits = Limits(LimitsSection(burst=2, messages_per_second=1))
    liveness = Liveness(office.store(), "night", "w", limits.over)
    taken = [limits.admits(office.name, now=0.0) for _ in range(5)]
    assert taken == [True, True, False, False, False]
    liveness.write(replay(config, ()), 1.0)
    sites("add", office.name)
    assert json.loads(sites("list", "--json").stdout)[0]["over"] == {"messages": 3}
    for shown in (sites("list").stdout, sites("show", office.name).stdout):
        assert "over in night" in shown
        assert "messages 3" in shown


@one_way
def test_the_kit_says_where_sites_reach_the_broker(office):
    """By broker.site_url; a plain-text address on another machine is refused before anything."""
    toml = office.folder / "federation.toml"
    text = toml.read_text()
    toml.write_text(text.replace("[store]", 'site_url = "rabbit.example:5672"\n[store]'))
    with pytest.raises(ConfigError, match="plain text"):
        sites("add", office.name)
    assert find_account(office.store(), office.name) is None
    toml.write_text(text.replace("[store]", 'site_url = "amqp://rabbit.example/x"\n[store]'))
    with pytest.raises(ConfigError, match=r"broker\.site_url"):
        sites("add", office.name)
    plain = 'site_url = "rabbit.example:5672"\ntransport = "plaintext"\n[store]'
    toml.write_text(text.replace("[store]", plain))
    sites("add", office.name)
    broker = kit_config(office).broker
    assert broker.url == f"amqp://{office.name}@rabbit.example:5672/{office.vhost}"
    assert broker.transport == "plaintext"


@one_way
def test_a_federation_without_a_broker_is_told(office):
    """The error says what to add."""
    toml = office.folder / "federation.toml"
    toml.write_text('[run]\nname = "a"\nparticipants = ["b"]\n[base]\nmodel = "m"\n')
    with pytest.raises(ConfigError, match=r"\[broker\]"):
        sites("list")
    with pytest.raises((ConfigError, StoreError), match=r"missing\.toml"):
        sites("list", "--federation", "missing.toml")
