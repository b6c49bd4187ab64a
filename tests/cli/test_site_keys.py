"""Keys from the command line: made at a site, enrolled, replaced and revoked by an operator."""

from __future__ import annotations

import json
import stat
import tomllib

import pytest
from typer.testing import CliRunner

from coordinator.audit_log import raw_entries, read_entries
from coordinator.site_keys import SiteKeys
from gradualdiff.cli import audit, site, sites
from gradualdiff.cli.kits import open_servers, prepare_kit
from gradualdiff.doctor.checks import check_key
from shared.config import load_site
from shared.errors import ConfigError, LedgerDamagedError
from shared.stores.directory import DirectoryStore
from shared.trust.keys import SigningKey

FEDERATION = """
[run]
name = "night"
participants = ["north", "south"]
[base]
model = "some/model"
[broker]
url = "amqp://coordinator@127.0.0.1:5672/"
password_file = "password"
[store]
directory = "store"
site_url = "https://store.example:9000"
"""
TRUST = '[trust]\nkey_file = "coordinator.key"\n'


def command(app, *arguments):
    """Run a command; its JSON. Errors of ours come out as they are."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture
def office(tmp_path, monkeypatch):
    """The folder of a federation that signs, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federation.toml").write_text(FEDERATION + TRUST)
    SigningKey.generate().save(tmp_path / "coordinator.key")
    return tmp_path


def fresh():
    """A site's new public key."""
    return SigningKey.generate().public


# At the site -------------------------------------------------------------------------------------


def test_a_site_makes_its_key_once_and_says_it_again(tmp_path):
    """Mode 0600, beside site.toml; the same public half whenever it is asked."""
    first = command(site.app, "init", "--site", tmp_path / "site.toml")
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600
    assert command(site.app, "init", "--site", tmp_path / "site.toml") == first
    assert SigningKey.load(tmp_path / "identity.key", "test").public.text == first["key"]
    assert not (tmp_path / "site.toml").exists()


def test_a_site_without_the_table_gets_it(tmp_path):
    """At the end of its file, once; a table that is there already is its owner's."""
    file = tmp_path / "site.toml"
    file.write_text('[site]\nname = "north"')
    for _ in range(2):
        command(site.app, "init", "--site", file)
    assert tomllib.loads(file.read_text())["trust"] == {"key_file": "identity.key"}
    file.write_text('[trust]\nkey_file = "mine.key"\n')
    command(site.app, "init", "--site", file)
    assert (tmp_path / "mine.key").exists()
    assert file.read_text() == '[trust]\nkey_file = "mine.key"\n'


def test_a_table_without_a_key_file_is_not_written_into(tmp_path):
    """A person is told the lines."""
    file = tmp_path / "site.toml"
    file.write_text(f'[trust]\ncoordinator = "{fresh().text}"\n')
    before = file.read_text()
    result = CliRunner().invoke(site.app, ["init", "--site", str(file)])
    assert result.exit_code == 0
    assert 'key_file = "identity.key"' in result.stdout
    assert file.read_text() == before


def test_a_file_that_is_no_toml_is_said_to_be_none(tmp_path):
    """Before any key is made."""
    (tmp_path / "site.toml").write_text("[site")
    with pytest.raises(ConfigError, match=r"expected a site\.toml"):
        command(site.app, "init", "--site", tmp_path / "site.toml")
    assert not (tmp_path / "identity.key").exists()


def test_a_kit_is_ready_for_the_sites_key(office):
    """It pins the coordinator's, and names the file that site init makes."""
    servers = open_servers(office / "federation.toml")
    kit = prepare_kit(servers, "north", None)
    own = SigningKey.load(office / "coordinator.key", "test").public
    made = command(site.app, "init", "--site", kit / "site.toml")
    text = (kit / "site.toml").read_text().replace('path = ""', 'path = "text.jsonl"')
    (kit / "site.toml").write_text(text)
    trust = load_site(kit / "site.toml").trust
    assert (trust.coordinator, trust.key_file) == (own.text, "identity.key")
    assert made["file"] == str(kit / "identity.key")
    assert "site init" in (kit / "README.txt").read_text().splitlines()[0]


def test_a_kit_of_a_run_that_nobody_signs_says_nothing_of_keys(office):
    """As before there were any."""
    (office / "federation.toml").write_text(FEDERATION)
    kit = prepare_kit(open_servers(office / "federation.toml"), "north", None)
    assert "[trust]" not in (kit / "site.toml").read_text()
    assert "key" not in (kit / "README.txt").read_text().splitlines()[0]


# At the coordinator ------------------------------------------------------------------------------


