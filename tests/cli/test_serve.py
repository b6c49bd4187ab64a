"""``coordinator``, ``participant``, ``setup`` given what is wrong: the cause, the fix, the code."""

from __future__ import annotations

import json

import pytest
import urllib3

from coordinator.accounts.site_accounts import MOST_CHANNELS, MOST_CONNECTIONS
from shared.brokers.rabbitmq import connect
from shared.config import load_federation, load_site
from shared.credentials import BrokerAddress, broker_address
from shared.stores.opening import open_store
from shared.topology import site_queue
from tests.servers.deployment import COORDINATOR_PASSWORD, Deployment

pytestmark = pytest.mark.slow
LIMITS = {"max-connections": MOST_CONNECTIONS, "max-channels": MOST_CHANNELS}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory, rabbit_server, s3_server):
    """One deployment for all: nothing here changes it for good."""
    vhost = rabbit_server.new_vhost()
    made = Deployment(tmp_path_factory.mktemp("run"), None, rabbit_server, vhost, s3_server)
    yield made
    made.close()
    rabbit_server.delete_vhost(vhost)


WRONG_FEDERATION = {
    "a password": (("broker-password", "not-it"), None, 43, "broker.password_file"),
    "no password": (("broker-password", ""), None, 10, "broker.password_file"),
    "a virtual host": (None, ("5672/", "5672/nowhere"), 43, "virtual host"),
    "a bucket": (None, ("bucket = ", 'bucket = "nowhere" # '), 30, "gradualdiff setup"),
    "a key": (("access-key", "nobody"), None, 30, "store.access_key_file"),
    "a secret": (("secret-key", "not-it"), None, 30, "store.secret_key_file"),
    "plain text": (None, ("@127.0.0.1:", "@broker.example:"), 10, 'broker.transport = "plaintext"'),
    "a setting": (None, ("password_file", "pasword_file"), 10, "did you mean password_file?"),
    "a codec": (None, ("[store]", '[codec]\nname = "zip"\n[store]'), 10, "codec"),
}


@pytest.mark.parametrize("what", WRONG_FEDERATION)
def test_a_coordinator_says_what_is_wrong_and_ends(deployment, what):
    """One line, its own exit code, no secret and no traceback."""
    secret, change, code, names = WRONG_FEDERATION[what]
    toml = deployment.federation.read_text()
    if change is not None:
        old, new = change
        if "5672" in old:
            old, new = f"/{deployment.vhost}", "/nowhere"
        assert old in toml
        toml = toml.replace(old, new, 1)
    wrong = deployment.folder / "wrong.toml"
    wrong.write_text(toml)
    try:
        if secret is not None:
            kept = (deployment.folder / secret[0]).read_text()
            (deployment.folder / secret[0]).write_text(secret[1])
        done = deployment.command("coordinator", str(wrong), check=False)
    finally:
        if secret is not None:
            (deployment.folder / secret[0]).write_text(kept)
    assert done.returncode == code, done.stderr
    assert names in done.stderr
    assert "Traceback" not in done.stderr
    for hidden in (COORDINATOR_PASSWORD, "not-it", deployment.s3.secret_key):
        assert hidden not in done.stderr


def test_a_run_without_servers_is_sent_to_simulate(deployment):
    """The other way to run it is named."""
    alone = deployment.folder / "alone.toml"
    alone.write_text(deployment.federation.read_text().partition("[broker]")[0])
    done = deployment.command("coordinator", str(alone), check=False)
    assert done.returncode == 10
    assert "gradualdiff simulate" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "code", "names"),
    [
        ("broker-password", "missing", 10, "broker.password_file"),
        ("@127.0.0.1", "@broker.example", 10, "broker.transport"),
        ("\n[broker]", "\n[brokr]", 10, "did you mean broker?"),
        ("//a@", "//b@", 43, "broker.password_file"),
    ],
)
def test_a_participant_says_what_is_wrong_and_ends(deployment, old, new, code, names):
    """Before it loads any model."""
    toml = deployment.site_toml("a")
    wrong = toml.with_name("wrong.toml")
    wrong.write_text(toml.read_text().replace(old, new, 1))
    done = deployment.command("participant", str(wrong), check=False)
    assert done.returncode == code, done.stderr
    assert names in done.stderr


