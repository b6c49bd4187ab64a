"""One file proves a run where no store is: and nothing else passes for one."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil

import pytest
from typer.testing import CliRunner

from coordinator.audit.attestation import FORMAT, MOST_LINE_BYTES, attest, read_attestation
from coordinator.audit.attestation import write_attestation as write
from coordinator.audit.bom import bill_of_materials
from coordinator.audit.held import HeldObjects
from gradualdiff.attesting import check_attestation
from gradualdiff.cli.main import app
from shared import topology
from shared.config import canonical_json
from shared.errors import (
    ConfigError,
    GradualDiffError,
    LedgerDamagedError,
    ObjectMissingError,
    SignatureError,
)
from shared.protocol.chain import signed_json
from shared.protocol.ledger import Ledger
from shared.trust.keys import SigningKey
from tests import federations
from tests.steering import store_of, verify

OTHER = SigningKey.generate()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run that is signed, ``key`` of its coordinator, and its ``file``."""
    folder = tmp_path_factory.mktemp("signed")
    federations.run(federations.config(trust={"key_file": "coordinator.key"}), folder)
    key = SigningKey.load(folder / "coordinator.key", "test")
    (folder / "run.attest").write_bytes(made(folder, key))
    return folder, key, folder / "run.attest"


def made(folder, key):
    """An attestation of the run, always at the same moment."""
    ledger = Ledger(store_of(folder), "test", "test", lambda: 0.0)
    told = attest(ledger, verify(folder), 1e9, "1.0")
    told.bom = bill_of_materials()
    file = io.BytesIO()
    write(told, file, key)
    return file.getvalue()


def lines_of(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def written(path, lines, key=None):
    """Lines as a file; its last line is made anew, signed by ``key``."""
    body = b"".join(canonical_json(line) + b"\n" for line in lines[:-1])
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + signed_json({"sha256": digest}, FORMAT, key) + b"\n")
    return path


def test_equal_input_gives_equal_bytes(world):
    """Nothing of the moment or the machine's order is in it but what it names."""
    folder, key, file = world
    assert made(folder, key) == file.read_bytes()


def test_it_proves_the_run_without_its_store(world, tmp_path, monkeypatch):
    """Records, links, sites' and coordinator's signatures, and the result: by the file alone."""
    folder, key, file = world
    copy = shutil.copy(file, tmp_path / "run.attest")
    monkeypatch.chdir(tmp_path)
    head = verify(folder).chain.head
    checked = check_attestation(copy, key=key.public.text, against=head)
    assert checked.found.findings == []
    assert checked.found.adapter_sha == verify(folder).adapter_sha
    assert checked.found.chain.known
    assert {one.site for one in checked.found.signers} == {"a", "b", "c"}
    assert checked.told.signed_by == key.public
    assert checked.told.verification["recomputed"] == 3
    assert all(one.stored and one.size for one in checked.told.objects)
    assert len(checked.told.objects) == 4 + 9
    assert {"name", "version", "purl"} <= checked.told.bom["components"][0].keys()