def test_a_key_is_enrolled_replaced_and_revoked_on_record(office):
    """Each with its times and reason; giving the same again changes nothing."""
    one, two = fresh(), fresh()
    command(sites.app, "key", "north", "--key", one.text)
    (told,) = command(sites.app, "key", "north", "--key", one.text)
    assert (told["fingerprint"], told["revoked"]) == (one.fingerprint, None)
    old, new = command(sites.app, "key", "north", "--key", two.text, "--reason", "new laptop")
    assert (old["reason"], new["key"], new["revoked"]) == ("new laptop", two.text, None)
    assert old["revoked"] == new["enrolled"]
    told = command(sites.app, "key", "north", "--revoke", "--reason", "stolen")
    assert [one["reason"] for one in told] == ["new laptop", "stolen"]
    assert all(one["revoked"] for one in told)
    assert command(sites.app, "key", "north") == told
    assert command(sites.app, "key", "south") == []


def test_a_key_that_was_used_before_is_not_taken(office):
    """Another site's, a revoked one, the coordinator's own; nothing goes on record."""
    one, two = fresh(), fresh()
    own = SigningKey.load(office / "coordinator.key", "test").public
    command(sites.app, "key", "north", "--key", one.text)
    command(sites.app, "key", "north", "--key", two.text)
    for name, key in (("south", two), ("north", one), ("north", own)):
        with pytest.raises(ConfigError, match=r"expected a new key, got .* site init"):
            command(sites.app, "key", name, "--key", key.text)
    assert len(list(DirectoryStore(office / "store").list("keys/"))) == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--revoke",), "expected --reason and no --key"),
        (("--revoke", "--reason", "x", "--key", "ed25519:x"), "expected --reason and no --key"),
        (("--revoke", "--reason", "x"), "expected a key in force, got none"),
        (("--key", "ed25519:x"), "expected ed25519: and 43 characters"),
    ],
)
def test_what_cannot_be_asked_is_said(office, arguments, problem):
    """And nothing is on record."""
    with pytest.raises(ConfigError, match=problem):
        command(sites.app, "key", "north", *arguments)
    assert not list(DirectoryStore(office / "store").list("keys/"))


def test_without_the_table_or_the_coordinators_key_nobody_is_enrolled(office):
    """What to add is said."""
    (office / "coordinator.key").unlink()
    with pytest.raises(ConfigError, match="gradualdiff setup"):
        command(sites.app, "key", "north", "--key", fresh().text)
    (office / "federation.toml").write_text(FEDERATION)
    with pytest.raises(ConfigError, match=r"expected a \[trust\] table"):
        command(sites.app, "key", "north", "--key", fresh().text)


def test_who_has_the_store_alone_enrols_nobody(office):
    """A record by another key, one in another's place, and one that is left out are damage."""
    for _ in range(3):
        command(sites.app, "key", "north", "--key", fresh().text)
    own = SigningKey.load(office / "coordinator.key", "test").public
    store = DirectoryStore(office / "store")
    first, second, third = (info.key for info in store.list("keys/"))
    whole = {key: store.get(key) for key in (first, second, third)}
    swapped = {second: whole[third].replace(b'"number":3', b'"number":2')}
    forged = {third: json.dumps(json.loads(whole[third]) | {"key": fresh().text}).encode()}
    for change in (swapped, forged, {second: whole[first]}, {second: b"{}"}):
        for key, data in (whole | change).items():
            store.put(key, data)
        with pytest.raises(LedgerDamagedError, match="restore"):
            SiteKeys(store, own).read_on()


def test_doctor_says_what_is_wrong_with_a_key(tmp_path):
    """One that others can read, none, and the fingerprint of a good one."""
    key = SigningKey.generate()
    key.save(tmp_path / "a.key")
    (good,) = check_key(tmp_path / "a.key")
    assert (good.verdict, key.public.fingerprint in good.says) == ("OK", True)
    (tmp_path / "a.key").chmod(0o644)
    (open_one,) = check_key(tmp_path / "a.key")
    (missing,) = check_key(tmp_path / "b.key")
    assert (open_one.verdict, missing.verdict) == ("FAIL", "FAIL")
    assert "chmod 600" in open_one.says
    assert "site init" in missing.says


# On record ---------------------------------------------------------------------------------------


def test_what_is_done_to_keys_is_logged_and_signed_by_the_coordinators(office):
    """So that whoever holds the store alone cannot write the log anew."""
    public = fresh()
    command(sites.app, "key", "north", "--key", public.text)
    command(sites.app, "key", "north", "--revoke", "--reason", "lost")
    store, own = DirectoryStore(office / "store"), own_key(office)
    entries = list(read_entries(raw_entries(store)))
    deeds = [entry for entry in entries if entry.ended is None]
    assert [(entry.what, entry.about, entry.why) for entry in deeds] == [
        ("key.enrol", f"north {public.fingerprint}", ""),
        ("key.revoke", "north", "lost"),
    ]
    assert {(entry.broker_account, entry.signed_by) for entry in entries} == {
        ("coordinator", own.text)
    }
    place = ("--store", str(office / "federation.toml"))
    found = command(audit.app, "verify", "--key", own.text, *place)
    assert (found["entries"], found["signed"]) == (4, 4)
    with pytest.raises(LedgerDamagedError, match="audit/00000001"):
        command(audit.app, "verify", "--key", public.text, *place)


def own_key(office):
    """The coordinator's public key."""
    return SigningKey.load(office / "coordinator.key", "trust.key_file").public
