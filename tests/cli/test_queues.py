"""``gradualdiff queues`` against a real RabbitMQ: what waits, what it says, and dead letters."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from coordinator.liveness import RunStatus, SiteStatus
from gradualdiff.cli.main import app
from shared import topology
from shared.brokers.port import Message
from shared.brokers.rabbitmq import RabbitConnection, connect
from shared.config import canonical_json, load_federation
from shared.credentials import BrokerAddress
from shared.errors import AccessRefusedError, BrokerError, ConfigError
from shared.protocol import wire
from shared.protocol.events import (
    DeltaAnswered,
    MessageRefused,
    ParticipantReady,
    RunDeclined,
    UploadGranted,
)
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import Manifest, TensorSpec
from shared.stores.directory import DirectoryStore
from tests.numpy_learner import NUMERICS
from tests.patience import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = "night"
SHA = "a" * 64
SIGNATURE = "X-Amz-Signature=0123456789abcdef"
URL = f"https://store.example/b/inbox/k?X-Amz-Credential=key&{SIGNATURE}"
GARBAGE = b"\xc1 no message of ours"


@pytest.fixture
def federation(rabbit_server, vhost, tmp_path, monkeypatch):
    """Run ``night`` of two sites, its queues declared; the coordinator's account is no site's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    account, north, south = (f"{n}-{secrets.token_hex(3)}" for n in ("boss", "north", "south"))
    passwords = {name: secrets.token_hex(8) for name in (account, north, south)}
    for name, password in passwords.items():
        tags = "administrator" if name == account else ""
        rabbit_server.api("PUT", f"users/{name}", {"password": password, "tags": tags})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        rabbit_server.api("PUT", f"permissions/{vhost}/{name}", everything)
    (tmp_path / "password").write_text(passwords[account])
    (tmp_path / "federation.toml").write_text(
        f"""
[run]
name = "{RUN}"
participants = ["{north}", "{south}"]
[base]
model = "some/model"
[broker]
url = "amqp://{account}@127.0.0.1:{rabbit_server.port}/{vhost}"
password_file = "password"
management_url = "{rabbit_server.management_url}"
[store]
directory = "store"
"""
    )

    def connected(name):
        address = BrokerAddress(
            "127.0.0.1", rabbit_server.port, vhost, name, passwords[name], tls=False
        )
        return connect(address)

    with connected(account) as broker:
        broker.declare(topology.run_topology(RUN, (north, south)))
        yield SimpleNamespace(
            broker=broker,
            connected=connected,
            account=account,
            north=north,
            south=south,
            server=rabbit_server,
            vhost=vhost,
            folder=tmp_path,
            toml=tmp_path / "federation.toml",
        )
    for name in passwords:
        rabbit_server.api("DELETE", f"users/{name}")


