"""The whole command over the tiny model: every arm, its tables, and going on after a stop."""

import json
import subprocess
import sys

import pytest

from cli.reproduction.arms import ARMS
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

PRESET = """
[reproduce]
participants = 3
rounds = 2
local_steps = 2
batch_sizes = [2]
learning_rates = [3e-3, 1e-2]
alphas = [0.1]
prompts = 4
reply_tokens = 6
[base]
model = {model}
[lora]
rank = 4
[training]
max_prompt_tokens = 64
max_answer_tokens = 32
cpu_threads = 1
[recommended.training]
optimizer_state = "keep"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    model = make_tiny_model(folder / "model")
    (folder / "tiny.toml").write_text(PRESET.format(model=json.dumps(str(model))))
    rows = [
        {"prompt": f"What is {n}?", "answer": f"a number near {n + 1}", "label": f"l{n % 3}"}
        for n in range(40)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(home, folder, *options):
    words = [sys.executable, "-m", "cli.main", "reproduce", "--preset", str(home / "tiny.toml")]
    words += ["--data", str(home / "text.jsonl"), "--dir", str(home / folder), *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def results(home):
    done = command(home, "whole", "--seeds", "2", "--non-iid")
    assert done.returncode == 0, done.stderr
    return json.loads((home / "whole" / "results.json").read_text())


def test_every_arm_has_its_figures(results):
    found = [(one["arm"], one["seed"]) for one in results["arms"]]
    assert found == [(arm, seed) for seed in (1, 2) for arm in ARMS]
    for one in results["arms"]:
        assert set(one["losses"]) == {"train", "dev", "test"}
        assert one["losses"]["test"]["nll_per_byte"] > 0
        assert one["replies"]["test"]["bleu_signature"].startswith("nrefs:1|")
        assert [r["round"] for r in one["rounds"]] == (
            [] if one["arm"] in ("base", "fedavg") else [1, 2]
        )


def test_training_helps_and_the_arms_are_not_one(results):
    """The tables are of different trainings: equal ones would be a mistake of wiring."""
    loss = {one["arm"]: one["losses"]["test"]["nll"] for one in results["arms"] if one["seed"] == 1}
    assert all(loss[arm] < loss["base"] for arm in ARMS if arm != "base")
    trained = [loss[arm] for arm in ARMS if arm not in ("base", "fedavg")]
    assert len(set(trained)) == len(trained)


def test_fedavg_is_gradualdiff(results):
    assert len(results["fedavg_differences"]) == 2
    assert all(0 <= gap < 1e-5 for gap in results["fedavg_differences"].values())
    loss = {(one["arm"], one["seed"]): one["losses"]["test"]["nll"] for one in results["arms"]}
    for seed in (1, 2):
        assert loss["fedavg", seed] == pytest.approx(loss["federated", seed], abs=1e-5)


def test_bytes_are_those_of_the_objects(home, results):
    """One adapter down and one delta up in each round, and messages of some kilobytes."""
    one = next(one for one in results["arms"] if one["arm"] == "federated")
    stored = [p.stat().st_size for p in (home / "whole" / "store").rglob("*.safetensors")]
    size = min(stored)
    assert size < one["bytes_up"] < size + 100_000
    assert size < one["bytes_down"] < 2 * size + 100_000


def test_the_best_rate_is_chosen(results):
    for chosen in results["learning_rates"].values():
        tried = {float(rate): loss for rate, loss in chosen["tried"].items()}
        assert len(tried) == 2
        assert tried[chosen["rate"]] == min(tried.values())


def test_files_are_written(home, results):
    folder = home / "whole"
    text = (folder / "results.md").read_text()
    for title in ("Table II", "Table III", "Table IV", "where participants' text differs"):
        assert title in text
    assert "1.36 → 0.22" not in text  # of batch 4, and this is batch 2
    assert results["command"] in text
    assert (folder / "figure-1.png").read_bytes().startswith(b"\x89PNG")
    assert "GradualDiff-Fed" in (folder / "results.csv").read_text()


def test_every_run_of_it_verifies(home, results):
    store = str(home / "whole" / "store")
    name = next(name for name in results["fedavg_differences"])
    words = [sys.executable, "-m", "cli.main", "runs", "verify", name, "--store", store]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_start_computes_nothing_and_says_the_same(home, results):
    store = home / "whole" / "store"
    before = {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*")}
    done = command(home, "whole", "--seeds", "2", "--non-iid")
    assert done.returncode == 0, done.stderr
    assert "training" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*")} == before
    again = json.loads((home / "whole" / "results.json").read_text())
    assert again["arms"] == results["arms"]


def test_a_kill_costs_nothing_that_was_finished(home, results):
    """SIGKILL in the middle of the second arm; the same command ends in the same adapters."""
    words = [sys.executable, "-m", "cli.main", "reproduce", "--preset", str(home / "tiny.toml")]
    words += ["--data", str(home / "text.jsonl"), "--dir", str(home / "killed"), "--seeds", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as p:
        for line in p.stderr:
            if "central" in line:
                p.kill()
                break
    assert p.returncode == -9
    done = command(home, "killed", "--seeds", "2", "--non-iid")
    assert done.returncode == 0, done.stderr
    again = json.loads((home / "killed" / "results.json").read_text())
    for one, other in zip(again["arms"], results["arms"], strict=True):
        assert one["adapters"] == other["adapters"]
        assert one["losses"] == other["losses"]


def test_a_folder_belongs_to_its_settings(home, results):
    done = command(home, "whole", "--partition", "by-label")
    assert done.returncode != 0
    assert "expected the settings that it was begun with" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--arms", "base,middle"), "--arms: expected some of base"),
        (("--partition", "dirichlet(much)"), "expected iid, dirichlet(ALPHA)"),
        (("--partition", "by-group"), "expected a group with every question"),
        (("--seeds", "0"), "0"),
    ],
)
def test_bad_options_end_with_one_line(home, options, says):
    done = command(home, "bad", *options)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
