"""Whole federations over the embedded pair, with numpy learners: results, faults, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from coordinator.audit.verification import verify_run
from coordinator.history import read_history
from coordinator.runs.inspection import summarise_run
from participant.learner.port import DELTA_FILE
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.disk.files import digest_file
from shared.errors import (
    DataError,
    InterruptedRunError,
    LedgerDamagedError,
    ModelError,
    RunExistsError,
    RunFailedError,
    RunStuckError,
    StoreUnavailableError,
)
from shared.protocol import wire
from shared.protocol.events import DeltaSubmitted, MessageRefused, TrainingFailed, UploadRequested
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import LocalMetrics, Manifest, TensorSpec
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FailedRecord,
    FinishedRecord,
    RefusedRecord,
    RejoinedRecord,
)
from shared.stores.directory import DirectoryStore
from shared.tensors.tensor_file import FileDigest, TensorFile
from tests import federations
from tests.numpy_learner import NUMERICS, NumpyLearner
from tests.steering import forget


def ledger(folder, run="test"):
    return Ledger(DirectoryStore(folder / "store"), run, "test", lambda: 0.0)


def records(folder, kind, run="test"):
    return [r for r in ledger(folder, run).history() if isinstance(r, kind)]


def verify(folder, run="test"):
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return verify_run(ledger(folder, run), scratch, lambda _: None)


# Results -----------------------------------------------------------------------------------


def test_the_same_seed_ends_in_the_same_adapter(tmp_path):
    """Two runs of one config differ in nothing that counts."""
    one = federations.run(federations.config(), tmp_path / "one")
    two = federations.run(federations.config(), tmp_path / "two")
    assert one.adapter_sha == two.adapter_sha


def test_another_seed_ends_in_another_adapter(tmp_path):
    """The seed reaches the first adapter and the participants."""
    one = federations.run(federations.config(), tmp_path / "one")
    two = federations.run(federations.config(run={"seed": 2}), tmp_path / "two")
    assert one.adapter_sha != two.adapter_sha


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "sign", "topk", "uniform16"])
def test_every_codec_runs_and_verifies(tmp_path, codec):
    """A codec is a name in the config; the chain can be recomputed under each."""
    federations.run(federations.config(codec={"name": codec}), tmp_path)
    found = verify(tmp_path)
    assert (found.rounds, found.deltas, found.findings) == (3, 9, [])


def test_deltas_with_equal_weights_are_fedavg_on_weights(tmp_path):
    """A + mean(theta_i - A) = mean(theta_i), to 1e-6 in every element, over three rounds."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    closings = records(tmp_path, ClosingRecord)
    closed = {r.round: r for r in records(tmp_path, ClosedRecord)}
    assert len(closings) == 3
    for closing in closings:
        source = _tensors(store, tmp_path, topology.adapter_key("test", closing.source_sha))
        locals_ = []
        for item in closing.inputs:
            key = topology.delta_key("test", item.from_round, item.site, item.sha)
            delta = _tensors(store, tmp_path, key)
            locals_.append({n: source[n].astype(np.float64) + delta[n] for n in source})
        sha = closed[closing.round].adapter_sha
        result = _tensors(store, tmp_path, topology.adapter_key("test", sha))
        for name in source:
            fedavg = np.mean([local[name] for local in locals_], axis=0)
            assert np.max(np.abs(fedavg - result[name])) < 1e-6


def test_a_random_fraction_trains_and_is_on_record(tmp_path):
    """Selection is recomputed by verify from the recorded seed; unselected sites do not train."""
    selection = {"method": "random", "fraction": 0.5}
    config = federations.config(("a", "b", "c", "d"), 4, selection=selection)
    sites = federations.learners(config)
    federations.run(config, tmp_path, sites)
    assert all(len(c.inputs) == 2 for c in records(tmp_path, ClosingRecord))
    assert sum(len(site.trained) for site in sites.values()) == 8
    assert verify(tmp_path).findings == []


