"""A round that is cut anywhere and resumed ends in the bytes of one that ran through.

Here the cut is an exception in this process, so that the whole table of settings and points fits
into a minute; ``test_killed_in_a_round.py`` cuts real processes by SIGKILL.
"""

from __future__ import annotations

import errno
import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from structlog.testing import capture_logs  # after the skip

from participant import checkpoints as clocked
from participant.checkpoints import Checkpoints
from participant.learner import resuming
from participant.learner.model_pool import ModelPool
from participant.learner.port import DELTA_FILE, STATE_FILE
from shared import failpoints
from shared.disk.files import digest_file
from shared.errors import InterruptedRunError
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorLayout, write_tensors
from tests.participant.test_torch_learner import announce, ignore, make_learner, start_round

pytestmark = pytest.mark.model

STEP_SECONDS = 10.0
EVERY_SECONDS = 15.0
STEPS_APART = 2  # a checkpoint is due once 15 s have passed: after every second step of 10 s
VARIANTS = [
    {"optimizer_state": state, "gradient_accumulation": accumulation, **length}
    for state, accumulation, length in itertools.product(
        ("reset", "keep"), (1, 2), ({"local_steps": 5}, {"local_steps": None, "local_epochs": 2})
    )
] + [{"proximal_mu": 10.0, "local_steps": 5}]  # held near the round's adapter, not the checkpoint's
CUTS = [
    ("training.stepped", 1),  # nothing but the evaluation is kept yet
    ("training.stepped", 2),  # just before the first checkpoint
    ("checkpoint.adapter_written", 1),
    ("checkpoint.optimizer_written", 2),
    ("checkpoint.progress_written", 2),  # of step 2: that of step 0 is the first
    ("checkpoint.renamed", 2),
    ("checkpoint.old_removed", 3),  # just after the second checkpoint
    ("training.stepped", 5),
]


class Cut(BaseException):
    """Like a kill: nothing of the product catches it."""


class Steps:
    """Counts steps and cuts at the nth passing of a point; time passes by steps alone."""

    def __init__(self, point=None, nth=0, action=Cut):
        self.point, self.nth, self.action = point, nth, action
        self.passed = []
        self.fired = False

    def __call__(self, name):
        self.passed.append(name)
        if name == self.point and self.passed.count(name) == self.nth:
            self.fired = True
            raise self.action

    @property
    def trained(self):
        return self.passed.count("training.stepped")


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoints.arm(None)


@pytest.fixture(scope="module")
def pool():
    return ModelPool("cpu")


@pytest.fixture(scope="module")
def learner(tmp_path_factory, pool, tiny_model):
    made = make_learner(tmp_path_factory.mktemp("data"), pool)
    made.prepare(announce(tiny_model), ignore)
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model, learner, draw):
    manifest = learner.prepare(announce(tiny_model), ignore).manifest
    read = draw(manifest)
    path = tmp_path_factory.mktemp("source") / "adapter.safetensors"
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    write_tensors(path, layouts, (read(spec.name) for spec in manifest.tensors), ADAPTER_METADATA)
    return path


@pytest.fixture(scope="module")
def first_state(tmp_path_factory, learner, source):
    """The optimiser state that round 1 left."""
    folder = tmp_path_factory.mktemp("first")
    task = start_round(1, optimizer_state="keep")
    kept = Checkpoints(folder / "checkpoints", task, "site-a", 3600.0)
    learner.learn(task, source, None, folder, lambda: False, ignore, kept)
    return folder / STATE_FILE


@pytest.fixture
def learn(learner, source, first_state, tmp_path, monkeypatch):
    """Round 2 in a folder of its own, with checkpoints in the test's folder."""

    def run(name, steps, training, **others):
        clock = SimpleNamespace(monotonic=lambda: STEP_SECONDS * steps.trained)
        monkeypatch.setattr(clocked, "time", clock)
        failpoints.arm(steps)
        folder = tmp_path / name
        folder.mkdir()
        task = start_round(2, **training)
        where = tmp_path / others.get("where", "checkpoints")
        kept = Checkpoints(where, task, "site-a", others.get("every_seconds", EVERY_SECONDS))
        learned = learner.learn(
            task,
            source,
            first_state,
            folder,
            others.get("should_stop", lambda: False),
            others.get("report", ignore),
            kept,
        )
        return learned, outcome(folder)

    return run


def outcome(folder):
    """Digests of all that a round leaves."""
    paths = (folder / name for name in (DELTA_FILE, STATE_FILE))
    return {path.name: digest_file(path) for path in paths if path.exists()}


def told(learned):
    """All that is told of a training but its seconds."""
    metrics = learned.metrics.model_dump(exclude={"seconds"})
    return {"tokens": learned.tokens, "state": learned.state, **metrics}


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
@pytest.mark.parametrize(
    "training", VARIANTS, ids=lambda v: "-".join(str(value) for value in v.values())
)
def test_a_round_cut_anywhere_ends_in_the_same_bytes(learn, training, cut):
    """Delta, next optimiser state and metrics; at most one interval is trained again."""
    through = Steps()
    learned, wanted = learn("through", through, training, where="others")
    assert len(wanted) == (2 if training.get("optimizer_state") == "keep" else 1)
    before = Steps(*cut)
    with pytest.raises(Cut):
        learn("cut", before, training)
    assert before.fired
    after = Steps()
    seen = []
    again, got = learn("again", after, training, report=seen.append)
    assert got == wanted
    assert told(again) == told(learned)
    assert before.trained + after.trained <= through.trained + STEPS_APART
    assert after.trained == sum(progress.activity == "train" for progress in seen)
    assert not any(progress.activity == "evaluate" for progress in seen)


