"""Checkpoints by themselves, without torch: whole and of this round, or not used; two are kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from gradualdiff.cli.serve import make_context
from participant import checkpoints as module
from participant.checkpoints import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    Checkpoints,
    Tensors,
    TrainingProgress,
)
from participant.learner.port import Progress
from participant.reporting import Reporter
from participant.workspace import Submission, Workspace
from shared import failpoints
from shared.config import SiteConfig, canonical_json, parse
from shared.disk.files import digest_file
from shared.errors import ConfigError
from shared.protocol.events import RoundStarted, WireTraining
from shared.protocol.manifest import HeldOut, LocalMetrics
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors

BASIS = "b" * 64
HELD_OUT = HeldOut(nll=0.1 + 0.2, tokens=7, examples=2)


def task(**values):
    fields = {
        "run": "run",
        "round": 2,
        "source_sha": "a" * 64,
        "get_url": "",
        "expires_at": 1e12,
        "training": WireTraining(local_steps=9),
        "progress_from": 0.25,
        "progress_to": 0.5,
        "seed": 11,
        "codec": "fp32",
        **values,
    }
    return RoundStarted(**fields)


def progress(step, **values):
    """Floats with no short decimal form: they must come back exactly."""
    return TrainingProgress(
        step=step,
        state="kept",
        held_out=HELD_OUT,
        nll=tuple(1 / (3 + i) for i in range(step)),
        tokens=tuple(range(1, step + 1)),
        norms=tuple(1 / (7 + i) for i in range(step)),
        **values,
    )


def tensors(step):
    """Two files that say which step they are of."""

    def write(path):
        value = np.full((3, 2), step, np.float32)
        return write_tensors(path, [TensorLayout("x", "F32", (3, 2))], [value])

    return Tensors(write, write)


def opened(root, every_seconds=60.0, basis=BASIS, site="site", **values):
    """The round's checkpoints, looked through, and the newest."""
    given = task(**values)
    made = Workspace(root, every_seconds).checkpoints(given, site)
    return made, made.newest(basis)


def filled(root, *steps):
    made, found = opened(root)
    assert found is None
    for step in steps:
        assert made.save(progress(step), tensors(step) if step else None)
    return made


def newest_step(root, **values):
    found = opened(root, **values)[1]
    return None if found is None else found.progress.step


def folder(root):
    (found,) = (root / "run" / "checkpoints").iterdir()
    return found


def names(root):
    return sorted(path.name for path in folder(root).iterdir())


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoints.arm(None)


def test_what_comes_back_is_what_was_saved(tmp_path):
    """Every float exactly, tensors and all, in another process's place."""
    filled(tmp_path, 0, 3)
    found = opened(tmp_path)[1]
    assert found.progress == progress(3)
    assert found.folder == folder(tmp_path) / "step-00000003"
    assert folder(tmp_path).name == "00002-aaaaaaaaaaaa"
    for path in (found.adapter, found.optimizer):
        with TensorFile(path) as file:
            assert (file.read("x") == 3).all()


def test_the_first_holds_the_evaluation_and_no_tensors(tmp_path):
    """So that held-out loss is not measured again after a kill in the first minute."""
    filled(tmp_path, 0)
    found = opened(tmp_path)[1]
    assert (found.progress.step, found.progress.held_out) == (0, HELD_OUT)
    assert [path.name for path in found.folder.iterdir()] == [PROGRESS_FILE]


def test_the_last_two_are_kept(tmp_path):
    """One may turn out damaged."""
    filled(tmp_path, 0, 2, 4, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", [ADAPTER_FILE, OPTIMIZER_FILE, PROGRESS_FILE])
@pytest.mark.parametrize("damage", ["torn", "altered", "gone"])
def test_a_damaged_one_is_said_and_the_one_before_it_is_taken(tmp_path, name, damage):
    """Whatever happened to any of its files."""
    filled(tmp_path, 2, 4)
    path = folder(tmp_path) / "step-00000004" / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(data[:-1])
    else:
        # One digit of a loss, or one byte of a tensor: the file's form stays what it was.
        other = data.replace(b"0.3000", b"0.4000").replace(b"\x80", b"\x81")
        path.write_bytes(other)
        assert other != data
    with capture_logs() as logs:
        made, found = opened(tmp_path)
    assert found.progress.step == 2
    assert [line["event"] for line in logs] == ["checkpoint.ignored"]
    assert "step-00000004" in logs[0]["path"]
    assert logs[0]["reason"]
    made.save(progress(4), tensors(4))
    assert newest_step(tmp_path) == 4
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("seed", {"seed": 12}),
        ("settings", {"training": WireTraining(local_steps=9, learning_rate=1e-3)}),
        ("settings", {"progress_to": 0.75}),
        ("site", {"site": "other"}),
        ("basis", {"basis": "c" * 64}),
    ],
)
def test_one_of_something_else_is_said_and_not_used(tmp_path, field, other):
    """The folder's name is not proof: the record says what it is of."""
    filled(tmp_path, 2)
    with capture_logs() as logs:
        made, found = opened(tmp_path, **other)
    assert found is None
    assert f"{field} differ" in logs[0]["reason"]
    # What cannot be used makes room for what can.
    made.save(progress(1), tensors(1))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(("field", "other"), [("round", 3), ("source_sha", "a" * 63 + "b")])
