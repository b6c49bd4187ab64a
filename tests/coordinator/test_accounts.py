"""A site's account can do what it must, and no crash loses or leaks one.

What an account may do is tried with pika alone: who steals a kit has raw access to the broker.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import stat
from types import SimpleNamespace

import pika
import pika.exceptions
import pytest

from coordinator.accounts.broker_administration import CommandAdmin, ManagementAdmin, broker_admin
from coordinator.accounts.site_accounts import (
    Accounts,
    definitions,
    find_account,
    hash_password,
    list_accounts,
)
from shared.brokers.rabbitmq import connect
from shared.config import OperatedBrokerSection
from shared.credentials import BrokerAddress
from shared.errors import (
    AccessRefusedError,
    BrokerError,
    BrokerUnavailableError,
    ConfigError,
    LedgerDamagedError,
)
from shared.stores.directory import DirectoryStore
from shared.topology import (
    EVENTS_EXCHANGE,
    SITES_EXCHANGE,
    account_key,
    coordinator_queue,
    run_topology,
    site_queue,
)
from tests.servers.rabbitmq import ADMIN

pytestmark = pytest.mark.slow


@pytest.fixture
def world(rabbit_server, vhost, tmp_path):
    """A store, a clock, and two sites' names; both queues and a run's are on the broker."""
    north, south = (f"{name}-{secrets.token_hex(4)}" for name in ("north", "south"))
    address = BrokerAddress(
        "127.0.0.1", rabbit_server.port, vhost, ADMIN, rabbit_server.password, tls=False
    )
    with connect(address) as connection:
        connection.declare(run_topology("run", (north, south)))
    yield SimpleNamespace(
        server=rabbit_server,
        vhost=vhost,
        store=DirectoryStore(tmp_path / "store"),
        north=north,
        south=south,
    )
    for name in (north, south):
        ManagementAdmin(rabbit_server.management_url, ADMIN, rabbit_server.password, None).delete(
            name
        )


def admins(server):
    """Both admins to the same broker."""
    return {
        "management": ManagementAdmin(server.management_url, ADMIN, server.password, None),
        "command": CommandAdmin(server.rabbitmqctl),
    }


@pytest.fixture(params=["management", "command"])
def accounts(world, request):
    """The accounts behind each of the admins."""
    return Accounts(world.store, admins(world.server)[request.param], world.vhost, lambda: 7.0)


@pytest.fixture
def managed(world):
    """The accounts behind the management API."""
    return Accounts(world.store, admins(world.server)["management"], world.vhost, lambda: 7.0)


@contextlib.contextmanager
def logged_in(world, account, password):
    """A connection and a channel of this account."""
    connection = pika.BlockingConnection(
        pika.ConnectionParameters(
            "127.0.0.1",
            world.server.port,
            world.vhost,
            pika.PlainCredentials(account, password),
            connection_attempts=1,
        )
    )
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        if connection.is_open:
            connection.close()


def can_log_in(world, account, password):
    """Whether the broker takes this password."""
    try:
        with logged_in(world, account, password):
            return True
    except pika.exceptions.ProbableAuthenticationError:
        return False


def publish(channel, site, key=None, exchange=EVENTS_EXCHANGE, user_id=None):
    """Publish one event as ``site``, confirmed by the broker."""
    channel.basic_publish(
        exchange,
        key or f"run.{site}.online",
        b"body",
        pika.BasicProperties(user_id=user_id or site),
        mandatory=True,
    )


def test_an_account_reads_its_queue_and_publishes_as_itself(world, accounts):
    """What a site needs works with the password that add returned, and the event arrives."""
    password = accounts.add(world.north)
    with logged_in(world, ADMIN, world.server.password) as channel:
        channel.basic_publish(SITES_EXCHANGE, world.north, b"hello")
    with logged_in(world, world.north, password) as channel:
        assert channel.basic_get(site_queue(world.north), auto_ack=True)[2] == b"hello"
        publish(channel, world.north)
        publish(channel, world.north, f"any.{world.north}.online")
    with logged_in(world, ADMIN, world.server.password) as channel:
        assert channel.queue_declare(coordinator_queue("run"), passive=True).method.message_count

    record = find_account(world.store, world.north)
    assert (record.state, record.version, record.created) == ("active", 1, 7.0)
    assert password.encode() not in world.store.get(account_key(world.north))


def test_an_account_has_these_rights_and_limits_and_no_tag(world, accounts):
    """Either way; tests/red_team/test_forbidden_operations tries what they refuse."""
    accounts.add(world.north)
    asked = definitions(world.north, "", world.vhost)
    for kind in ("permissions", "topic-permissions"):
        given = world.server.api("GET", f"users/{world.north}/{kind}")
        assert given == asked[kind.replace("-", "_")]
    assert world.server.api("GET", f"users/{world.north}")["tags"] == []
    ((user,), (limits,)) = asked["users"], world.server.api("GET", f"user-limits/{world.north}")
    assert limits["value"] == user["limits"]


def test_rotation_cuts_the_old_password_off_at_once(world, accounts):
    """The open connection is closed, the old password is refused, the new one works."""
    old = accounts.add(world.north)
    with logged_in(world, world.north, old) as channel:
        new = accounts.rotate(world.north)
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            channel.connection.sleep(10)
    assert not can_log_in(world, world.north, old)
    assert can_log_in(world, world.north, new)
    assert find_account(world.store, world.north).version == 2


def test_a_removed_account_is_cut_off_and_its_queue_stays(world, accounts):
    """Nothing of the account is left on the broker; removing again is no error; it can return."""
    password = accounts.add(world.north)
    with logged_in(world, world.north, password) as channel:
        accounts.remove(world.north)
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            channel.connection.sleep(10)
    assert not can_log_in(world, world.north, password)
    assert not accounts.exists(world.north)
    assert find_account(world.store, world.north).password_hash is None
    with logged_in(world, ADMIN, world.server.password) as channel:
        channel.queue_declare(site_queue(world.north), passive=True)
    accounts.remove(world.north)
    assert accounts.restore() == []

    again = accounts.add(world.north)
    assert can_log_in(world, world.north, again)
    assert find_account(world.store, world.north).version == 3


def test_a_wiped_broker_gets_its_accounts_back_with_the_old_passwords(world, accounts):
    """After restore the password in the site's kit works, with all its rights and no more."""
    passwords = {site: accounts.add(site) for site in (world.north, world.south)}
    for site, password in passwords.items():
        admins(world.server)["management"].delete(site)
        assert not can_log_in(world, site, password)
    assert accounts.restore() == sorted(passwords)
    for site, password in passwords.items():
        with logged_in(world, site, password) as channel:
            publish(channel, site)
    with logged_in(world, world.north, passwords[world.north]) as channel:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
            publish(channel, world.north, f"run.{world.south}.online")
        assert caught.value.reply_code == 403