def test_a_round_that_is_cut_again_and_again_ends_in_the_same_bytes(learn):
    """Each time a little further; the steps trained add up to little more than one round's."""
    training = VARIANTS[4]
    through = Steps()
    learned, wanted = learn("through", through, training, where="others")
    trained = 0
    for number, cut in enumerate([("training.stepped", 3), ("training.stepped", 1)] * 2):
        steps = Steps(*cut)
        with capture_logs() as logs, pytest.raises(Cut):
            learn(f"cut-{number}", steps, training)
        trained += steps.trained
        resumed = [line["step"] for line in logs if line["event"] == "training.resumed"]
        assert resumed == ([], [2], [2], [4])[number]
    last = Steps()
    again, got = learn("again", last, training)
    assert got == wanted
    assert told(again) == told(learned)
    assert trained + last.trained <= through.trained + 4 * STEPS_APART


@pytest.mark.parametrize("training", [*VARIANTS[::3], VARIANTS[-1]])
def test_a_stop_keeps_every_whole_step(learn, training):
    """SIGTERM and Ctrl-C: no interval is over yet, and nothing is trained again."""
    learned, wanted = learn("through", Steps(), training, where="others")
    steps = Steps()
    with pytest.raises(InterruptedRunError, match="continues"):
        learn(
            "stopped", steps, training, every_seconds=3600.0, should_stop=lambda: steps.trained == 2
        )
    after = Steps()
    with capture_logs() as logs:
        again, got = learn("again", after, training, every_seconds=3600.0)
    assert got == wanted
    assert told(again) == told(learned)
    assert steps.trained + after.trained == learned.metrics.steps
    assert [line for line in logs if line["event"] == "training.resumed"] == [
        {"event": "training.resumed", "log_level": "info", "run": "run", "round": 2, "step": 2}
    ]


def test_a_stop_just_after_a_checkpoint_writes_it_no_second_time(learn):
    """Else the newest would be gone while its copy is made."""
    steps = Steps()
    with pytest.raises(InterruptedRunError):
        learn("stopped", steps, VARIANTS[0], should_stop=lambda: steps.trained == STEPS_APART)
    assert steps.passed.count("checkpoint.begun") == 1


def test_a_stop_in_the_evaluation_or_the_first_step_leaves_what_there_is(learn):
    """Nothing, or the held-out loss."""
    asked = iter([False])
    with pytest.raises(InterruptedRunError):
        learn("stopped", Steps(), VARIANTS[0], should_stop=lambda: next(asked, True))
    seen = []
    after = Steps()
    learn("again", after, VARIANTS[0], report=seen.append)
    assert {progress.activity for progress in seen} == {"train"}
    assert after.trained == 5


def test_a_full_disk_ends_no_training(learn, monkeypatch):
    """Every checkpoint fails; the round comes out all the same."""
    _, wanted = learn("through", Steps(), VARIANTS[4], where="others")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resuming, "write_tensors", full)
    steps = Steps()
    with capture_logs() as logs:
        _, got = learn("full", steps, VARIANTS[4])
    assert got == wanted
    failed = [line for line in logs if line["event"] == "checkpoint.failed"]
    assert [line["step"] for line in failed] == [2, 4]
    assert steps.passed.count("checkpoint.begun") == 2


def test_seconds_are_those_of_all_processes(learn):
    """What is told of the time counts the steps that an earlier process did."""
    seen = []
    with pytest.raises(Cut):
        learn("cut", Steps("checkpoint.old_removed", 2), VARIANTS[0])
    learn("again", Steps(), VARIANTS[0], report=seen.append)
    assert all(progress.seconds_before > 0 for progress in seen)


def test_other_text_begins_the_round_anew(learn, learner, tmp_path, pool, tiny_model, source):
    """The site's text changed between kill and start: half a training on each would be neither."""
    with pytest.raises(Cut):
        learn("cut", Steps("training.stepped", 3), VARIANTS[0])
    other = make_learner(tmp_path / "other", pool, "site-b")
    other.prepare(announce(tiny_model), ignore)
    task = start_round(2, **VARIANTS[0])
    steps = Steps()
    failpoints.arm(steps)
    (tmp_path / "out").mkdir()
    kept = Checkpoints(tmp_path / "checkpoints", task, "site-a", EVERY_SECONDS)
    with capture_logs() as logs:
        other.learn(task, source, None, tmp_path / "out", lambda: False, ignore, kept)
    assert steps.trained == 5
    ignored = [line["reason"] for line in logs if line["event"] == "checkpoint.ignored"]
    assert ignored
    assert all("basis differ" in reason for reason in ignored)