def test_one_moved_to_another_rounds_folder_is_not_used(tmp_path, field, other):
    """Also where twelve digits of the source's sha are equal."""
    filled(tmp_path, 2)
    wanted = folder(tmp_path).parent / module.checkpoint_folder_name(
        **{"round_number": 2, "source_sha": "a" * 64}
        | ({"round_number": 3} if field == "round" else {"source_sha": other})
    )
    if wanted != folder(tmp_path):
        folder(tmp_path).rename(wanted)
    with capture_logs() as logs:
        assert newest_step(tmp_path, **{field: other}) is None
    assert f"{field} differ" in logs[0]["reason"]


def test_how_the_delta_will_travel_does_not_matter(tmp_path):
    """The codec, the attempt and the URL are no part of the training."""
    filled(tmp_path, 2)
    assert newest_step(tmp_path, codec="int8", attempt=4, get_url="http://other/") == 2


def test_the_state_a_round_began_from_matters_where_it_is_kept(tmp_path):
    """Another counted delta means another optimiser state; a reset optimiser has none."""
    filled(tmp_path, 2)
    assert newest_step(tmp_path, last_counted="d" * 64) == 2
    keep = {"training": WireTraining(local_steps=9, optimizer_state="keep")}
    made, _ = opened(tmp_path, last_counted="d" * 64, **keep)
    made.save(progress(3), tensors(3))
    assert newest_step(tmp_path, last_counted="d" * 64, **keep) == 3
    assert newest_step(tmp_path, last_counted="e" * 64, **keep) is None


def test_names_that_are_not_ours_are_left_alone(tmp_path):
    """A stray file neither counts nor goes."""
    made = filled(tmp_path, 2)
    for name in ("step-x", "lost+found"):
        (folder(tmp_path) / name).mkdir()
    made.save(progress(3), tensors(3))
    made.save(progress(4), tensors(4))
    assert newest_step(tmp_path) == 4
    assert names(tmp_path) == ["lost+found", "step-00000003", "step-00000004", "step-x"]


def test_a_step_number_is_what_the_record_says(tmp_path):
    """A folder that was renamed by hand is not another step."""
    filled(tmp_path, 2)
    (folder(tmp_path) / "step-00000002").rename(folder(tmp_path) / "step-00000008")
    assert newest_step(tmp_path) is None


def test_one_is_due_so_many_seconds_after_the_end_of_the_last(tmp_path, monkeypatch):
    """Monotonic time; what a slow disk takes does not count as training."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    made, _ = opened(tmp_path, 60.0)
    now[0] += 59.9
    assert not made.due()
    now[0] += 0.2
    assert made.due()

    def slow(path):
        now[0] += 500.0
        return tensors(1).adapter(path)

    made.save(progress(1), Tensors(slow, slow))
    assert not made.due()
    now[0] += 60.0
    assert made.due()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("at", ["adapter", "optimizer"])
def test_a_disk_that_fails_costs_the_checkpoint_and_nothing_else(tmp_path, code, at):
    """A warning with the reason; what was there is as it was, and the next interval tries again."""
    made = filled(tmp_path, 2)
    before = names(tmp_path)

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    broken = Tensors(**{"adapter": tensors(3).adapter, "optimizer": tensors(3).optimizer, at: fail})
    with capture_logs() as logs:
        assert not made.save(progress(3), broken)
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("checkpoint.failed", "warning")
    ]
    assert os.strerror(code) in logs[0]["reason"]
    assert not made.due()
    assert names(tmp_path) == before
    assert newest_step(tmp_path) == 2
    assert made.save(progress(4), tensors(4))


POINTS = [
    "checkpoint.begun",
    "checkpoint.adapter_written",
    "checkpoint.optimizer_written",
    "checkpoint.progress_written",
    "checkpoint.renamed",
    "checkpoint.synced",
    "checkpoint.old_removed",
]

KILLED = """
import os, signal, sys
from pathlib import Path
from shared import failpoints
from tests.participant import test_checkpoints as shown