class Broken:
    """An admin whose given method raises, before or after the broker did it; then it works."""

    def __init__(self, admin, method, *, after=False):
        self._broker = admin
        self._method = method
        self._after = after
        self.fired = 0

    def __getattr__(self, name):
        real = getattr(self._broker, name)
        if name != self._method or self.fired:
            return real

        def broken(*arguments):
            self.fired += 1
            if self._after:
                real(*arguments)
            raise BrokerUnavailableError("pulled the plug")

        return broken


@pytest.fixture(params=[("apply", False), ("apply", True), ("disconnect", False)])
def broken(world, request):
    """Accounts that crash once: before the broker knows, after it, or before the cut."""
    method, after = request.param
    admin = Broken(admins(world.server)["management"], method, after=after)
    return Accounts(world.store, admin, world.vhost, lambda: 7.0), admin


def test_adding_again_heals_a_crash_between_record_and_account(world, broken):
    """The half-made account is on record, restore leaves it out, and adding again completes it."""
    accounts, admin = broken
    with pytest.raises(BrokerUnavailableError):
        accounts.add(world.north)
    assert admin.fired == 1
    assert find_account(world.store, world.north).state == "adding"
    assert accounts.restore() == []
    password = accounts.add(world.north)
    assert can_log_in(world, world.north, password)
    assert find_account(world.store, world.north).state == "active"