def test_the_command_writes_and_checks_it(world, tmp_path):
    """And says whose word each line is; an adapter that is not the result is refused."""
    folder, key, _ = world
    run = CliRunner()
    store, to = str(folder / "store"), str(tmp_path / "mine")
    done = run.invoke(app, ["runs", "attest", "test", "--to", to, "--store", store])
    assert done.exit_code == 0, done.output
    adapter = store_of(folder).get(topology.adapter_key("test", verify(folder).adapter_sha))
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter)
    done = run.invoke(app, ["runs", "attest", "--check", to, "--adapter", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "the file that you gave is this one" in done.stdout
    assert "file: signed by nobody" in done.stdout
    assert f"by {key.public.fingerprint}, the chain's own word" in done.stdout
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter + b"x")
    with pytest.raises(LedgerDamagedError, match="--adapter: expected sha256"):
        run.invoke(
            app,
            ["runs", "attest", "--check", to, "--adapter", str(tmp_path)],
            catch_exceptions=False,
        )
    for words in (["test"], ["test", "--to", to, "--check", to], []):
        with pytest.raises(ConfigError, match="give one of them"):
            run.invoke(app, ["runs", "attest", *words], catch_exceptions=False)
    words = ["runs", "attest", "test", "--to", to, "--store", store]
    with pytest.raises(ConfigError, match="which is there"):
        run.invoke(app, words, catch_exceptions=False)


def test_a_run_with_a_finding_is_not_attested(world, tmp_path):
    """The command says what is wrong and writes nothing."""
    copy = shutil.copytree(world[0], tmp_path / "copy", symlinks=True)
    store_of(copy).delete(topology.evaluated_key("test", 3, "a"))
    words = ["runs", "attest", "test", "--to", str(tmp_path / "f"), "--store", str(copy / "store")]
    with pytest.raises(LedgerDamagedError, match="failed verification"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "f").exists()


def test_a_forged_file_is_found_by_what_it_lacks(world, tmp_path):
    """Its sender has every byte, and no key but his own."""
    _, key, file = world
    public, lines, path = key.public.text, lines_of(file), tmp_path / "forged"
    path.write_bytes(file.read_bytes().replace(b'"recomputed":3', b'"recomputed":2'))
    with pytest.raises(SignatureError, match="altered"):
        check_attestation(path)
    for mine in (None, OTHER):
        with pytest.raises(SignatureError, match="attestation: expected the signature of"):
            check_attestation(written(path, lines, mine), key=public)
    less = [line for line in lines if "evaluated/a" not in line.get("record", "")]
    assert len(less) == len(lines) - 1
    (finding,) = check_attestation(written(path, less)).found.findings
    assert "is missing, but a link names it" in finding.problem
    other = [dict(line, sha256="0" * 64) if "object" in line else line for line in lines]
    found = check_attestation(written(path, other)).found.findings
    assert len(found) == len([line for line in lines if "object" in line])


def test_another_history_is_found_by_a_head(world, tmp_path):
    """Made, linked and signed anew by somebody else: only who has a head or a key can tell."""
    folder, key, _ = world
    other = tmp_path / "other"
    other.mkdir()
    OTHER.save(other / "coordinator.key")
    trust = {"key_file": "coordinator.key"}
    federations.run(federations.config(run={"seed": 5}, trust=trust), other)
    path = tmp_path / "other.attest"
    path.write_bytes(made(other, OTHER))
    assert check_attestation(path).found.findings == []
    found = check_attestation(path, against=verify(folder).chain.head).found.findings
    assert any("another history" in finding.problem for finding in found)
    with pytest.raises(SignatureError):
        check_attestation(path, key=key.public.text)


def test_a_signature_for_another_purpose_is_none(world, tmp_path):
    """What the coordinator signs as an entry of a log is no attestation."""
    _, key, file = world
    body = b"".join(file.read_bytes().splitlines(keepends=True)[:-1])
    path = tmp_path / "crossed"
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + signed_json({"sha256": digest}, "audit/00000001.json", key) + b"\n")
    with pytest.raises(SignatureError):
        check_attestation(path)