point, root = sys.argv[1], Path(sys.argv[2])
made, found = shown.opened(root)
shown.failpoints.arm(lambda name: name == point and os.kill(os.getpid(), signal.SIGKILL))
made.save(shown.progress(6), shown.tensors(6))
"""


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_in_the_middle_of_one_leaves_the_last_or_the_new_one_whole(tmp_path, point):
    """A process of its own, SIGKILL; then the next one saves as if nothing had been."""
    filled(tmp_path, 2, 4)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, point, tmp_path], capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    is_new = POINTS.index(point) >= POINTS.index("checkpoint.renamed")
    with capture_logs() as logs:
        made, found = opened(tmp_path)
    assert found.progress.step == (6 if is_new else 4)
    assert logs == []
    made.save(progress(8), tensors(8))
    assert names(tmp_path) == [f"step-{found.progress.step:08d}", "step-00000008"]


def test_the_points_named_here_are_those_that_a_save_passes(tmp_path):
    """In this order, each once."""
    made = filled(tmp_path, 2)
    passed = []
    failpoints.arm(passed.append)
    made.save(progress(3), tensors(3))
    assert passed == POINTS


# The workspace -------------------------------------------------------------------------------


def committed(root, workspace, source_sha="a" * 64):
    making = workspace.new_round("run")
    (making / "delta.safetensors").write_bytes(b"delta")
    sha, size = digest_file(making / "delta.safetensors")
    metrics = LocalMetrics(steps=1)
    submission = Submission(
        run="run", round=2, source_sha=source_sha, sha=sha, size=size,
        examples=1, tokens=1, metrics=metrics, state="fresh",
    )  # fmt: skip
    workspace.commit(making, submission)


def test_a_committed_round_drops_its_checkpoints_and_no_others(tmp_path):
    """They hold nothing that the delta does not."""
    filled(tmp_path, 2)
    workspace = Workspace(tmp_path)
    committed(tmp_path, workspace, "c" * 64)
    assert newest_step(tmp_path) == 2
    committed(tmp_path, workspace)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_sweep_drops_those_of_closed_rounds(tmp_path):
    """A round that closed without this site is not gone on with; a later one is."""
    filled(tmp_path, 2)
    stray = tmp_path / "run" / "checkpoints" / "lost+found"
    stray.mkdir()
    workspace = Workspace(tmp_path)
    workspace.sweep("run", 1, "f" * 64)
    assert newest_step(tmp_path) == 2
    workspace.sweep("run", 2, "f" * 64)
    assert newest_step(tmp_path) is None
    assert list(stray.parent.iterdir()) == [stray]


def test_a_record_is_canonical_json(tmp_path):
    """Readable by a person and by any tool."""
    filled(tmp_path, 1)
    data = (folder(tmp_path) / "step-00000001" / PROGRESS_FILE).read_bytes()
    values = json.loads(data)
    assert canonical_json(values) == data
    assert values["key"]["site"] == "site"
    assert values["files"][ADAPTER_FILE]["sha256"]


def test_a_workspace_without_a_checkpoints_folder_has_none(tmp_path):
    """The first start, and one after somebody removed it."""
    assert newest_step(tmp_path) is None
    filled(tmp_path, 1)
    shutil.rmtree(tmp_path / "run")
    assert newest_step(tmp_path) is None


def site_config(**site):
    values = {
        "site": {"name": "site", **site},
        "data": {"path": "text.jsonl", "text": "text"},
        "broker": {"url": "amqp://site@localhost:5672/", "password_file": "password"},
        "store": {"url": "https://store.example"},
    }
    return parse(SiteConfig, values, "site.toml")


def test_the_interval_is_the_sites_own(tmp_path, monkeypatch):
    """From site.toml into the participant's process; a minute where nothing is said."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for said, expected in (({}, 60.0), ({"checkpoint_seconds": 7.5}, 7.5)):
        context = make_context(site_config(**said), tmp_path, None, threading.Event())
        made = context.workspace.checkpoints(task(), "site")
        now[0] += expected - 0.1
        assert not made.due()
        now[0] += 0.2
        assert made.due()
    with pytest.raises(ConfigError, match="checkpoint_seconds"):
        site_config(checkpoint_seconds=0)


def test_rate_and_time_to_go_count_the_steps_of_an_earlier_process():
    """600 tokens in 60 s before the kill and 100 in 10 s after it are 10 a second."""
    now = [1000.0]
    reporter = Reporter(lambda: now[0])
    moved = SimpleNamespace(down=0, up=0)
    reporter.participant = SimpleNamespace(in_hand=task(), meter=moved)
    now[0] += 10.0
    reporter.report("site", 2, Progress("train", 7, 9, 1.0, tokens=700, seconds_before=60.0))
    told = reporter.newest()
    assert (told.step, told.of, told.seconds, told.tokens_per_second) == (7, 9, 70.0, 10.0)


def test_checkpoints_need_the_ground_first(tmp_path):
    """A save before newest() would belong to nothing."""
    made = Checkpoints(tmp_path / "folder", task(), "site", 60.0)
    with pytest.raises(AssertionError):
        made.save(progress(0))