def test_weights_by_examples_follow_the_recorded_counts(tmp_path):
    """A site with three times the examples weighs three times as much."""
    config = federations.config(("a", "b"), 1, aggregation={"weights": "examples"})
    sites = federations.learners(config)
    sites["a"].examples = 30
    federations.run(config, tmp_path, sites)
    (closing,) = records(tmp_path, ClosingRecord)
    assert [i.weight for i in closing.inputs] == [0.75, 0.25]


def test_a_converged_run_stops_early_and_says_so(tmp_path):
    """Patience 1 with an unreachable min_delta ends as soon as two losses are known."""
    config = federations.config(rounds=9, convergence={"patience": 1, "min_delta": 100.0})
    state = federations.run(config, tmp_path)
    assert state.last_round == 2
    assert "converged" in state.finished.reason


# Restarts ------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def restarted(config, tmp_path):
    """Die before and after the n-th store write, for every n: the folder of each run that went on.

    Each ends in the digest of the undisturbed run.
    """
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    fired = 0
    for n in range(1, 200):
        for after in (False, True):
            folder = tmp_path / f"{n}-{after}"
            store = _CrashingStore(folder / "store", at=n, after=after)
            try:
                state = federations.run(config, folder, store=store)
            except Crash:
                fired += 1
                state = federations.run(config, folder)
            assert state.adapter_sha == wanted
            yield folder
        if store.writes < n:
            break
    assert fired > 40
    assert fired % 2 == 0


def test_a_restart_at_any_write_ends_in_the_same_adapter(tmp_path):
    """Whichever it died at: resume gives the undisturbed digest."""
    assert len(list(restarted(federations.config(("a", "b"), 2), tmp_path))) > 40


def test_a_finished_site_does_not_train_again_after_a_restart(tmp_path):
    """What is committed in the workspace or the ledger is announced, not trained again."""
    config = federations.config(("a", "b"), 2)
    sites = federations.learners(config)
    trained = sites["a"].trained

    def crash(task):
        if task.round == 2:
            raise Crash

    sites["b"].fault = crash
    with pytest.raises(Crash):
        federations.run(config, tmp_path, sites)
    assert trained == [1, 2]
    again = federations.learners(config)
    federations.run(config, tmp_path, again)
    assert again["a"].trained == []
    assert again["b"].trained == [2]


def test_sigkill_in_the_middle_of_a_round_and_resume_end_in_the_same_adapter(tmp_path):
    """The process is really killed while a site trains in round 2; the digest is the same."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    script = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from tests import federations
        config = federations.config()
        sites = federations.learners(config)
        def die(task):
            if task.round == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        sites["b"].fault = die
        federations.run(config, pathlib.Path(sys.argv[1]), sites)
        """
    )
    folder = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(records(folder, ClosedRecord)) == 1
    assert federations.run(federations.config(), folder).adapter_sha == wanted


def test_a_stop_between_two_pieces_of_work_loses_nothing(tmp_path):
    """should_stop ends the run with InterruptedRunError; resuming ends in the same adapter."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    asked = iter(range(1000))
    with pytest.raises(InterruptedRunError):
        federations.run(federations.config(), tmp_path / "cut", should_stop=lambda: next(asked) > 6)
    assert federations.run(federations.config(), tmp_path / "cut").adapter_sha == wanted


def test_an_altered_adapter_in_a_workspace_is_fetched_again(tmp_path):
    """A site trains from the bytes that the round names, whatever lies on its disk."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites = federations.learners(config)

    def crash(task):
        if task.round == 2:
            raise Crash

    sites["b"].fault = crash
    folder = tmp_path / "altered"
    with pytest.raises(Crash):
        federations.run(config, folder, sites)
    (path,) = (folder / "sites" / "b" / "test" / "adapters").glob("*.safetensors")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-8] + bytes(8))
    assert federations.run(config, folder).adapter_sha == wanted