HOSTILE = {
    "empty": b"",
    "no line": b"x",
    "no JSON": b"x\n",
    "deep": b"[" * 100_000 + b"\n",
    "long": b'"' + b"x" * MOST_LINE_BYTES + b'"\n',
    "long number": b"1" * 10_000 + b"\n",
    "surrogate": b'{"format":"\\ud800"}\n',
    "another format": b'{"format":"gradualdiff-attestation/9"}\n',
    "far": b'{"format":"gradualdiff-attestation/1","made":1e300,"release":"1","run":"a"}\n',
    "a path": b'{"format":"gradualdiff-attestation/1","made":1.0,"release":"1","run":"../a"}\n',
    "no end": b'{"format":"gradualdiff-attestation/1","made":1.0,"release":"1","run":"a"}\n',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_attestation_is_named_by_its_line(what):
    """Nothing of it is believed, none of it takes more than one line's memory."""
    with pytest.raises(LedgerDamagedError, match=r"^it: line [12]: "):
        read_attestation(io.BytesIO(HOSTILE[what]), "it")


def test_more_after_the_signature_and_a_record_twice_are_refused(world, tmp_path):
    """One reader must not see another file than the next."""
    lines, path = lines_of(world[2]), tmp_path / "twice"
    written(path, [*lines[:2], lines[1], *lines[2:]])
    with pytest.raises(LedgerDamagedError, match="once, got it again"):
        check_attestation(path)
    path.write_bytes(world[2].read_bytes() + b"{}\n")
    with pytest.raises(LedgerDamagedError, match="expected the end"):
        check_attestation(path)


def test_damaged_bytes_never_pass_and_never_crash(world, tmp_path):
    """Files with bytes changed, cut or doubled, with their signature and without one."""
    draw, file = random.Random(17), world[2]
    whole, lines, path = file.read_bytes(), lines_of(file), tmp_path / "fuzzed"
    for turn in range(150):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        match turn % 3:
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randrange(1, 200)]
            case 2:
                data[at:at] = data[at : at + draw.randrange(1, 200)]
        path.write_bytes(data)
        with pytest.raises(GradualDiffError):
            check_attestation(path)
    for _ in range(40):  # unsigned, so that the records themselves are reached
        some = [dict(line) for line in lines]
        line = draw.choice([one for one in some if "text" in one])
        text = list(line["text"])
        text[draw.randrange(len(text))] = draw.choice('0a"{}[]:,\u202e')
        changed = "".join(text) != line["text"]
        line["text"] = "".join(text)
        try:
            found = check_attestation(written(path, some)).found.findings
        except GradualDiffError:
            continue
        assert bool(found) == changed


def test_a_first_adapter_without_end_is_not_drawn(world, monkeypatch):
    """A record may claim any shape, and a check would fill the disk with it."""
    monkeypatch.setattr("coordinator.audit.verification.MOST_DRAWN", 10)
    with pytest.raises(LedgerDamagedError, match="expected at most 10 values to draw"):
        check_attestation(world[2])


def test_the_file_of_an_unsigned_run_says_so(tmp_path):
    """Its records are consistent; nobody vouches for them."""
    federations.run(federations.config(rounds=1), tmp_path)
    path = tmp_path / "file"
    path.write_bytes(made(tmp_path, None))
    checked = check_attestation(path)
    assert (checked.found.findings, checked.told.signed_by) == ([], None)
    assert checked.found.chain.by is None
    with pytest.raises(SignatureError, match="got one of nobody"):
        check_attestation(path, key=OTHER.public.text)


def test_a_signed_run_of_masked_deltas_is_attested(tmp_path):
    """What survivors revealed is linked and in the file; its check misses no tensor."""
    secure = {"aggregation": {"secure": True}, "codec": {"name": "int8"}}
    config = federations.config("abc", 2, trust={"key_file": "coordinator.key"}, **secure)
    state = federations.run(config, tmp_path)
    key = SigningKey.load(tmp_path / "coordinator.key", "test")
    path = tmp_path / "file"
    path.write_bytes(made(tmp_path, key))
    checked = check_attestation(path, key=key.public.text)
    assert (checked.found.findings, checked.found.adapter_sha) == ([], state.adapter_sha)
    for number in (1, 2):
        prefix = f"rounds/{number:05d}/unmasked/"
        revealed = [name for name in checked.told.records if prefix in name]
        assert len(revealed) >= 2  # two thirds are enough
        linked = b"".join(checked.told.records.values())
        assert all(name.partition("test/")[2].encode() in linked for name in revealed)


def test_nothing_but_records_is_held():
    """A tensor is never in it."""
    with pytest.raises(ObjectMissingError):
        HeldObjects({}).get("runs/test/adapters/x")