def test_the_kits_password_survives_a_crashed_rotation(world, managed, broken):
    """Restoring brings the old password back, since the new one was given to nobody."""
    accounts, admin = broken
    old = managed.add(world.north)
    with pytest.raises(BrokerUnavailableError):
        accounts.rotate(world.north)
    assert admin.fired == 1
    assert accounts.restore() == [world.north]
    assert can_log_in(world, world.north, old)
    new = accounts.rotate(world.north)
    assert can_log_in(world, world.north, new)
    assert not can_log_in(world, world.north, old)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("repeat", ["remove", "restore"])
def test_a_crashed_removal_is_finished_by_repeating_or_restoring(world, managed, after, repeat):
    """A site that somebody began to remove never comes back by accident."""
    password = managed.add(world.north)
    admin = Broken(admins(world.server)["management"], "delete", after=after)
    accounts = Accounts(world.store, admin, world.vhost, lambda: 7.0)
    with pytest.raises(BrokerUnavailableError):
        accounts.remove(world.north)
    assert admin.fired == 1
    for forbidden in (accounts.add, accounts.rotate):
        with pytest.raises(ConfigError, match="partly removed"):
            forbidden(world.north)
    accounts.remove(world.north) if repeat == "remove" else accounts.restore()
    assert not can_log_in(world, world.north, password)
    assert find_account(world.store, world.north).state == "removed"


def test_a_site_cannot_take_the_administrators_name(world, accounts):
    """Adding it would replace the administrator's password and take its rights away."""
    with pytest.raises(ConfigError, match="no site's"):
        accounts.add(ADMIN)
    assert find_account(world.store, ADMIN) is None
    assert can_log_in(world, ADMIN, world.server.password)


def test_what_cannot_be_is_said(world, managed):
    """A typo, a reserved name, a site twice, and a site that is not there."""
    for typo in ("North", "a.b", "a" * 41, "", "a\n", "--help"):
        with pytest.raises(ConfigError, match="a-z"):
            managed.add(typo)
    with pytest.raises(ConfigError, match="reserved"):
        managed.add("coordinator")
    managed.add(world.north)
    with pytest.raises(ConfigError, match=f"rotate {world.north}"):
        managed.add(world.north)
    for method in (managed.rotate, managed.remove):
        with pytest.raises(ConfigError, match=f"sites add {world.south}"):
            method(world.south)


def test_two_people_at_once_do_not_both_believe_they_won(world):
    """A record that changed under a call is no success."""
    admin = admins(world.server)["management"]
    other = Accounts(world.store, admin, world.vhost, lambda: 8.0)

    class Interrupted(Broken):
        def __getattr__(self, name):
            if name == "disconnect" and not self.fired:
                self.fired += 1
                other.rotate(world.north)
            return getattr(self._broker, name)

    first = Accounts(world.store, Interrupted(admin, ""), world.vhost, lambda: 7.0)
    with pytest.raises(ConfigError, match="at the same time"):
        first.add(world.north)


@pytest.mark.parametrize(
    "torn", [b"", b"{", b"{}", b"[]", b'{"site": "other", "version": 1}', None]
)
def test_a_torn_record_is_named(world, managed, torn):
    """The error names the object; nothing else is concluded from it."""
    managed.add(world.north)
    key = account_key(world.north)
    whole = world.store.get(key).replace(world.north.encode(), world.south.encode())
    world.store.put(key, whole if torn is None else torn)
    for call in (managed.list, lambda: managed.rotate(world.north)):
        with pytest.raises(LedgerDamagedError, match=key):
            call()