def test_foreign_names_in_a_workspace_are_left_alone(tmp_path):
    """A stray file or folder neither stops a round nor is counted."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    trained = tmp_path / "stray" / "sites" / "a" / "test" / "trained"
    (trained / "lost+found").mkdir(parents=True)
    (trained / ".DS_Store").write_bytes(b"x")
    (trained / f"00009-{'a' * 64}").mkdir()
    assert federations.run(config, tmp_path / "stray").adapter_sha == wanted
    kept = sorted(path.name[:6] for path in trained.iterdir())
    assert kept == [".DS_St", "00003-", "00009-", "lost+f"]


def test_a_crash_while_getting_ready_declines_by_name(tmp_path):
    """An error nobody foresaw (no memory for a rank, say) is no traceback at the coordinator."""
    config = federations.config()
    sites = federations.learners(config)

    class Crashes(NumpyLearner):
        def prepare(self, announced, report):
            raise RuntimeError("private words")

    sites["a"] = Crashes("a")
    with pytest.raises(RunStuckError, match=r"a \(RuntimeError while loading"):
        federations.run(config, tmp_path, sites)


@pytest.mark.parametrize("file", ["delta.safetensors", "submission.json"])
def test_a_torn_workspace_is_trained_anew(tmp_path, file):
    """A truncated file at a site is noticed there; the round ends in the same adapter."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites = federations.learners(config)

    def crash(task):
        if task.round == 2:
            raise Crash

    sites["c"].fault = crash
    folder = tmp_path / "torn"
    with pytest.raises(Crash):
        federations.run(config, folder, sites)
    store = DirectoryStore(folder / "store")
    forget(store, topology.accepted_key("test", 2, "a"))
    for info in list(store.list("runs/test/deltas/00002/a-")):
        store.delete(info.key)
    (path,) = (folder / "sites" / "a" / "test" / "trained").glob(f"00002-*/{file}")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    again = federations.learners(config)
    assert federations.run(config, folder, again).adapter_sha == wanted
    assert again["a"].trained == [2, 3]


def test_a_closing_without_a_result_is_carried_out_at_the_next_start(tmp_path):
    """A ledger whose last round stops at the decision goes on from there."""
    wanted = federations.run(federations.config(), tmp_path).adapter_sha
    store = DirectoryStore(tmp_path / "store")
    forget(store, topology.finished_key("test"), topology.round_key("test", 3, "closed"))
    assert federations.run(federations.config(), tmp_path).adapter_sha == wanted


def test_a_torn_record_stops_the_run_and_names_the_object(tmp_path):
    """A half-written record (no tool of ours makes one) is named, not guessed around."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    key = topology.round_key("test", 3, "closing")
    store.put(key, store.get(key)[:40])
    store.delete(topology.finished_key("test"))
    with pytest.raises(LedgerDamagedError, match=r"rounds/00003/closing\.json"):
        federations.run(federations.config(), tmp_path)


def test_another_config_does_not_resume_a_run(tmp_path):
    """The error names the setting, what is on record and what came."""
    federations.run(federations.config(), tmp_path)
    with pytest.raises(RunExistsError, match=r"run\.rounds is 3 on record, 4 here"):
        federations.run(federations.config(rounds=4), tmp_path)


# Bad deltas ----------------------------------------------------------------------------------


class Spoils(NumpyLearner):
    """Alters the bytes of its own delta file before they are announced."""

    def __init__(self, site, alter, rounds=(1, 2, 3)):
        super().__init__(site)
        self.alter, self.rounds = alter, rounds

    def learn(self, task, *args):
        learned = super().learn(task, *args)
        if task.round in self.rounds:
            path = args[2] / DELTA_FILE
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(self.alter(data))
            learned = replace(learned, delta=FileDigest(*digest_file(path)))
        return learned


def with_nan(data):
    end = len(data) - 4 - int.from_bytes(data[-4:], "little")  # the packed header follows
    return data[: end - 4] + np.float32(np.nan).tobytes() + data[end:]


def test_a_delta_with_nan_is_refused_by_name_and_waits(tmp_path):
    """on_failure = wait: the run stands still, says who and why, and resumes once mended."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites = federations.learners(config)
    sites["b"] = Spoils("b", with_nan, rounds=(2,))
    with pytest.raises(RunStuckError, match=r"round 2 waits for b .*layer\.lora_B"):
        federations.run(config, tmp_path / "bad", sites)
    (refused,) = records(tmp_path / "bad", RefusedRecord)
    assert (refused.site, refused.round) == ("b", 2)
    assert federations.run(config, tmp_path / "bad").adapter_sha == wanted