def test_two_participants_do_not_share_a_workspace(deployment):
    """The second is turned away."""
    deployment.model = deployment.folder  # the real program, which waits for a run in vain
    deployment.start_participant("a")
    deployment.wait_for("broker.connected", "a")
    done = deployment.command("participant", str(deployment.site_toml("a")), check=False)
    assert done.returncode == 24
    assert "workspace of a" in done.stderr
    deployment.kill("a")


def test_setup_may_be_repeated(deployment):
    """Accounts and kits stay as they are."""
    before = (deployment.site_toml("a").with_name("broker-password")).read_text()
    done = deployment.command("setup", str(deployment.federation))
    assert "a: has an account" in done.stdout
    assert (deployment.site_toml("a").with_name("broker-password")).read_text() == before


def test_setup_heals_a_broker_without_accounts_and_a_kit_without_a_password(deployment):
    """The account is made again from its record; a password nobody has is replaced."""
    file = deployment.site_toml("b").with_name("broker-password")
    before = file.read_text()
    deployment.rabbit.api("DELETE", "users/b")
    deployment.command("setup", str(deployment.federation))
    deployment.rabbit.api("GET", "users/b")
    assert file.read_text() == before
    file.unlink()
    deployment.command("setup", str(deployment.federation))
    assert file.read_text() not in ("", before)
    address = BrokerAddress(
        "127.0.0.1", deployment.rabbit.port, deployment.vhost, "b", file.read_text().strip(), False
    )
    connect(address).close()


def test_setup_brings_an_accounts_limits_to_sites_of_an_earlier_release(deployment):
    """Also to one that is not in this run; a site that is connected stays so."""
    office = ("--federation", str(deployment.federation))
    deployment.command("sites", "add", "earlier", *office)
    for name in ("a", "b", "earlier"):
        for limit in LIMITS:
            deployment.rabbit.api("DELETE", f"user-limits/{name}/{limit}")
        assert limits_of(deployment, name) == {}
    site = load_site(deployment.site_toml("a"))
    with connect(broker_address(site.broker, deployment.site_toml("a").parent)) as line:
        deployment.command("setup", str(deployment.federation))
        assert line.depth(site_queue("a")) == 0
    for name in ("a", "b", "earlier"):
        assert limits_of(deployment, name) == LIMITS
    deployment.command("sites", "remove", "earlier", "--yes", *office)


def limits_of(deployment, account):
    """What the broker says."""
    given = deployment.rabbit.api("GET", f"user-limits/{account}")
    return {limit: count for entry in given for limit, count in entry["value"].items()}


def test_the_store_is_closed_to_whoever_has_no_url(deployment):
    """A kit holds no key: no listing, no reading, no writing."""
    store = open_store(load_federation(deployment.federation), deployment.folder)
    store.put("runs/tiny/deltas/00001/b.safetensors", b"secret")
    kit = deployment.site_toml("a").parent
    for file in kit.rglob("*"):
        if file.is_file():
            assert deployment.s3.secret_key not in file.read_text(errors="replace")
    place = f"{deployment.s3.url}/{deployment.vhost}"
    with urllib3.PoolManager(retries=False) as http:
        for method, path in (
            ("GET", "?list-type=2"),
            ("GET", "/runs/tiny/deltas/00001/b.safetensors"),
            ("PUT", "/runs/tiny/rounds/00001/closed.json"),
            ("DELETE", "/runs/tiny/deltas/00001/b.safetensors"),
        ):
            assert http.request(method, place + path).status == 403
        assert http.request("GET", deployment.s3.url + "/").status == 403


def test_json_of_runs_works_over_s3(deployment):
    """The tools read the same ledger; --federation names it."""
    done = deployment.command("runs", "list", "--json", "--federation", str(deployment.federation))
    assert json.loads(done.stdout) == []