def queues(*arguments, given=None):
    """Run ``gradualdiff queues``; its result. Errors of ours come out as they are."""
    result = CliRunner().invoke(app, ["queues", *arguments], input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refuse(federation, data, *, sender, queue, reason="for a test"):
    """Put a dead letter into the refused queue, as the coordinator does."""
    key = topology.event_key(RUN, sender, "declined") if sender else None
    event = MessageRefused(
        run=RUN, queue=queue, routing_key=key, sender=sender, reason=reason, data=data
    )
    message = Message(
        topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, wire.encode(event, time.time())
    )
    federation.broker.publish([message])


def answered(round_number=1):
    """What a coordinator says to a site."""
    event = DeltaAnswered(run=RUN, round=round_number, sha=SHA, verdict="accepted")
    return wire.encode(event, time.time())


def declined():
    """What a site says to a coordinator."""
    return wire.encode(RunDeclined(run=RUN, reason="not tonight"), time.time())


def bodies(federation, queue):
    """What is in a queue."""
    return [body for _, _, body in federation.broker.peek(queue, 100)]


def test_every_queue_is_listed_with_what_waits_and_who_reads(federation):
    """Ready, consumers and unacknowledged; a site that was heard is online, one that went is not.

    The refused queue's depth is the number of dead letters. Once the coordinator fell silent
    nobody can say who is online.
    """
    store = DirectoryStore(federation.folder / "store")
    Ledger(store, RUN, "w", time.time).begin(load_federation(federation.toml))
    now = time.time()
    sites = {federation.north: SiteStatus(seen=now), federation.south: SiteStatus(seen=now - 600)}
    write_status(store, now, sites)
    refuse(federation, GARBAGE, sender=None, queue=topology.coordinator_queue(RUN))
    for _ in range(2):
        federation.broker.publish([Message(topology.SITES_EXCHANGE, federation.north, answered())])
    with federation.connected(federation.north) as site:
        consumer = site.consume(topology.site_queue(federation.north))
        held = consumer.receive(PATIENCE_SECONDS)
        assert held is not None
        listed = wait_for_unacked(federation.north)
        rows = {row["queue"]: row for row in listed["queues"]}
        north = rows[topology.site_queue(federation.north)]
        assert (north["ready"], north["consumers"], north["unacked"]) == (1, 1, 1)
        assert north["online"] is True
        assert "is ready is awaited since" in north["waits_for"]
        assert rows[topology.site_queue(federation.south)]["online"] is False
        assert listed["dead_letters"] == 1
        assert rows[topology.coordinator_queue(RUN)]["role"] == "coordinator"
        shown = queues("list").stdout
        assert "away since" in shown
        assert "1 dead letter;" in shown
    write_status(store, now - 3600, sites)
    assert {row["online"] for row in json.loads(queues("list", "--json").stdout)["queues"]} == {
        None
    }
    assert "last heard" in queues("list").stdout
    # Nobody reads its queue, and it never spoke: its participant was not started yet.
    write_status(store, now, {}, absent={federation.south: now - 60})
    shown = queues("list").stdout
    assert shown.count("not heard yet") == 2
    assert "None" not in shown


def write_status(store, at, sites, **more):
    """What a coordinator wrote then."""
    told = {"run": RUN, "writer": "w", "at": at, "round": 0, "state": "waiting", "since": at}
    status = RunStatus(**told, sites=sites, **more)
    store.put(topology.status_key(RUN), canonical_json(status.model_dump(mode="json")))


def wait_for_unacked(site):
    """The list, once the broker has counted what is held: it does so every second."""
    found = {}

    def is_counted():
        found.update(json.loads(queues("list", "--json").stdout))
        return next(row for row in found["queues"] if row["site"] == site)["unacked"]

    wait_until(is_counted, lambda: f"an unacknowledged message: {found}")
    return found


def test_without_a_management_api_unacknowledged_is_unknown(federation):
    """Neither guessed nor an error; a management API that fails is told on stderr."""
    text = federation.toml.read_text()
    lines = [line for line in text.splitlines() if "management_url" not in line]
    federation.toml.write_text("\n".join(lines))
    assert {row["unacked"] for row in json.loads(queues("list", "--json").stdout)["queues"]} == {
        None
    }
    assert "unknown" in queues("list").stdout
    federation.toml.write_text(text.replace(federation.server.management_url, "http://127.0.0.1:1"))
    result = queues("list", "--json")
    assert json.loads(result.stdout)["queues"][0]["unacked"] is None
    assert "are unknown" in result.stderr


def test_a_queue_that_is_not_there_is_told(federation):
    """It is listed without numbers."""
    federation.server.api("DELETE", f"queues/{federation.vhost}/{topology.mirror_queue(RUN)}")
    rows = json.loads(queues("list", "--json").stdout)["queues"]
    assert [row["role"] for row in rows if row["ready"] is None] == ["mirror"]
    assert "no queue" in queues("list").stdout


def test_a_signed_url_is_never_shown(federation):
    """Not from a site's queue, not within a refusal, not in a reason, not from broken bytes."""
    granted = UploadGranted(
        run=RUN, round=2, sha=SHA, chunk_size=1, urls={0: URL}, expires_at=time.time()
    )
    body = wire.encode(granted, time.time())
    queue = topology.site_queue(federation.north)
    federation.broker.publish([Message(topology.SITES_EXCHANGE, federation.north, body)])
    refuse(federation, body, sender=federation.account, queue=queue, reason=f"cannot PUT {URL}")
    refuse(federation, body[:-3], sender=federation.account, queue=queue)
    shown = [
        queues("peek", f"site:{federation.north}", *flag).stdout + queues("peek", *flag).stdout
        for flag in ((), ("--json",))
    ]
    for text in shown:
        assert text.count("UploadGranted") == 2
        assert "redacted" in text
        for secret in (SIGNATURE, "X-Amz", "store.example"):
            assert secret not in text
    assert len(bodies(federation, queue)) == 1


def test_garbage_is_shown_as_such_with_the_reason(federation):
    """By size, sha256 and its first bytes; a site's words cannot move the reader's cursor."""
    key = topology.event_key(RUN, federation.north, "ready")
    with federation.connected(federation.north) as site:
        site.publish([Message(topology.EVENTS_EXCHANGE, key, GARBAGE)])
    coordinator = topology.coordinator_queue(RUN)
    refuse(federation, GARBAGE, sender=federation.north, queue=coordinator, reason="\x1b[2J gone")
    (event,) = json.loads(queues("peek", "events", "--json").stdout)["messages"]
    assert "msgpack" in event["problem"]
    assert (event["bytes"], event["type"]) == (len(GARBAGE), None)
    assert event["begins"].startswith("c1 20")
    assert event["sender"] == federation.north
    (letter,) = json.loads(queues("peek", "--json").stdout)["messages"]
    assert letter["type"] == "MessageRefused"
    assert "msgpack" in letter["refused"]["problem"]
    text = queues("peek").stdout
    assert "do not decode" in text
    assert "\x1b" not in text


def test_purging_asks_first(federation):
    """A no keeps all, and so does nobody to ask; --yes does not ask; the count is told."""
    for _ in range(2):
        refuse(federation, declined(), sender=federation.north, queue="gone")
    assert queues("purge", given="n\n").exit_code == 1
    for command in ("purge", "redrive"):
        with pytest.raises(ConfigError, match="--yes"):
            queues(command, given="")
    assert len(bodies(federation, topology.REFUSED_QUEUE)) == 2
    assert json.loads(queues("purge", "--yes", "--json").stdout) == {"dropped": 2}
    assert queues("purge").stdout == "dropped 0 dead letters\n"


def test_what_nobody_was_asked_about_is_not_dropped(federation, monkeypatch):
    """It came after the count, or the broker did not count it: a purge of nothing drops nothing."""
    refuse(federation, declined(), sender=federation.north, queue="gone")
    monkeypatch.setattr(RabbitConnection, "depth", lambda *_: 0)
    assert queues("purge").stdout == "dropped 0 dead letters\n"
    assert len(bodies(federation, topology.REFUSED_QUEUE)) == 1


def test_a_queue_is_looked_into_by_the_name_that_the_list_prints(federation):
    """Each of them but the coordinator's, which the broker shows to its reader only."""
    refuse(federation, declined(), sender=federation.north, queue="gone")
    for row in json.loads(queues("list", "--json").stdout)["queues"]:
        if row["role"] == "coordinator":
            with pytest.raises(ConfigError, match="give events"):
                queues("peek", row["queue"])
        else:
            shown = json.loads(queues("peek", row["queue"], "--json").stdout)
            assert shown["queue"] == row["queue"]
            assert len(shown["messages"]) == (row["role"] == "refused")


def test_a_message_is_shown_as_a_table_of_its_fields(federation):
    """What is within a field has a row of its own; of hundreds of tensors some are shown."""
    ready = ParticipantReady(
        run=RUN,
        config_digest=SHA,
        manifest=Manifest(
            tensors=tuple(
                TensorSpec(name=f"layer{i}.lora_A.weight", shape=(4, 8), init="zeros")
                for i in range(10, 40)
            ),
            target_modules=("layer",),
        ),
        fingerprint=SHA,
        numerics=NUMERICS,
        examples=7,
    )
    key = topology.event_key(RUN, federation.north, ready.word)
    with federation.connected(federation.north) as site:
        site.publish([Message(topology.EVENTS_EXCHANGE, key, wire.encode(ready, time.time()))])
    shown = queues("peek", "events").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["examples", "7"] in rows
    assert ["numerics.device", NUMERICS.device] in rows
    assert "{" not in shown
    assert "more; --json has them all" in shown


def test_own_messages_go_back_and_a_sites_stay(federation):
    """What the coordinator sent may be sent again by it; another's name it may not use.

    What would only be refused again stays as well, each with its reason.
    """
    site_queue = topology.site_queue(federation.north)
    coordinator = topology.coordinator_queue(RUN)
    mine = answered()
    refuse(federation, mine, sender=federation.account, queue=site_queue)
    for site in (federation.north, federation.south):
        refuse(federation, declined(), sender=site, queue=coordinator)
    refuse(federation, GARBAGE, sender=federation.account, queue=site_queue)
    refuse(federation, declined(), sender=None, queue=coordinator)
    refuse(federation, answered(), sender=federation.account, queue="gradualdiff.site.gone")
    assert queues("redrive", given="n\n").exit_code == 1
    done = json.loads(queues("redrive", "--yes", "--json").stdout)
    assert done["sent"] == 1
    assert bodies(federation, site_queue) == [mine]
    assert bodies(federation, coordinator_mirror()) == []
    reasons = [kept["why"] for kept in done["kept"]]
    assert len(reasons) == 5 == len(bodies(federation, topology.REFUSED_QUEUE))
    assert f"restart the participant of {federation.north}" in reasons[0]
    assert f"restart the participant of {federation.south}" in reasons[1]
    assert "refused again" in reasons[2]
    assert "nobody knows who sent it" in reasons[3]
    assert "gradualdiff setup" in reasons[4]
    assert "sent back 0 of 5 dead letters" in queues("redrive", "--yes").stdout


def test_what_a_site_reported_goes_nowhere(federation):
    """Else a site could have its own bytes brought to another in the coordinator's name."""
    site_queue = topology.site_queue(federation.south)
    forged = MessageRefused(
        queue=site_queue,
        sender=federation.account,
        reported_by=federation.north,
        reason="please",
        data=answered(),
    )
    body = wire.encode(forged, 1.0)
    federation.broker.publish([Message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, body)])
    done = json.loads(queues("redrive", "--yes", "--json").stdout)
    assert done["sent"] == 0
    assert federation.north in done["kept"][0]["why"]
    assert bodies(federation, site_queue) == []