def test_a_delta_with_nan_is_left_out_under_exclude(tmp_path):
    """on_failure = exclude: the others count, the exclusion and its reason stand on record."""
    config = federations.config(policy={"on_failure": "exclude"})
    sites = federations.learners(config)
    sites["b"] = Spoils("b", with_nan, rounds=(2,))
    federations.run(config, tmp_path, sites)
    closing = records(tmp_path, ClosingRecord)[1]
    assert [i.site for i in closing.inputs] == ["a", "c"]
    assert "layer.lora_B" in closing.excluded["b"]
    assert verify(tmp_path).findings == []


def test_a_delta_of_the_wrong_shape_is_refused(tmp_path):
    """A site whose tensors are not the run's is told so by tensor and shape."""
    config = federations.config(policy={"on_failure": "exclude"})
    sites = federations.learners(config)
    other = Manifest(
        tensors=(
            TensorSpec(name="layer.lora_A.weight", shape=(4, 8), init="zeros"),
            TensorSpec(name="layer.lora_C.weight", shape=(8, 4), init="zeros"),
        ),
        target_modules=("layer",),
    )

    class Renames(NumpyLearner):
        def learn(self, *args):
            self.manifest = federations.learners(config)["a"].manifest
            learned = super().learn(*args)
            return replace(learned, delta=_rename(args[3] / DELTA_FILE, other))

    sites["c"] = Renames("c")
    federations.run(config, tmp_path, sites)
    refused = records(tmp_path, RefusedRecord)
    assert {r.site for r in refused} == {"c"}
    assert "lora_C" in refused[0].reason or "lora_B" in refused[0].reason


def test_a_delta_of_another_round_is_refused(tmp_path):
    """A replayed file carries its round in its header, whatever the message says."""
    config = federations.config(policy={"on_failure": "exclude"})
    sites = federations.learners(config)
    kept = {}

    def replay(data):
        return kept.setdefault("bytes", data)

    sites["a"] = Spoils("a", replay)
    federations.run(config, tmp_path, sites)
    refused = records(tmp_path, RefusedRecord)
    assert [(r.site, r.round) for r in refused] == [("a", 2), ("a", 3)]
    assert "round" in refused[0].reason


def test_a_truncated_delta_is_refused(tmp_path):
    """Bytes that are no safetensors file are refused with the reason."""
    config = federations.config(policy={"on_failure": "exclude"}, rounds=1)
    sites = federations.learners(config)
    sites["a"] = Spoils("a", lambda data: data[:-7])
    federations.run(config, tmp_path, sites)
    (refused,) = records(tmp_path, RefusedRecord)
    assert refused.site == "a"
    assert "bytes" in refused.reason


def test_a_delta_that_its_disk_damaged_at_once_is_trained_again(tmp_path):
    """What is announced is the sha256 of what was written, not of what lies there afterwards."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    sites, damaged = federations.learners(config), []

    class Damaged(NumpyLearner):
        def learn(self, task, *args):
            learned = super().learn(task, *args)
            if task.round == 2 and not damaged:
                path = args[2] / DELTA_FILE
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
                damaged.append(path)
            return learned

    sites["b"] = Damaged("b")
    assert federations.run(config, tmp_path / "damaged", sites).adapter_sha == wanted
    assert damaged
    assert sites["b"].trained == [1, 2, 2, 3]
    assert records(tmp_path / "damaged", RefusedRecord) == []


# Bad sites -----------------------------------------------------------------------------------


def test_a_site_with_another_base_is_named_and_the_run_begins_once_it_is_mended(tmp_path):
    """Deltas over different bases must not be averaged, and one site ends no run for good."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "undisturbed").adapter_sha
    sites = federations.learners(config)
    sites["c"].fingerprint = "e" * 64
    with pytest.raises(RunStuckError, match=r"start waits for c \(c loaded another base model"):
        federations.run(config, tmp_path, sites)
    assert records(tmp_path, FinishedRecord) == []
    assert federations.run(config, tmp_path).adapter_sha == wanted
    assert [(r.site, r.word) for r in records(tmp_path, RejoinedRecord)] == [("c", 2)]
    assert verify(tmp_path).findings == []