def test_records_can_be_read_without_a_door(world, managed):
    """Every record, by name."""
    managed.add(world.south)
    managed.add(world.north)
    listed = list_accounts(world.store)
    assert [account.site for account in listed] == sorted([world.north, world.south])
    assert listed == managed.list()
    assert managed.exists(world.north)


# Both ways to the broker ------------------------------------------------------------------------


def test_a_wrong_administrators_password_is_named_and_not_told(world):
    """The error names the setting; it holds no password."""
    admin = ManagementAdmin(world.server.management_url, ADMIN, "very-wrong", None)
    with pytest.raises(AccessRefusedError, match=r"broker.management_password_file") as caught:
        admin.accounts()
    assert "very-wrong" not in str(caught.value)


def test_a_management_api_that_is_not_there(world):
    """A closed port, and something else that answers."""
    with pytest.raises(BrokerUnavailableError, match=r"broker.management_url"):
        ManagementAdmin("http://127.0.0.1:1", ADMIN, "secret", None).accounts()
    with pytest.raises(BrokerError):  # the broker's own port
        ManagementAdmin(f"http://127.0.0.1:{world.server.port}", ADMIN, "x", None).accounts()
    astray = f"{world.server.management_url}/cli"
    with pytest.raises(BrokerError, match="management API"):
        ManagementAdmin(astray, ADMIN, world.server.password, None).accounts()


@pytest.mark.parametrize("name", ["management", "command"])
def test_a_missing_virtual_host_is_the_brokers_answer(world, name):
    """The reason is the broker's own, without the hash."""
    admin = admins(world.server)[name]
    hashed = hash_password("x")
    with pytest.raises(BrokerError, match="nowhere") as caught:
        admin.apply(definitions(world.north, hashed, "nowhere"))
    assert hashed not in str(caught.value)


@pytest.mark.parametrize("name", ["management", "command"])
def test_deleting_and_cutting_nobody_is_no_error(world, name):
    """Both may be repeated."""
    admin = admins(world.server)[name]
    admin.delete(world.north)
    admin.disconnect(world.north)
    assert ADMIN in admin.accounts()


def script(folder, body):
    """A command of our own."""
    path = folder / "rabbitmqctl"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_hash_is_on_no_command_line(tmp_path):
    """The command gets the definitions on its standard input."""
    command = script(tmp_path, f'echo "$@" > {tmp_path}/said; cat > {tmp_path}/given')
    CommandAdmin([command]).apply(definitions("north", "the-hash", "/"))
    assert "the-hash" not in (tmp_path / "said").read_text()
    given = json.loads((tmp_path / "given").read_text())
    assert given["users"][0]["password_hash"] == "the-hash"


def test_a_command_that_fails_is_quoted_without_secrets(tmp_path):
    """Its first lines, but neither a hash nor the cookie that it was given."""
    hashed = hash_password("x")
    command = script(tmp_path, f'echo "bad {hashed} $2" >&2; exit 64')
    with pytest.raises(BrokerError, match=r"list_users.*64: bad \*\*\* \*\*\*") as caught:
        CommandAdmin([command, "--erlang-cookie", "cookie-monster"]).accounts()
    assert hashed not in str(caught.value)
    assert "cookie-monster" not in str(caught.value)


def test_a_command_that_is_not_there_or_says_nothing_useful(tmp_path):
    """The setting is named."""
    with pytest.raises(BrokerError, match=r"broker.rabbitmqctl"):
        CommandAdmin([str(tmp_path / "missing")]).accounts()
    with pytest.raises(BrokerError, match="as JSON"):
        CommandAdmin([script(tmp_path, "echo none")]).accounts()
    with pytest.raises(BrokerUnavailableError):
        CommandAdmin([script(tmp_path, "exit 69")]).accounts()


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    """A child that holds the pipes open does not hold us."""
    monkeypatch.setattr("coordinator.accounts.broker_administration.COMMAND_SECONDS", 0.3)
    with pytest.raises(BrokerUnavailableError, match="no answer"):
        CommandAdmin([script(tmp_path, "sleep 60 & wait")]).accounts()