def coordinator_mirror():
    """Where copies of what reaches the coordinator are."""
    return topology.mirror_queue(RUN)


def test_an_impersonator_sends_a_sites_words_in_the_sites_name(federation):
    """The broker's checked sender is the site again, and the key names it."""
    coordinator = topology.coordinator_queue(RUN)
    body = declined()
    refuse(federation, body, sender=federation.north, queue=coordinator)
    tags = {"password": (federation.folder / "password").read_text()}
    federation.server.api(
        "PUT", f"users/{federation.account}", {**tags, "tags": "administrator,impersonator"}
    )
    assert queues("redrive", "--yes").stdout == "sent back 1 of 1 dead letter\n"
    assert bodies(federation, topology.REFUSED_QUEUE) == []
    key = topology.event_key(RUN, federation.north, "declined")
    assert federation.broker.peek(coordinator_mirror(), 9) == [(key, federation.north, body)]
    delivery = federation.broker.consume(coordinator).receive(PATIENCE_SECONDS)
    assert (delivery.sender, delivery.routing_key) == (federation.north, key)


def test_a_crash_between_publish_and_take_off_loses_nothing(federation):
    """The message is in both places; the next redrive doubles it and empties the queue."""
    queue = topology.site_queue(federation.north)
    for number in (1, 2):
        refuse(federation, answered(number), sender=federation.account, queue=queue)
    done = run_program(
        federation,
        "import os\n"
        "from shared.brokers.rabbitmq.taking import Taker\n"
        "Taker.settle = lambda *_: os._exit(9)\n"
        "from gradualdiff.cli.main import app\n"
        "app(['queues', 'redrive', '--yes'])\n",
    )
    assert done.returncode == 9, done.stderr
    assert len(bodies(federation, queue)) == 1
    for _ in range(100):  # the broker has to notice that the process is gone
        if federation.broker.depth(topology.REFUSED_QUEUE) == 2:
            break
        time.sleep(0.1)
    assert json.loads(queues("redrive", "--yes", "--json").stdout) == {"kept": [], "sent": 2}
    assert bodies(federation, topology.REFUSED_QUEUE) == []
    rounds = [wire.decode(body).event.round for body in bodies(federation, queue)]
    assert rounds == [1, 1, 2]