def test_a_run_that_ended_over_unlike_bases_in_an_earlier_release_is_shown_as_it_was(tmp_path):
    """Its end is on record; nothing is waited for."""
    config = federations.config()
    sites = federations.learners(config)
    sites["c"].fingerprint = "e" * 64
    with pytest.raises(RunStuckError):
        federations.run(config, tmp_path, sites)
    reason = "the sites loaded different base models"
    ledger(tmp_path).write(FinishedRecord(round=0, sha=None, reason=reason, failed=True))
    summary = summarise_run(read_history(DirectoryStore(tmp_path / "store"), "test"))
    assert (summary.state, summary.reason, summary.waits_for) == ("failed", reason, {})
    with pytest.raises(RunFailedError, match=reason):
        federations.run(config, tmp_path)


def test_two_sites_with_unlike_bases_are_both_named(tmp_path):
    """One against one is no majority: nobody is right, and the run waits."""
    config = federations.config(("a", "b"))
    sites = federations.learners(config)
    sites["b"].fingerprint = "e" * 64
    said = r"none has a majority \(a: ffffffffffff; b: eeeeeeeeeeee\).*base\.fingerprint"
    with pytest.raises(RunStuckError, match=said):
        federations.run(config, tmp_path, sites)
    assert federations.run(config, tmp_path).finished is not None


def test_a_pinned_base_outvotes_the_majority(tmp_path):
    """What the config says is right, however many sites have something else."""
    config = federations.config(base={"model": "none", "fingerprint": "f" * 64})
    sites = federations.learners(config)
    sites["a"].fingerprint = sites["b"].fingerprint = "e" * 64
    with pytest.raises(RunStuckError, match=r"waits for a \(a loaded .*; b \(b loaded "):
        federations.run(config, tmp_path, sites)
    assert federations.run(config, tmp_path).finished is not None


def test_a_site_with_other_versions_is_waited_for_unless_allowed(tmp_path):
    """Equal versions are asked for by default; the error says how to allow others."""
    other = NUMERICS.model_copy(update={"versions": {"numpy": "9.9"}})
    config = federations.config()
    sites = federations.learners(config)
    sites["b"].numerics = other
    with pytest.raises(RunStuckError, match=r'waits for b \(b runs .*run\.versions = "any"'):
        federations.run(config, tmp_path / "equal", sites)
    allowed = federations.config(run={"versions": "any"})
    assert federations.run(allowed, tmp_path / "any", sites).finished is not None


def test_after_the_start_timeout_a_run_with_enough_sites_begins_without_the_odd_one(tmp_path):
    """It is let in later, once it is mended; until then it is told nothing and counts nowhere."""
    limits = {"min_participants": 2, "start_timeout_seconds": 0.001}
    config = federations.config(rounds=2, run=limits)
    sites = federations.learners(config)
    sites["c"].fingerprint = "e" * 64
    state = federations.run(config, tmp_path, sites)
    assert (state.genesis.members, sorted(state.members)) == (("a", "b"), ["a", "b"])
    assert verify(tmp_path).findings == []


def test_a_site_that_declines_is_named_and_the_run_begins_once_it_is_mended(tmp_path):
    """Bad data at one site stops nothing for good."""
    config = federations.config()
    sites = federations.learners(config)

    class Declines(NumpyLearner):
        def prepare(self, announced, report):
            raise DataError("data.path: expected text, got an empty file; give another file")

    sites["a"] = Declines("a")
    with pytest.raises(RunStuckError, match=r"a \(data\.path: expected text"):
        federations.run(config, tmp_path, sites)
    assert federations.run(config, tmp_path).finished is not None


def test_a_failing_training_is_tried_again_and_then_left_out(tmp_path):
    """Retryable or not, what failed and how often is on record."""
    policy = {"on_failure": "exclude", "max_attempts": 2}
    config = federations.config(rounds=1, policy=policy)
    sites = federations.learners(config)
    attempts = []

    def fail(task):
        attempts.append(task.attempt)
        raise ModelError("loss is not finite")

    sites["b"].fault = fail
    federations.run(config, tmp_path, sites)
    assert attempts == [1]
    (failed,) = records(tmp_path, FailedRecord)
    assert (failed.site, failed.attempt) == ("b", 1)
    (closing,) = records(tmp_path, ClosingRecord)
    assert closing.excluded == {"b": "loss is not finite"}


