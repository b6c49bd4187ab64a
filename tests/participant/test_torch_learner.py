"""The Learner port over a tiny quantised model: files in, files out, the same bytes again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from participant.checkpoints import Checkpoints  # noqa: E402  # after the skip
from participant.learner.model_pool import ModelPool  # noqa: E402
from participant.learner.port import DELTA_FILE, STATE_FILE  # noqa: E402
from participant.learner.torch_learner import TorchLearner  # noqa: E402
from shared.config import DataSection  # noqa: E402
from shared.errors import InterruptedRunError, ModelError, NotAcceptedError, ProtocolError  # noqa: E402
from shared.methods.averaging import get_averaging  # noqa: E402
from shared.protocol.events import (  # noqa: E402
    RoundStarted,
    RunAnnounced,
    WireBase,
    WireLora,
    WireTraining,
)
from shared.tensors.codecs import get_codec  # noqa: E402
from shared.tensors.delta_file import DeltaFile, DeltaHeader, check_delta  # noqa: E402
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorFile, TensorLayout, write_tensors  # noqa: E402

pytestmark = pytest.mark.model

SHA = "a" * 64
TRAINING = {
    "local_steps": 2,
    "batch_size": 2,
    "learning_rate": 0.01,
    "max_prompt_tokens": 48,
    "max_answer_tokens": 24,
    "cpu_threads": 1,
}


def ignore(_progress):
    """Nobody watches."""


def announce(model, fingerprint=None, **training):
    return RunAnnounced(
        run="run",
        config_digest=SHA,
        base=WireBase(model=str(model), fingerprint=fingerprint),
        lora=WireLora(rank=4),
        training=WireTraining(**{**TRAINING, **training}),
        rounds=3,
        participants=2,
    )


def start_round(number=1, **training):
    return RoundStarted(
        run="run",
        round=number,
        source_sha=SHA,
        get_url="",
        expires_at=1e12,
        training=WireTraining(**{**TRAINING, **training}),
        progress_from=(number - 1) / 4,
        progress_to=number / 4,
        seed=11,
        codec="fp32",
    )


def make_learner(folder, pool, site="site-a", held_out=0.25):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"q": f"{site} asks {i}", "a": f"{i} times {len(site)}"} for i in range(16)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(path="text.jsonl", prompt="q", answer="a", held_out_fraction=held_out)
    return TorchLearner(site, data, folder, pool)


@pytest.fixture(scope="module")
def pool():
    return ModelPool("cpu")


@pytest.fixture
def learner(tmp_path, pool, tiny_model):
    made = make_learner(tmp_path / "data", pool)
    made.prepare(announce(tiny_model), ignore)
    return made


@pytest.fixture
def source(tmp_path, tiny_model, learner, draw):
    """An adapter file, as the coordinator writes it."""
    manifest = learner.prepare(announce(tiny_model), ignore).manifest
    read = draw(manifest)
    path = tmp_path / "adapter.safetensors"
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in manifest.tensors]
    write_tensors(path, layouts, (read(spec.name) for spec in manifest.tensors), ADAPTER_METADATA)
    return path


def learn(learner, source, folder, task=None, state=None, **settings):
    folder.mkdir()
    task = task or start_round()
    kept = folder.with_name(f"{folder.name}-checkpoints")
    return learner.learn(
        task,
        source,
        state,
        folder,
        settings.get("should_stop", lambda: False),
        settings.get("report", ignore),
        settings.get("checkpoints") or Checkpoints(kept, task, "site-a", 60.0),
    )


def digest(folder, name=DELTA_FILE):
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_prepare_tells_what_a_site_has_and_is_cheap_the_second_time(
    tmp_path, pool, tiny_model, monkeypatch
):
    """Manifest, fingerprint, numerics and examples; nothing is loaded again."""
    learner = make_learner(tmp_path, pool)
    told = []
    ready = learner.prepare(announce(tiny_model), told.append)
    assert [(p.activity, p.done, p.total) for p in told] == [
        ("load", 0, 2),
        ("load", 1, 2),
        ("load", 2, 2),
    ]
    assert (len(ready.manifest.tensors), ready.examples) == (28, 12)
    assert ready.numerics.cpu_threads == 1
    monkeypatch.setattr("participant.learner.model_pool.LocalModel", None)
    monkeypatch.setattr("participant.learner.torch_learner.load_site_data", None)
    assert learner.prepare(announce(tiny_model, ready.fingerprint), ignore) == ready


def test_a_base_that_is_not_the_runs_is_refused(learner, tiny_model):
    """Two sites with different weights would average apples and pears."""
    with pytest.raises(NotAcceptedError, match=r"base\.fingerprint"):
        learner.prepare(announce(tiny_model, SHA), ignore)


def test_a_delta_is_what_the_training_added_and_passes_the_coordinators_check(
    learner, source, tmp_path, pool, tiny_model
):
    """D = theta - A in float32, tensor by tensor; every B moves."""
    learned = learn(learner, source, tmp_path / "out")
    announced = announce(tiny_model)
    manifest = learner.prepare(announced, ignore).manifest
    header = DeltaHeader(
        run="run",
        round=1,
        site="site-a",
        source_sha=SHA,
        codec="fp32",
        codec_version=get_codec("fp32").version,
    )
    assert check_delta(tmp_path / "out" / DELTA_FILE, manifest, header, None).norm > 0
    with (
        pool.borrow(announced.base, announced.lora, 1) as model,
        TensorFile(source) as before,
        DeltaFile(tmp_path / "out" / DELTA_FILE, manifest) as delta,
    ):
        for spec in manifest.tensors:
            # The model still holds theta: nobody has borrowed it since.
            assert np.array_equal(delta.read(spec), model.read(spec.name) - before.read(spec.name))
            assert delta.read(spec).any()
    assert (learned.examples, learned.state, learned.metrics.steps) == (12, "fresh", 2)
    assert learned.tokens > 0
    assert set(learned.metrics.seconds) == {"load", "evaluate", "train", "encode"}
    assert not (tmp_path / "out" / STATE_FILE).exists()


def test_a_round_of_one_factor_trains_sends_and_keeps_that_one_alone(
    learner, source, tmp_path, pool, tiny_model
):
    """A keeps its bytes, B's moments are B's, and the next round of all trains A again."""
    announced = announce(tiny_model)
    task = start_round(optimizer_state="keep").model_copy(update={"averaging": "ffa"})
    learn(learner, source, tmp_path / "out", task)
    whole = learner.prepare(announced, ignore).manifest
    part = get_averaging("ffa").trained_in(whole, 1)
    assert 2 * len(part.tensors) == len(whole.tensors)
    names = {spec.name for spec in part.tensors}
    with (
        pool.borrow(announced.base, announced.lora, 1) as model,
        TensorFile(source) as before,
        DeltaFile(tmp_path / "out" / DELTA_FILE, part) as delta,
        TensorFile(tmp_path / "out" / STATE_FILE) as state,
    ):
        assert all(delta.read(spec).any() for spec in part.tensors)
        for spec in whole.tensors:
            same = np.array_equal(model.read(spec.name), before.read(spec.name))
            assert same == (spec.name not in names)
        moments = {name.split(".", 1)[1] for name in state.layouts if name != "step"}
        assert moments == names
    kept = tmp_path / "out" / STATE_FILE
    assert learn(learner, source, tmp_path / "next", task, kept).state == "kept"
    learn(learner, source, tmp_path / "all")
    with DeltaFile(tmp_path / "all" / DELTA_FILE, whole) as delta:
        assert all(delta.read(spec).any() for spec in whole.tensors)


def test_a_site_of_a_lower_rank_begins_with_the_leading_block(source, tmp_path, pool, tiny_model):
    """Rank 2 of an adapter of rank 4: its first rows and columns, and a delta of that shape."""
    small = make_learner(tmp_path / "small", pool)
    announced = announce(tiny_model).model_copy(update={"lora": WireLora(rank=2)})
    manifest = small.prepare(announced, ignore).manifest
    learn(small, source, tmp_path / "out")
    with (
        pool.borrow(announced.base, announced.lora, 1) as model,
        TensorFile(source) as before,
        DeltaFile(tmp_path / "out" / DELTA_FILE, manifest) as delta,
    ):
        for spec in manifest.tensors:
            block = before.read(spec.name)[tuple(slice(length) for length in spec.shape)]
            assert block.shape == spec.shape != before.layouts[spec.name].shape
            assert np.array_equal(delta.read(spec), model.read(spec.name) - block)


def test_the_same_round_gives_the_same_file_whoever_used_the_base_in_between(
    learner, source, tmp_path, pool, tiny_model
):
    """Two sites share one base in one process; neither sees the other, nor an evaluation."""
    other = make_learner(tmp_path / "other", pool, "site-b")
    other.prepare(announce(tiny_model), ignore)
    learn(learner, source, tmp_path / "first")
    learn(other, source, tmp_path / "theirs")
    learner.evaluate("run", source, ignore)
    torch.manual_seed(1234)
    learn(learner, source, tmp_path / "second")
    assert digest(tmp_path / "first") == digest(tmp_path / "second")
    assert digest(tmp_path / "first") != digest(tmp_path / "theirs")


def test_a_round_is_evaluated_from_the_adapter_it_starts_from(learner, source, tmp_path):
    """Held-out loss of A(t), which is also what evaluate says of that file."""
    held_out = learn(learner, source, tmp_path / "out").metrics.held_out
    assert held_out == learner.evaluate("run", source, ignore)
    assert held_out.examples == 4


def test_a_site_without_held_out_text_trains_and_says_nothing_of_it(
    source, tmp_path, pool, tiny_model
):
    """held_out_fraction 0 is a choice."""
    learner = make_learner(tmp_path / "all", pool, held_out=0.0)
    learner.prepare(announce(tiny_model), ignore)
    assert learn(learner, source, tmp_path / "out").metrics.held_out is None
    assert learner.evaluate("run", source, ignore) is None


def test_a_kept_optimiser_travels_through_its_file(learner, source, tmp_path):
    """The file of one round changes the next; its bytes and theirs repeat."""
    keep = {"optimizer_state": "keep"}
    for name in ("one", "same"):
        assert learn(learner, source, tmp_path / name, start_round(**keep)).state == "fresh"
    assert digest(tmp_path / "one", STATE_FILE) == digest(tmp_path / "same", STATE_FILE)
    state = tmp_path / "one" / STATE_FILE
    for name in ("two", "again"):
        learned = learn(learner, source, tmp_path / name, start_round(2, **keep), state)
        assert learned.state == "kept"
    learn(learner, source, tmp_path / "fresh", start_round(2, **keep))
    assert digest(tmp_path / "two") == digest(tmp_path / "again")
    assert digest(tmp_path / "two") != digest(tmp_path / "fresh")


def test_a_run_that_resets_its_optimiser_ignores_a_state_that_is_there(learner, source, tmp_path):
    """The setting decides, not what lies on the disk."""
    (tmp_path / "state").write_bytes(b"of another run")
    learned = learn(learner, source, tmp_path / "out", state=tmp_path / "state")
    assert learned.state == "fresh"


def test_a_torn_optimiser_state_is_named(learner, source, tmp_path):
    """And says how to go on."""
    (tmp_path / "state").write_bytes(b"torn")
    task = start_round(optimizer_state="keep")
    with pytest.raises(ModelError, match="optimiser state"):
        learn(learner, source, tmp_path / "out", task, tmp_path / "state")


def test_what_cannot_be_done_is_refused_by_type(source, tmp_path, pool, learner):
    """A round or an evaluation before the announcement, and bytes that are no adapter."""
    fresh = make_learner(tmp_path / "fresh", pool)
    with pytest.raises(ProtocolError, match="RunAnnounced"):
        learn(fresh, source, tmp_path / "out")
    with pytest.raises(ProtocolError, match="RunAnnounced"):
        fresh.evaluate("run", source, ignore)
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ModelError, match="adapter torn"):
        learner.evaluate("run", tmp_path / "torn", ignore)


@pytest.mark.parametrize("asked_before", [0, 2])
def test_a_stop_leaves_no_delta(learner, source, tmp_path, asked_before):
    """Neither in the evaluation (asked first) nor in the training's second step."""
    asked = iter([False] * asked_before)
    with pytest.raises(InterruptedRunError):
        learn(learner, source, tmp_path / "out", should_stop=lambda: next(asked, True))
    assert not list((tmp_path / "out").iterdir())


