"""What a site keeps of a run's history, and what it is good for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from coordinator.audit.links import Expected
from gradualdiff.cli.main import app
from participant.heads import Heads, newest_heads, read_heads
from participant.workspace import Workspace
from shared import topology
from shared.protocol.chain import Head
from shared.protocol.events import RoundClosed
from shared.protocol.ledger import Ledger
from shared.protocol.said import Said
from shared.trust.keys import SigningKey
from tests import federations
from tests.steering import store_of, verify

KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run that is signed."""
    folder = tmp_path_factory.mktemp("signed")
    federations.run(federations.config(trust={"key_file": "coordinator.key"}), folder)
    return folder


def kept(folder, site="a"):
    return read_heads(Workspace(folder / "sites" / site).heads_path("test"))


def test_every_round_leaves_a_head_that_the_coordinator_signed(finished):
    """Each proves itself by the coordinator's public key, for this site, and by no other."""
    key = SigningKey.load(finished / "coordinator.key", "test").public
    lines = kept(finished)
    assert {line.round for line in lines if line.event == "RoundClosed"} == {1, 2, 3}
    numbers = [line.head.number for line in lines]
    assert numbers == sorted(set(numbers))
    assert len(lines) <= 2 * 3 + 1
    birth = Ledger(store_of(finished), "test", "test", lambda: 0.0).birth
    for line in lines:
        seal = line.said.seal()
        seal.check(topology.COORDINATOR, f"site:a:{birth}", key)
        assert seal.head == str(line.head)


def test_every_head_is_in_the_chain_and_the_last_one_covers_the_result(finished):
    """What was confirmed to a site is what the store shows."""
    key = SigningKey.load(finished / "coordinator.key", "test").public
    for line in kept(finished):
        found = verify(finished, expected=Expected(key, demanded=True, against=line.head))
        assert found.findings == []
    store = store_of(finished)
    linked = "".join(
        store.get(topology.link_key("test", number)).decode()
        for number in range(1, kept(finished)[-1].head.number + 1)
    )
    assert all(f'"{name}"' in linked for name in ("finished.json", "rounds/00003/closed.json"))


def test_the_command_says_the_newest_of_each_run(finished, tmp_path):
    """In the form that ``runs verify --against`` takes."""
    site = tmp_path / "site.toml"
    site.write_text(
        f'[site]\nname = "a"\nworkspace = "{finished / "sites" / "a"}"\n'
        '[data]\npath = "x.jsonl"\ntext = "text"\n'
    )
    done = CliRunner().invoke(app, ["site", "heads", "--site", str(site), "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    (newest,) = newest_heads(finished / "sites" / "a")
    assert (row["run"], row["round"], row["head"]) == ("test", 3, str(newest.head))


def test_nothing_is_kept_where_nobody_signs(tmp_path):
    """Anybody could have said it."""
    federations.run(federations.config(rounds=1), tmp_path)
    assert kept(tmp_path) == []


def closed(number, head, to="site:a"):
    """A round's end as it comes with a head."""
    said = Said(event="", to=to, by=KEY.public.text, signature="", head=head)
    return RoundClosed(run="test", round=number, result_sha="0" * 64).heard(said)


def test_an_old_word_adds_nothing_and_a_torn_line_hides_none(tmp_path):
    """Repeated after a restart too: the file says what was there."""
    workspace = Workspace(tmp_path)
    for _ in range(2):
        heads = Heads(workspace)
        for number in (1, 2, 1):
            heads.keep(closed(number, f"{number}:{'a' * 64}"), 1.0)
    path = workspace.heads_path("test")
    assert len(path.read_bytes().splitlines()) == 2
    with path.open("ab") as file:
        file.write(b'{"run":"te')
    assert [line.head.number for line in read_heads(path)] == [1, 2]
    Heads(workspace).keep(closed(3, f"3:{'a' * 64}"), 1.0)
    assert [line.head.number for line in read_heads(path)] == [1, 2, 3]


def test_another_link_of_the_same_number_is_said_loudly(tmp_path, monkeypatch):
    """One coordinator tells two stories: the first one stays on the site's disk."""
    said = []
    logger = SimpleNamespace(error=lambda word, **what: said.append((word, what["number"])))
    monkeypatch.setattr("participant.heads.get_logger", lambda: logger)
    heads = Heads(Workspace(tmp_path))
    for letter in "ab":
        heads.keep(closed(1, f"5:{letter * 64}"), 1.0)
    assert said == [("history.forked", 5)]
    assert [line.head for line in read_heads(Workspace(tmp_path).heads_path("test"))] == [
        Head(5, "a" * 64)
    ]


def test_a_run_that_is_begun_anew_has_heads_of_its_own(tmp_path, monkeypatch):
    """Its links are numbered from 1 again: that is no fork, and the newest line is the newest."""
    monkeypatch.setattr("participant.heads.get_logger", lambda: pytest.fail("a fork"))
    heads = Heads(Workspace(tmp_path))
    for birth, number, letter in (("old", 5, "a"), ("new", 1, "b"), ("new", 5, "c")):
        heads.keep(closed(number, f"{number}:{letter * 64}", f"site:a:{birth}"), 1.0)
    lines = read_heads(Workspace(tmp_path).heads_path("test"))
    assert [line.head.number for line in lines] == [5, 1, 5]
    assert [line.head.sha[0] for line in newest_heads(tmp_path)] == ["c"]