def test_a_crash_inside_the_training_is_tried_again(tmp_path):
    """An error nobody foresaw (a full GPU, say) is reported without its text and retried."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    config = federations.config()
    sites = federations.learners(config)
    crashes = [RuntimeError("private words"), RuntimeError("private words")]

    def crash(task):
        if task.round == 2 and crashes:
            raise crashes.pop()

    sites["b"].fault = crash
    assert federations.run(config, tmp_path / "crashed", sites).adapter_sha == wanted
    failed = records(tmp_path / "crashed", FailedRecord)
    assert [(f.site, f.attempt, f.retryable) for f in failed] == [("b", 1, True), ("b", 2, True)]
    assert "private" not in failed[0].reason


def test_a_site_that_always_crashes_is_given_up_after_max_attempts(tmp_path):
    """exclude: three attempts by default, then the round closes without the site."""
    config = federations.config(rounds=1, policy={"on_failure": "exclude"})
    sites = federations.learners(config)

    def crash(task):
        raise RuntimeError

    sites["b"].fault = crash
    federations.run(config, tmp_path, sites)
    assert [f.attempt for f in records(tmp_path, FailedRecord)] == [1, 2, 3]
    (closing,) = records(tmp_path, ClosingRecord)
    assert list(closing.excluded) == ["b"]


def test_a_full_store_stops_the_run_with_the_cause_and_nothing_is_lost(tmp_path):
    """The error names the path; with room again the run ends in the same adapter."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "whole").adapter_sha

    class Full(DirectoryStore):
        writes = 0

        def create(self, key, data):
            self.writes += 1
            if self.writes > 9:
                raise StoreUnavailableError(f"{key}: the disk is full; free space there")
            return super().create(key, data)

    with pytest.raises(StoreUnavailableError, match="the disk is full"):
        federations.run(config, tmp_path / "full", store=Full(tmp_path / "full" / "store"))
    assert federations.run(config, tmp_path / "full").adapter_sha == wanted


# Bad messages --------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The newest connection of each identity, as the federation under test makes them."""
    connections = {}
    connect = EmbeddedBroker.connect

    def spy(self, identity, rights):
        connections[identity] = connect(self, identity, rights)
        return connections[identity]

    monkeypatch.setattr(EmbeddedBroker, "connect", spy)
    return connections


def of_a_newer_version():
    """A message as a later release would send it."""
    outer = msgpack.unpackb(
        wire.encode(UploadRequested(run="test", round=1, sha="a" * 64, size=9), 1.0)
    )
    return msgpack.packb({**outer, "v": 99})


def test_garbage_on_the_queues_changes_nothing(tmp_path, opened):
    """Random bytes and a newer version are refused with their bytes; same digest."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    sent = []

    def disturb(state):
        if state.opened is None or sent:
            return
        for body in (b"\xff\x00garbage", b"x" * 1000, of_a_newer_version()):
            sent.append(body)
            key = topology.event_key("test", "b", "submitted")
            opened["b"].publish([Message(topology.EVENTS_EXCHANGE, key, body)])
            to_site = Message(topology.SITES_EXCHANGE, "b", body)
            opened["coordinator"].publish([to_site])

    state = federations.run(federations.config(), tmp_path / "noisy", moved=disturb)
    assert state.adapter_sha == wanted
    assert len(sent) == 3
    assert opened["coordinator"].depth(topology.REFUSED_QUEUE) == 6
    consumer = opened["coordinator"].consume(topology.REFUSED_QUEUE)
    event = wire.decode(consumer.receive().body).event
    assert event.data in sent


def test_what_a_site_may_not_say_is_refused_and_leaves_no_trace(tmp_path, opened):
    """Another run's event, a stranger, a made-up round, an absurd size: refused, same digest."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    sha, sent = "a" * 64, []

    def disturb(state):
        if state.opened is None or sent:
            return
        # An account of the same broker that this run does not list.
        stranger = type(opened["b"])(opened["b"]._server, "x", topology.site_rights("x"))
        asked = {"run": "test", "round": 1, "sha": sha, "size": 9}
        for name, connection, values in (
            ("b", opened["b"], {**asked, "run": "other"}),
            ("b", opened["b"], {**asked, "round": 99999}),
            ("b", opened["b"], {**asked, "size": 10**15}),
            ("x", stranger, asked),
        ):
            event = UploadRequested(**values)
            sent.append(event)
            key = topology.event_key("test", name, event.word)
            body = wire.encode(event, 1.0)
            connection.publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    state = federations.run(federations.config(), tmp_path / "noisy", moved=disturb)
    assert state.adapter_sha == wanted
    assert len(sent) == 4
    assert opened["coordinator"].depth(topology.REFUSED_QUEUE) == 4
    assert records(tmp_path / "noisy", RefusedRecord) == []
    assert verify(tmp_path / "noisy").findings == []


