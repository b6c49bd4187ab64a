"""The whole command over the tiny model: every arm, its tables, and going on after a stop."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import util

import pytest

from gradualdiff.cli.reproduce import reproduce
from gradualdiff.reproduction.arms import ARMS
from shared.errors import DataError, MissingPackageError, ObjectMissingError
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
        # U+2028 ends a line for str.splitlines, not for a JSONL file.
        {"prompt": f"What is {n}?", "answer": f"a number\u2028near {n + 1}", "label": f"l{n % 3}"}
        for n in range(40)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(home, folder, *options):
    words = [
        sys.executable,
        "-m",
        "gradualdiff.cli.main",
        "reproduce",
        "--preset",
        str(home / "tiny.toml"),
    ]
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
    """One delta up in each of two rounds, an adapter down in the second, and some messages."""
    one = next(one for one in results["arms"] if one["arm"] == "federated")
    stored = [p.stat().st_size for p in (home / "whole" / "store").rglob("*.safetensors")]
    size = min(stored)
    assert size < one["bytes_up"] < size + 100_000
    assert size / 2 < one["bytes_down"] < size + 100_000


def test_the_best_rate_is_chosen(results):
    for chosen in results["learning_rates"].values():
        tried = {float(rate): loss for rate, loss in chosen["tried"].items()}
        assert len(tried) == 2
        assert tried[chosen["rate"]] == min(tried.values())


def test_the_json_has_what_the_tables_have(home, results):
    """Also the partitions: no number is in the Markdown alone."""
    text = (home / "whole" / "results.md").read_text()
    for table in results["tables"]:
        assert f"### {table['title']}" in text
        for row in table["rows"]:
            assert "| " + " | ".join(row) + " |" in text
    arms = results["partitions"]["0.1"]["arms"]
    assert {(one["arm"], one["seed"]) for one in arms} == {
        (arm, seed) for arm in ("local", "federated", "recommended") for seed in (1, 2)
    }


def test_arms_of_a_seed_begin_with_one_adapter(home, results):
    from coordinator.history import read_history
    from shared.protocol.ledger import list_runs
    from shared.stores.directory import DirectoryStore

    store = DirectoryStore(home / "whole" / "store")
    found = {}
    for run in list_runs(store):
        genesis = read_history(store, run).genesis
        found.setdefault(run.split("-")[0], set()).add(genesis.adapter_sha)
    assert sorted(found) == ["s1", "s2"]
    assert all(len(adapters) == 1 for adapters in found.values())
    assert found["s1"] != found["s2"]


def test_arms_train_on_about_as_many_tokens(results):
    tokens = {
        (one["arm"], one["seed"]): sum(r["tokens"] for r in one["rounds"])
        for one in results["arms"]
        if one["rounds"]
    }
    for (arm, seed), count in tokens.items():
        assert count == pytest.approx(tokens["federated", seed], rel=0.15), arm


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
    words = [sys.executable, "-m", "gradualdiff.cli.main", "runs", "verify", name, "--store", store]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
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
    words = [
        sys.executable,
        "-m",
        "gradualdiff.cli.main",
        "reproduce",
        "--preset",
        str(home / "tiny.toml"),
    ]
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


def test_a_stop_while_measuring_names_a_command_that_goes_on(home):
    """A folder with a space in its name, stopped outside of any run."""
    words = [
        sys.executable,
        "-m",
        "gradualdiff.cli.main",
        "reproduce",
        "--preset",
        str(home / "tiny.toml"),
    ]
    words += ["--data", str(home / "text.jsonl"), "--dir", str(home / "a folder")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as p:
        said = ""
        for line in p.stderr:
            said += line
            if "replies to" in line:
                p.send_signal(signal.SIGINT)
                break
        said += p.stderr.read()
    assert p.returncode == 130, said
    again = shlex.split(said.split("Resume it with: ")[1])
    assert again[0] == "gradualdiff"
    assert again[1:] == words[3:]


def test_a_rate_that_diverges_is_the_worst_one(home):
    """At its own start and at the next one, which finds it on file."""
    text = (home / "tiny.toml").read_text().replace("[3e-3, 1e-2]", "[1e-2, 1e300]")
    (home / "wild.toml").write_text(text)
    for _ in range(2):
        done = command(home, "wild", "--preset", str(home / "wild.toml"), "--arms", "federated")
        assert done.returncode == 0, done.stderr
        results = json.loads((home / "wild" / "results.json").read_text())
        chosen = results["learning_rates"]["b2 federated"]
        assert chosen["rate"] == 1e-2
        assert chosen["tried"]["1e+300"] is None
    assert "training diverged" in next((home / "wild" / "runs").rglob("diverged.txt")).read_text()


def test_a_seed_that_diverges_is_left_out_and_named(home):
    """Under the rate of seed 1, as an earlier start put it on file."""
    run = home / "wild" / "runs" / "s2-b2-federated-0p01"
    run.mkdir()
    (run / "diverged.txt").write_text("training diverged in step 3")
    options = ("--preset", str(home / "wild.toml"), "--arms", "fedavg", "--seeds", "2")
    done = command(home, "wild", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((home / "wild" / "results.json").read_text())
    assert [(one["arm"], one["seed"]) for one in results["arms"]] == [
        ("fedavg", 1),
        ("federated", 1),
    ]
    assert len(results["diverged"]) == 2
    assert "Diverged, and in no figure: FedAvg on the weights: training diverged" in done.stdout


def test_grids_that_only_diverge_end_with_one_line(home):
    text = (home / "tiny.toml").read_text().replace("[3e-3, 1e-2]", "[1e299, 1e300]")
    (home / "wilder.toml").write_text(text)
    done = command(home, "wilder", "--preset", str(home / "wilder.toml"), "--arms", "federated")
    assert done.returncode == 10
    assert "expected one under which the arm federated does not diverge" in done.stderr
    assert "Traceback" not in done.stderr


def test_partitions_that_cannot_be_are_refused_before_training(home):
    """Text without labels has no Dirichlet partition."""
    rows = [{"prompt": f"What is {n}?", "answer": f"{n}"} for n in range(40)]
    plain = home / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(home, "plain", "--non-iid", "--data", str(plain))
    assert done.returncode == DataError.exit_code
    assert "expected a label with every question" in done.stderr
    assert not (home / "plain" / "runs").exists()


def test_damaged_side_files_are_measured_again_or_named(home):
    assert command(home, "torn", "--arms", "base").returncode == 0
    before = json.loads((home / "torn" / "results.json").read_text())
    (torn,) = (home / "torn" / "measured").glob("*.json")
    for damage in ("{", "[]", '{"loss on dev": 3, "replies to test": {"bleu": "x"}}'):
        torn.write_text(damage)
        done = command(home, "torn", "--arms", "base")
        assert done.returncode == 0, done.stderr
        assert json.loads((home / "torn" / "results.json").read_text())["arms"] == before["arms"]
    (home / "torn" / "settings.json").write_text("[")
    done = command(home, "torn", "--arms", "base")
    assert done.returncode == DataError.exit_code
    assert "settings.json: expected the JSON object that was written there" in done.stderr


def test_a_run_that_lost_an_object_says_how_to_train_it_again(home):
    assert command(home, "lost", "--arms", "federated").returncode == 0
    results = json.loads((home / "lost" / "results.json").read_text())
    (sha,) = results["arms"][0]["adapters"]
    (adapter,) = (home / "lost" / "store").rglob(f"adapters/{sha}/*.safetensors")
    adapter.unlink()
    (home / "lost" / "measured" / f"{sha}.json").unlink()
    (home / "lost" / "measured" / "adapter.safetensors").unlink()
    done = command(home, "lost", "--arms", "federated")
    assert done.returncode == ObjectMissingError.exit_code
    said = done.stderr.replace("\n", " ")
    assert "To train a run again, delete" in said
    run = adapter.parents[2].name
    for folder in ("store/runs", "store/inbox", "runs"):
        shutil.rmtree(home / "lost" / folder / run, ignore_errors=True)
    done = command(home, "lost", "--arms", "federated")
    assert done.returncode == 0, done.stderr
    again = json.loads((home / "lost" / "results.json").read_text())
    assert again["arms"][0]["adapters"] == [sha]
    assert again["arms"][0]["losses"] == results["arms"][0]["losses"]


def test_a_mistaken_option_does_not_bind_the_folder(home):
    done = command(home, "mistaken", "--model", str(home / "nothing"), "--arms", "base")
    assert "nothing" in done.stderr
    done = command(home, "mistaken", "--arms", "base")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["sacrebleu", "matplotlib"])
def test_a_package_of_the_end_is_missed_at_the_beginning(package, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=util.find_spec: None if name == package else find(name),
    )
    with pytest.raises(MissingPackageError, match=package):
        reproduce(folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


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
        (("--seeds", "0"), "--seeds"),
        (("--seeds", "9" * 20), "--seeds"),
    ],
)
def test_bad_options_end_with_one_line(home, options, says):
    done = command(home, "bad", *options)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_measured_makes_room(home, results):
    """Whole are only the runs that are recomputed; the others keep their last round, on record."""
    store = home / "whole" / "store" / "runs"
    whole = set(results["fedavg_differences"])
    for run in store.iterdir():
        rounds = {path.parent.name for path in run.glob("deltas/*/*")}
        kept = run.name in whole or "-recommended-" in run.name
        pruned = any(run.glob("pruned/*"))
        assert kept or rounds == {"00002"}, run.name
        assert pruned or rounds == {"00001", "00002"}, run.name
        assert run.name not in whole or not pruned
    assert not list((home / "whole" / "runs").glob("*/spool"))