def run_program(federation, program):
    """A Python process of its own in the federation's folder."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=federation.folder,
        env={"PYTHONPATH": str(ROOT)},
    )


def test_a_mistake_says_what_to_mend(federation):
    """A wrong password, a virtual host that is not there, a queue nobody knows."""
    for name in ("nonsense", "site:North", "site:"):
        with pytest.raises(ConfigError, match="site:NAME"):
            queues("peek", name)
    with pytest.raises(BrokerError, match="does not exist"):
        queues("peek", "site:nobody")
    text = federation.toml.read_text()
    federation.toml.write_text(text.replace(f"/{federation.vhost}", "/nowhere"))
    with pytest.raises(AccessRefusedError, match="virtual host"):
        queues("peek")
    federation.toml.write_text(text)
    (federation.folder / "password").write_text("wrong")
    for command in ("list", "peek", "redrive", "purge"):
        with pytest.raises(AccessRefusedError, match="password"):
            queues(command)


def test_looking_at_queues_loads_neither_torch_nor_numpy(federation):
    """Each command starts quickly; the modules it loaded are told by the process itself."""
    told = "import sys; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    for command in (["list"], ["peek"], ["redrive", "--yes"], ["purge", "--yes"]):
        program = (
            "from gradualdiff.cli.main import app\n"
            f"app({['queues', *command]!r}, standalone_mode=False)\n"
            f"{told}"
        )
        done = run_program(federation, program)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