@pytest.mark.parametrize("kind", ["requested", "submitted"])
def test_a_late_delta_is_answered_late_and_not_counted(tmp_path, opened, kind):
    """The result is the same. A delta is on record as late; a mere request leaves no trace."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    sent = []

    def disturb(state):
        if state.last_round == 2 and not sent:
            event = UploadRequested(run="test", round=1, sha="a" * 64, size=9)
            if kind == "submitted":
                event = DeltaSubmitted(
                    run="test",
                    round=1,
                    source_sha="b" * 64,
                    sha="a" * 64,
                    size=9,
                    examples=1,
                    tokens=1,
                    metrics=LocalMetrics(steps=1),
                )
            sent.append(event)
            key = topology.event_key("test", "b", event.word)
            body = wire.encode(event, 1.0)
            opened["b"].publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    state = federations.run(federations.config(), tmp_path / "late", moved=disturb)
    assert state.adapter_sha == wanted
    assert len(sent) == 1
    late = [(r.site, r.round, r.verdict) for r in records(tmp_path / "late", RefusedRecord)]
    assert late == ([("b", 1, "late")] if kind == "submitted" else [])


def test_a_refusal_that_a_site_reports_is_marked_as_its_word(tmp_path, opened):
    """Queue and sender in it are whatever the site says: the copy that is kept says so."""
    sent = []

    def disturb(state):
        if state.last_round == 1 and not sent:
            sent.append(
                MessageRefused(
                    queue="gradualdiff.site.a", sender="coordinator", reason="", data=b"x"
                )
            )
            key = topology.event_key("any", "b", MessageRefused.word)
            body = wire.encode(sent[0], 1.0)
            opened["b"].publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    federations.run(federations.config(), tmp_path, moved=disturb)
    delivery = opened["coordinator"].consume(topology.REFUSED_QUEUE).receive()
    kept = wire.decode(delivery.body).event
    assert (kept.reported_by, kept.queue, kept.data) == ("b", topology.site_queue("b"), b"x")


def test_a_failed_attempt_that_nobody_made_is_refused(tmp_path, opened):
    """A number out of turn would stand in every later announcement; it leaves no trace."""
    wanted = federations.run(federations.config(), tmp_path / "whole").adapter_sha
    sent = []

    def disturb(state):
        if state.last_round == 1 and not sent:
            sent.append(
                TrainingFailed(run="test", round=2, attempt=1_000_000, reason="x", retryable=True)
            )
            key = topology.event_key("test", "b", TrainingFailed.word)
            body = wire.encode(sent[0], 1.0)
            opened["b"].publish([Message(topology.EVENTS_EXCHANGE, key, body)])

    state = federations.run(federations.config(), tmp_path / "noisy", moved=disturb)
    assert state.adapter_sha == wanted
    assert len(sent) == 1
    assert records(tmp_path / "noisy", FailedRecord) == []
    assert opened["coordinator"].depth(topology.REFUSED_QUEUE) == 1


# Damage --------------------------------------------------------------------------------------


def test_one_flipped_byte_of_a_stored_delta_is_found_by_round_and_object(tmp_path):
    """Verify names the very object and leaves the other rounds in peace."""
    federations.run(federations.config(), tmp_path)
    record = next(r for r in records(tmp_path, AcceptedRecord) if (r.round, r.site) == (2, "b"))
    key = topology.delta_key("test", 2, "b", record.sha)
    store = DirectoryStore(tmp_path / "store")
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    found = verify(tmp_path).findings
    assert [(f.round, f.key) for f in found] == [(2, key)]


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("members/a.json", "fingerprint", "e" * 64),
        ("rounds/00000/closed.json", "adapter_size", 7),
        ("rounds/00002/accepted/b.json", "norm", 0.5),
        ("rounds/00002/accepted/b.json", "size", 5),
        ("rounds/00002/closed.json", "mean_norm", 0.5),
        ("finished.json", "failed", True),
        ("finished.json", "round", 2),
    ],
)
def test_a_figure_that_can_be_recomputed_is_compared(tmp_path, key, field, value):
    """Records are read whole and held against what the objects say."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    values = json.loads(store.get(f"runs/test/{key}"))
    store.put(f"runs/test/{key}", json.dumps({**values, field: value}).encode())
    assert verify(tmp_path).findings