def test_progress_covers_the_evaluation_and_every_step(learner, source, tmp_path):
    """Steps come with their loss."""
    told = []
    learn(learner, source, tmp_path / "out", report=told.append)
    assert [(p.activity, p.done, p.total) for p in told] == [
        ("evaluate", 4, 4),
        ("train", 1, 2),
        ("train", 2, 2),
    ]
    assert all(p.loss > 0 for p in told[1:])


ALONE = """
import sys
from pathlib import Path
from participant.learner.model_pool import ModelPool
from tests.participant import test_torch_learner as shown

model, source, folder, threads = sys.argv[1:]
learner = shown.make_learner(Path(folder), ModelPool("cpu"))
learner.prepare(shown.announce(model, cpu_threads=int(threads)), shown.ignore)
shown.learn(learner, Path(source), Path(folder) / "out")
print(shown.digest(Path(folder) / "out"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_give_the_same_delta(source, tmp_path, tiny_model, learner, threads):
    """Thread count, dtype and versions being equal; one of them is this process."""
    learner.prepare(announce(tiny_model, cpu_threads=threads), ignore)
    learn(learner, source, tmp_path / "here")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, (tiny_model, source, tmp_path / "alone", threads))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(tmp_path / "here")


@pytest.mark.parametrize("number", [1, 2])
def test_a_gradient_is_sent_as_it_is_and_is_the_same_after_an_interruption(
    learner, source, tmp_path, tiny_model, number
):
    """Of one factor; nothing is measured, and every round of the run is of the same examples."""
    lora = WireLora(rank=4, dropout=0.0)
    bases = {"averaging": "range-finder"}
    announced = announce(tiny_model).model_copy(update={**bases, "lora": lora})
    learner.prepare(announced, ignore)
    task = start_round(number).model_copy(update=bases)
    asked = iter([False, True])
    with pytest.raises(InterruptedRunError):
        learn(learner, source, tmp_path / "cut", task, should_stop=lambda: next(asked))
    assert next(asked, None) is None
    first = learn(learner, source, tmp_path / "first", task)
    again = learn(learner, source, tmp_path / "again", task)
    assert first.delta == again.delta
    assert (first.metrics.held_out, first.metrics.steps, first.distinct) == (None, 2, 4)
    manifest = learner.prepare(announced, ignore).manifest
    sent = get_averaging("range-finder").trained_in(manifest, number)
    assert len(sent.tensors) == 14
    with DeltaFile(tmp_path / "first" / DELTA_FILE, sent) as delta:
        squares = sum(float(np.sum(np.square(delta.read(spec)))) for spec in sent.tensors)
    assert squares**0.5 == pytest.approx(first.metrics.mean_grad_norm, rel=1e-5)
    other = learn(learner, source, tmp_path / "other", task.model_copy(update={"seed": 99}))
    assert other.tokens == first.tokens