def section(**settings):
    """A [broker] table."""
    return OperatedBrokerSection(
        url="amqps://boss@rabbit.example/", password_file="password", **settings
    )


def test_a_door_must_be_given(tmp_path):
    """Neither: the error says what to add. Both accounts' settings go together."""
    with pytest.raises(ConfigError, match=r"broker.management_url.*broker.rabbitmqctl"):
        broker_admin(section(), tmp_path)
    assert isinstance(broker_admin(section(rabbitmqctl=("rabbitmqctl",)), tmp_path), CommandAdmin)
    (tmp_path / "password").write_text("secret\n")
    admin = broker_admin(section(management_url="https://rabbit.example:15671"), tmp_path)
    assert isinstance(admin, ManagementAdmin)
    with pytest.raises(ConfigError, match="management_password_file: expected a value"):
        broker_admin(
            section(management_url="https://rabbit.example", management_account="root"), tmp_path
        )
    with pytest.raises(ConfigError, match=r"broker.management_password_file"):
        broker_admin(
            section(
                management_url="https://rabbit.example",
                management_account="root",
                management_password_file="missing",
            ),
            tmp_path,
        )


@pytest.mark.parametrize(
    "url", ["http://rabbit.example:15672", "rabbit.example", "https://a:tell-tale@rabbit.example"]
)
def test_an_administrators_password_does_not_travel_in_the_open(tmp_path, url):
    """Plain http to another machine, no scheme, and a password in the URL are refused."""
    (tmp_path / "password").write_text("secret\n")
    with pytest.raises(ConfigError, match=r"broker.management_url") as caught:
        broker_admin(section(management_url=url), tmp_path)
    assert "tell-tale" not in str(caught.value)


def test_the_hash_is_rabbitmqs_own_format():
    """The documentation's example: salt 908D C60A, password test12; each call has its own salt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "coordinator.accounts.site_accounts.secrets.token_bytes",
            lambda _: bytes.fromhex("908DC60A"),
        )
        assert hash_password("test12") == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert hash_password("test12") != hash_password("test12")


def publish_on(channel, site):
    """Until the line is cut."""
    while True:
        publish(channel, site)


def test_an_account_that_ended_is_cut_off_and_comes_back_with_its_password(world, accounts):
    """By the sweep or a restore, at once; its record stays, and renewing needs no new kit."""
    now = [7.0]
    accounts._clock = lambda: now[0]
    password = accounts.add(world.north, expires_at=100.0)
    forever = accounts.add(world.south)
    assert accounts.expire() == []
    now[0] = 100.0
    with logged_in(world, world.north, password) as channel:
        assert accounts.expire() == [world.north]
        with pytest.raises(pika.exceptions.AMQPError):
            publish_on(channel, world.north)
    assert not can_log_in(world, world.north, password)
    assert accounts.expire() == []
    assert accounts.restore() == [world.south]
    assert not can_log_in(world, world.north, password)
    with pytest.raises(ConfigError, match="renew"):
        accounts.rotate(world.north)
    accounts.renew(world.north, 200.0)
    assert can_log_in(world, world.north, password)
    now[0] = 300.0
    assert accounts.restore() == [world.south]
    assert not can_log_in(world, world.north, password)
    accounts.renew(world.north, None)
    assert can_log_in(world, world.north, password)
    assert can_log_in(world, world.south, forever)
    assert find_account(world.store, world.north).expires_at is None


def test_only_an_account_that_is_whole_can_be_renewed(world, managed):
    """One that is half made, removed or not there is named."""
    with pytest.raises(ConfigError, match="expected a site with an account"):
        managed.renew(world.north, None)
    managed.add(world.north)
    half = find_account(world.store, world.north).model_copy(update={"state": "rotating"})
    world.store.put(account_key(world.north), json.dumps(half.model_dump(mode="json")).encode())
    with pytest.raises(ConfigError, match="rotating"):
        managed.renew(world.north, None)