def test_a_record_of_another_place_and_a_missing_opening_are_found(tmp_path):
    """A record must say what its key says; a result without its opening is no chain."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    key = "runs/test/rounds/00002/opened.json"
    opened = store.get(key)
    store.delete(key)
    assert [f.key for f in verify(tmp_path).findings] == [key]
    store.put(key, opened)
    moved = "runs/test/rounds/00003/closing.json"
    store.put(moved, store.get("runs/test/rounds/00002/closing.json"))
    (found,) = verify(tmp_path).findings
    assert found.key == moved
    assert "belongs to" in found.problem


@pytest.mark.parametrize("what", ["adapter", "weight", "seed", "missing", "config"])
def test_altered_records_and_adapters_are_found(tmp_path, what):
    """Every link of the chain is recomputed."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    closed = records(tmp_path, ClosedRecord)[1]
    keys = {
        "adapter": topology.adapter_key("test", closed.adapter_sha),
        "weight": topology.round_key("test", 2, "closing"),
        "seed": topology.round_key("test", 2, "opened"),
        "missing": topology.adapter_key("test", closed.adapter_sha),
        "config": topology.adapter_key("test", closed.adapter_sha, "adapter_config.json"),
    }
    key = keys[what]
    if what == "missing":
        store.delete(key)
    elif what in ("weight", "seed"):
        values = json.loads(store.get(key))
        if what == "seed":
            values["seed"] += 1
        else:
            values["inputs"][0]["weight"] *= 2
        store.put(key, json.dumps(values).encode())
    else:
        store.put(key, store.get(key) + b" ")
    found = verify(tmp_path).findings
    assert found
    assert any(f.round == 2 and f.key == key for f in found)


# Parts ---------------------------------------------------------------------------------------


class _CrashingStore(DirectoryStore):
    """Ends the process' life just before or after its ``at``-th write."""

    def __init__(self, root, at, after):
        super().__init__(root)
        self.at, self.after, self.writes = at, after, 0

    def _count(self, write, *args):
        self.writes += 1
        if self.writes == self.at and not self.after:
            raise Crash
        result = write(*args)
        if self.writes == self.at:
            raise Crash
        return result

    def create_from(self, key, chunks):  # records, and what sites send
        return self._count(super().create_from, key, chunks)

    def put_file(self, key, path):
        return self._count(super().put_file, key, path)


def _tensors(store, folder, key):
    path = folder / "tensors"
    store.fetch_file(key, path)
    with TensorFile(path) as file:
        return {name: file.read(name).copy() for name in file.layouts}


def _rename(path, manifest):
    """Rewrite a delta file under another manifest's names, header and values kept."""
    from shared.tensors.tensor_file import TensorLayout, write_tensors

    with TensorFile(path) as file:
        values = [file.read(name).copy() for name in sorted(file.layouts)]
        metadata = dict(file.metadata)
    path.unlink()
    layouts = [TensorLayout(s.name, "F32", s.shape) for s in manifest.tensors]
    return write_tensors(path, layouts, values, metadata)
