"""``gradualdiff doctor`` against real servers: what is well, what is wrong, and what to do."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from coordinator.accounts.broker_administration import ManagementAdmin
from coordinator.accounts.site_accounts import SiteAccount
from coordinator.limits import Limits
from coordinator.liveness import Liveness
from coordinator.round.machine import replay
from gradualdiff.cli.main import app
from gradualdiff.doctor import checks
from gradualdiff.doctor.federation import _account
from shared import topology
from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.config import BrokerSection, LimitsSection, canonical_json, load_federation
from shared.credentials import broker_address
from shared.errors import ConfigError, GradualDiffError
from shared.protocol import wire
from shared.protocol.events import UploadGranted
from shared.protocol.ledger import Ledger
from shared.protocol.records import FinishedRecord
from shared.stores.directory import DirectoryStore
from shared.stores.s3_parts import S3Parts
from shared.trust.keys import SigningKey
from tests.servers.faults import ToldServer, make_certificate, reply
from tests.servers.rabbitmq import ADMIN, RabbitServer

ROOT = Path(__file__).parents[2]
TEXT = "a patient's own words"


@pytest.fixture
def office(rabbit_server, vhost, s3_server, tmp_path, monkeypatch):
    """A federation that was set up, and the kit of its one site, filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    name = f"north-{secrets.token_hex(4)}"
    for file, secret in (
        ("operator-password", rabbit_server.password),
        ("access-key", s3_server.access_key),
        ("secret-key", s3_server.secret_key),
    ):
        (tmp_path / file).write_text(secret)
        (tmp_path / file).chmod(0o600)
    toml = tmp_path / "federation.toml"
    toml.write_text(
        f"""
[run]
name = "night"
participants = ["{name}"]
[base]
model = "some/model"
[broker]
url = "amqp://{ADMIN}@127.0.0.1:{rabbit_server.port}/{vhost}"
password_file = "operator-password"
management_url = "{rabbit_server.management_url}"
[store]
url = "{s3_server.url}"
bucket = "{vhost}"
access_key_file = "access-key"
secret_key_file = "secret-key"
"""
    )
    invoke("setup", str(toml))
    kit = tmp_path / "kits" / name
    rows = [{"question": f"{TEXT} {i}", "answer": f"{i}"} for i in range(20)]
    (kit / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = (kit / "site.toml").read_text()
    site = site.replace('path = "" ', 'path = "text.jsonl" ')
    site = site.replace('messages = "messages" ', 'prompt = "question"\nanswer = "answer" ')
    (kit / "site.toml").write_text(site.replace('kind = "auto"', 'kind = "cpu"'))
    yield SimpleNamespace(
        server=rabbit_server,
        s3=s3_server,
        vhost=vhost,
        name=name,
        folder=tmp_path,
        toml=toml,
        kit=kit,
        site=kit / "site.toml",
    )
    admin(rabbit_server).delete(name)


def admin(server):
    """The broker's accounts."""
    return ManagementAdmin(server.management_url, ADMIN, server.password, None)


def invoke(*arguments):
    """Run ``gradualdiff``; errors of ours come out as they are."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def doctor(*arguments, fails=False):
    """The findings of ``gradualdiff doctor --json`` by check, each as (verdict, text)."""
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    assert isinstance(result.exception, GradualDiffError) == fails, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is not fails
    if fails:
        assert result.exception.exit_code == 1
    return {one["check"]: (one["verdict"], one["says"]) for one in report["findings"]}


def failed(found):
    """The checks that failed."""
    return {check for check, (verdict, _) in found.items() if verdict == "FAIL"}


def mended(path, old, new):
    """Change a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_federation_that_was_set_up_is_well(office):
    """Each check is OK, and nothing of it stays in the store or on the broker."""
    found = doctor(office.toml)
    assert {verdict for verdict, _ in found.values()} <= {"OK", "WARN", "SKIP"}
    assert found["coordinator"] == ("SKIP", "run night has not begun")
    assert {check for check, (verdict, _) in found.items() if verdict == "WARN"} <= {
        "spool",
        "broker version",  # Debian 12 has 3.10
    }
    assert {"config", "secret", "tls", "broker", "topology", "rights", "clock"} < set(found)
    assert {"store", "signed urls", "management", f"account {office.name}"} < set(found)
    store = office.s3.store(office.vhost)
    assert [info.key for info in store.list(".probe/")] == []
    shown = invoke("doctor", str(office.toml)).stdout
    assert "OK    broker: logged in" in shown
    for secret in (office.server.password, office.s3.secret_key):
        assert secret not in shown


@pytest.mark.slow
def test_a_store_that_cannot_take_deltas_straight_is_told_and_fails_nothing(office, monkeypatch):
    """What it lacks, what that costs and the remedy: a warning, for deltas take the inbox then."""
    assert doctor(office.toml)["uploads"][0] == "OK"
    monkeypatch.setattr(S3Parts, "under_way", lambda *_: [])
    verdict, says = doctor(office.toml)["uploads"]
    assert verdict == "WARN"
    for words in ("is not listed", "each delta is stored twice", "abort uploads in parts"):
        assert words in says


@pytest.mark.slow
def test_what_is_wrong_in_a_federation_is_told_with_its_remedy(office):
    """Password, virtual host, bucket, key, management address: one broken at a time."""
    table = [
        (office.folder / "operator-password", office.server.password, "wrong", "broker"),
        (office.toml, f"/{office.vhost}", "/nowhere", "broker"),
        (office.toml, f'bucket = "{office.vhost}"', 'bucket = "no-such-bucket"', "store"),
        (office.folder / "secret-key", office.s3.secret_key, "wrong", "store"),
        (office.toml, office.server.management_url, "http://127.0.0.1:1", "management"),
        (office.toml, f":{office.server.port}/", ":1/", "broker"),
        (office.toml, "[run]", "[run]\nround = 3", "config"),
    ]
    for path, old, new, check in table:
        text = path.read_text()
        mended(path, old, new)
        found = doctor(office.toml, fails=True)
        assert check in failed(found), (new, found)
        path.write_text(text)
    mended(office.toml, "[store]", '[store]\nsite_url = "http://127.0.0.1:1"')
    found = doctor(office.toml)  # only sites may be able to reach it
    assert found["signed urls"][0] == "WARN"


@pytest.mark.slow
def test_what_setup_has_not_made_or_the_broker_lost_is_told(office):
    """A missing queue, one with other arguments, a participant without an account, a loose file."""
    queues = f"queues/{office.vhost}"
    office.server.api("DELETE", f"{queues}/{topology.mirror_queue('night')}")
    (office.folder / "secret-key").chmod(0o644)
    admin(office.server).delete(office.name)
    mended(office.toml, f'["{office.name}"]', f'["{office.name}", "nobody"]')
    found = doctor(office.toml, fails=True)
    assert failed(found) == {f"account {office.name}", "account nobody"}
    assert "sites restore" in found[f"account {office.name}"][1]
    assert "sites add nobody" in found["account nobody"][1]
    assert found["topology"][0] == "WARN"
    assert topology.mirror_queue("night") in found["topology"][1]
    report = CliRunner().invoke(app, ["doctor", str(office.toml)]).stdout
    assert f"chmod 600 {office.folder.resolve() / 'secret-key'}" in report
    with pytest.raises(OSError, match="404"):  # it did not make what it missed
        office.server.api("GET", f"{queues}/{topology.mirror_queue('night')}")
    office.server.api("PUT", f"{queues}/{topology.mirror_queue('night')}", {"durable": True})
    assert "topology" in failed(doctor(office.toml, fails=True))


@pytest.mark.slow
def test_a_coordinator_that_is_dead_is_told(office):
    """A run that began and did not end needs one that listens; a finished one needs none."""
    config = load_federation(office.toml)
    ledger = Ledger(office.s3.store(office.vhost), "night", "w", time.time)
    ledger.begin(config)
    verdict, says = doctor(office.toml, fails=True)["coordinator"]
    assert verdict == "FAIL"
    assert f"gradualdiff coordinator {office.toml}" in says
    limits = Limits(LimitsSection(burst=1))
    liveness = Liveness(office.s3.store(office.vhost), "night", "w", limits.over)
    site = config.run.participants[0]
    assert [limits.admits(site, now=0.0) for _ in range(3)] == [True, False, False]
    liveness.write(replay(config, ()), time.time())
    with connect(office_address(office)) as broker:
        broker.consume(topology.coordinator_queue("night"))
        found = doctor(office.toml)
        assert found["coordinator"][0] == "OK"
        assert found[f"limits of {site}"][0] == "WARN"
        says = found[f"limits of {site}"][1]
        assert "messages 2" in says
        assert f"runs exclude night {site} --reason WHY" in says
        assert f"sites remove {site} " in says
    ledger.write(FinishedRecord(round=0, sha=None, reason="stopped"))
    assert "needs none" in doctor(office.toml)["coordinator"][1]


@pytest.mark.slow
def test_a_site_is_looked_at_with_its_own_rights(office):
    """Its queue is readable and no other; of its text only counts are told."""
    found = doctor(office.site)
    assert "20 rows" in found["data"][1]
    assert found["own queue"][0] == found["other queues"][0] == found["publishing"][0] == "OK"
    assert found["clock"][0] == "OK"  # with the store that the kit names
    assert found["device"] == ("OK", "the CPU, as device.kind says")
    assert found["bitsandbytes"][0] == "OK"
    assert doctor(office.site, "--store-url", office.s3.url)["clock"][0] == "OK"
    shown = invoke("doctor", str(office.site)).stdout
    assert TEXT not in shown
    assert (office.kit / "broker-password").read_text().strip() not in shown


@pytest.mark.slow
def test_what_is_wrong_at_a_site_is_told_with_its_remedy(office):
    """A lost password, a missing file, a misspelt column, a model's folder that is not there."""
    table = [
        (office.kit / "broker-password", None, "wrong", {"broker"}),
        (office.site, '"text.jsonl"', '"gone.jsonl"', {"data"}),
        (office.site, '"question"', '"qestion"', {"data"}),
        (office.site, 'models = ["some/model"]', 'models = ["/no/model"]', {"base model"}),
        (office.site, f'[store]\nurl = "{office.s3.url}"', "", {"store"}),
    ]
    for path, old, new, checks_failed in table:
        text = path.read_text()
        mended(path, text if old is None else old, new)
        found = doctor(office.site, fails=True)
        assert failed(found) == checks_failed, found
        path.write_text(text)
    rights = {"configure": ".*", "write": ".*", "read": ".*"}
    office.server.api("PUT", f"permissions/{office.vhost}/{office.name}", rights)
    assert doctor(office.site)["other queues"][0] == "WARN"


@pytest.mark.slow
def test_a_waiting_message_is_counted_and_shown_nowhere(office):
    """A signed URL is in it; it stays where it is."""
    url = f"{office.s3.url}/bucket/key?X-Amz-Signature=0123456789abcdef"
    event = UploadGranted(
        run="night", round=1, sha="a" * 64, chunk_size=1, urls={0: url}, expires_at=time.time()
    )
    address = office_address(office)
    with connect(address) as broker:
        body = wire.encode(event, time.time())
        broker.publish([Message(topology.SITES_EXCHANGE, office.name, body)])
    result = invoke("doctor", str(office.site))
    assert "1 messages wait" in result.stdout
    assert "Signature" not in result.output
    with connect(address) as broker:
        assert broker.depth(topology.site_queue(office.name)) == 1


def office_address(office):
    """The operator's way to the broker."""
    return broker_address(load_federation(office.toml).broker, office.folder)


@pytest.mark.slow
def test_doctor_loads_torch_only_for_a_site(office):
    """A coordinator's machine has none; and its doctor needs no numpy."""
    program = (
        "import sys\n"
        "from gradualdiff.cli.main import app\n"
        f"app(['doctor', {str(office.toml)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(("days", "verdict"), [(90, "OK"), (5, "WARN"), (-1, "FAIL")])
def test_the_brokers_certificate_is_looked_at(tmp_path_factory, days, verdict):
    """Its version and the days it has left; one that is over fails."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = make_certificate(folder, days)
    server = RabbitServer(folder, tls=(certificate, key, certificate))
    server.start()
    try:
        (folder / "password").write_text(server.password)
        (folder / "password").chmod(0o600)
        toml = folder / "federation.toml"
        toml.write_text(
            f"""
[run]
name = "night"
participants = ["a"]
[base]
model = "m"
[broker]
url = "amqps://{ADMIN}@127.0.0.1:{server.tls_port}/%2F"
password_file = "password"
ca_file = "{certificate.name}"
rabbitmqctl = {json.dumps(server.rabbitmqctl)}
"""
        )
        found = doctor(toml, fails=days < 0)
        assert found["tls"][0] == verdict, found
        assert found["broker"][0] == ("FAIL" if days < 0 else "OK")
        assert found["management"][0] == "OK"
        if days > 0:
            assert "TLSv1" in found["tls"][1]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("date", "verdict"),
    [
        (0, "OK"),
        (-300, "WARN"),
        (300, "WARN"),
        (3600, "FAIL"),
        (None, "SKIP"),
    ],
)
def test_a_clock_that_is_off_is_told(date, verdict):
    """Against the HTTP date: over a minute is a warning, over 15 minutes a failure."""
    from email.utils import formatdate

    def answer(handler):
        handler.date_time_string = lambda *_: "" if date is None else formatdate(time.time() + date)
        reply(handler, 403)

    with ToldServer(answer) as server:
        (found,) = checks.check_clock(server.url, None, "store.ca_file")
    assert found.verdict == verdict, found
    if date:
        assert ("behind" if date > 0 else "ahead") in found.says


def test_a_file_that_is_neither_is_told(tmp_path):
    """By its tables; a file that cannot be read or is no TOML as well."""
    for text, said in (("[other]\n", "site"), ("[run\n", "not TOML")):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            invoke("doctor", str(tmp_path / "x.toml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        invoke("doctor", str(tmp_path / "gone.toml"))


def test_a_federation_for_one_machine_needs_no_servers(tmp_path):
    """A warning that it is one, and its folders are looked at."""
    toml = tmp_path / "federation.toml"
    toml.write_text('[run]\nname = "a"\nparticipants = ["b"]\n[base]\nmodel = "m"\n')
    found = doctor(toml)
    assert found["broker"][0] == "WARN"
    assert found["store"][0] in ("OK", "WARN")
    assert not (tmp_path / "store").exists()


@pytest.mark.model
def test_a_site_that_is_simulated_only_needs_no_broker(tmp_path):
    """A warning that it is one; its text and its device are looked at."""
    rows = [{"question": f"{TEXT} {i}", "answer": f"{i}"} for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = tmp_path / "north.toml"
    site.write_text(
        '[site]\nname = "north"\n[data]\npath = "text.jsonl"\nprompt = "question"\n'
        'answer = "answer"\n[device]\nkind = "cpu"\n'
    )
    found = doctor(site)
    assert found["broker"][0] == "WARN"
    assert "gradualdiff simulate" in found["broker"][1]
    assert found["data"][0] == found["device"][0] == "OK"
    assert "clock" not in found


def test_every_file_of_a_site_that_is_its_own_is_looked_at(tmp_path):
    """What others may read, or is not there, is told with what to do; what is right is said too."""
    (tmp_path / "work").mkdir()
    site = tmp_path / "north.toml"
    site.write_text(
        '[site]\nname = "north"\nworkspace = "work"\n'
        '[data]\npath = "text.jsonl"\ntext = "text"\n[device]\nkind = "cpu"\n'
        '[broker]\nurl = "amqps://north@127.0.0.1:1/"\npassword_file = "password"\n'
        'cert_file = "certificate.pem"\nkey_file = "certificate.key"\n'
        '[trust]\nkey_file = "identity.key"\n[privacy]\nnames_file = "names.txt"\n'
    )

    def verdicts():
        report = CliRunner().invoke(app, ["doctor", str(site), "--json"]).stdout
        found = json.loads(report)["findings"]
        return [
            (one["verdict"], one["says"])
            for one in found
            if one["check"] in ("secret", "signing key")
        ]

    assert [verdict for verdict, _ in verdicts()] == ["FAIL"] * 4
    SigningKey.generate().save(tmp_path / "identity.key")
    secret_files = [
        tmp_path / name
        for name in (
            "password",
            "identity.key",
            "certificate.key",
            "names.txt",
            "work/exchange.key",
        )
    ]
    for path in secret_files:
        path.touch()
        path.chmod(0o640)
    (tmp_path / "password").write_text("tell-tale")
    told = verdicts()
    assert sorted(verdict for verdict, _ in told) == ["FAIL", *["WARN"] * 4]
    for path in secret_files:
        assert any(str(path) in says and "chmod 600" in says for _, says in told), path
        path.chmod(0o600)
    assert {verdict for verdict, _ in verdicts()} == {"OK"}


def test_a_secret_is_looked_at_where_it_comes_from(tmp_path, monkeypatch):
    """A file that others may read is told with the command that ends it; no secret is shown."""
    monkeypatch.setenv("OUR_SECRET", "tell-tale")
    (tmp_path / "open").write_text("tell-tale")
    (tmp_path / "open").chmod(0o640)
    (tmp_path / "own").write_text("tell-tale")
    (tmp_path / "own").chmod(0o600)
    wanted = {
        ("password_file", "open"): ("WARN", "chmod 600"),
        ("password_file", "own"): ("OK", "owner's alone"),
        ("password_file", "nowhere"): ("FAIL", "nowhere"),
        ("password_env", "OUR_SECRET"): ("OK", "OUR_SECRET gives one"),
        ("password_env", "NOT_SET"): ("FAIL", "NOT_SET"),
        ("password_command", ("cat", "own")): ("OK", "cat gives one"),
        ("password_command", ("false",)): ("FAIL", "code 0, got 1"),
    }
    for (setting, value), (verdict, says) in wanted.items():
        section = BrokerSection(url="amqps://a@rabbit.example/", **{setting: value})
        (found,) = checks.check_secret(section, "password", tmp_path, "broker")
        assert (found.verdict, says in found.says) == (verdict, True), found
        assert "tell-tale" not in found.says


@pytest.mark.parametrize(
    ("days", "verdict", "says"),
    [
        (None, "OK", "is there"),
        (15, "OK", "is there"),
        (13, "WARN", "renew"),
        (-1, "FAIL", "ended"),
    ],
)
def test_an_account_that_ends_is_told_two_weeks_ahead(tmp_path, days, verdict, says):
    """And once it has ended, with what lets the site in again."""
    store = DirectoryStore(tmp_path / "store")
    expires_at = None if days is None else time.time() + 86_400 * days
    account = SiteAccount(
        site="north",
        version=1,
        state="active",
        password_hash="x",
        created=0.0,
        changed=0.0,
        expires_at=expires_at,
    )
    store.put(topology.account_key("north"), canonical_json(account.model_dump(mode="json")))
    found = _account(store, "north", {"north"})
    assert (found.verdict, says in found.says) == (verdict, True), found
