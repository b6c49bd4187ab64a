"""What an export hands out: files of the reader's own, as the record says."""

import pytest

from coordinator.history import read_history
from coordinator.runs.export import best_round, export_adapter
from shared import topology
from shared.disk.files import digest_file
from shared.errors import LedgerDamagedError
from shared.protocol.manifest import HeldOut
from shared.protocol.records import ClosedRecord
from tests import federations
from tests.command_line import gradualdiff
from tests.numpy_learner import NumpyLearner
from tests.steering import records, store_of, verify

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    federations.run(federations.config(rounds=1), folder)
    return folder


def export(folder, to):
    """The last adapter, written to ``to``."""
    return export_adapter(read_history(store_of(folder), "test"), store_of(folder), to, None)


def test_what_is_done_to_an_export_does_not_reach_the_ledger(finished, tmp_path):
    """Each file is written into, as save_pretrained does; root may write what is read-only."""
    out = tmp_path / "out"
    export(finished, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    inodes = {path.stat().st_ino for path in (finished / "store").rglob("*")}
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.stat().st_ino not in inodes
        with path.open("r+b") as file:
            file.write(b"another")
    assert verify(finished).findings == []


def test_a_damaged_config_is_not_exported(tmp_path):
    """It has no sha256 on record; what is exported is made from the record."""
    federations.run(federations.config(rounds=1), tmp_path)
    (closed,) = records(tmp_path, ClosedRecord)
    key = topology.adapter_key("test", closed.adapter_sha, "adapter_config.json")
    store = store_of(tmp_path)
    whole = store.get(key)
    store.put(key, whole.replace(b'"r": ', b'"r": 9'))
    export(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == whole


def test_damaged_tensors_are_not_exported(tmp_path):
    """The export fails, names the object, and leaves no such file behind."""
    federations.run(federations.config(rounds=1), tmp_path)
    (closed,) = records(tmp_path, ClosedRecord)
    key = topology.adapter_key("test", closed.adapter_sha)
    store = store_of(tmp_path)
    store.put(key, store.get(key)[:-1] + b"\x01")
    with pytest.raises(LedgerDamagedError, match=key):
        export(tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


class Measures(NumpyLearner):
    """Says these held-out losses, of one adapter after the other; None measures nothing."""

    def evaluate(self, run, source, report):
        nll = self.losses.pop(0)
        return None if nll is None else HeldOut(nll=nll, tokens=self.examples, examples=1)


@pytest.mark.parametrize(
    ("at_a", "at_b", "best"),
    [
        # Of the base, then of rounds 1 to 3. Site a holds out nine times as much as b.
        ((9.0, 3.0, 1.0, 2.0), (9.0, 3.0, 1.0, 2.0), 2),
        ((9.0, 1.0, 2.0, 2.0), (9.0, 9.0, 2.0, 2.0), 1),  # 1.8 where a mean of sites is 5
        ((0.1, 3.0, 2.0, 2.5), (0.1, 3.0, 2.0, 2.5), 2),  # the base is no round
        ((9.0, 2.0, 2.0, 3.0), (9.0, 2.0, 2.0, 3.0), 1),  # of equals the first
        ((9.0, 3.0, 1.0, 2.0), (9.0, 3.0, None, 2.0), 3),  # what b did not measure is not compared
    ],
)
def test_the_best_round_has_the_lowest_loss_of_all_held_out_text(tmp_path, at_a, at_b, best):
    """And its adapter is what --best exports."""
    sites = {"a": Measures("a", examples=90), "b": Measures("b", examples=10)}
    sites["a"].losses, sites["b"].losses = list(at_a), list(at_b)
    federations.run(federations.config(sites), tmp_path, sites)
    assert best_round(read_history(store_of(tmp_path), "test")) == best
    to = tmp_path / "out"
    done = gradualdiff(
        "runs", "export", "test", "--best", "--to", to, "--store", tmp_path / "store"
    )
    assert done.returncode == 0, done.stderr
    closed = {record.round: record.adapter_sha for record in records(tmp_path, ClosedRecord)}
    assert digest_file(to / "adapter_model.safetensors")[0] == closed[best]


def test_the_ledgers_files_are_read_only(finished):
    """Nobody but root can write into one by mistake."""
    files = [path for path in (finished / "store").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}
