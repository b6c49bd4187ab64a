"""``tune-codec`` over a tiny model: bytes against loss for each arm; mistakes cost nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from matplotlib import image

from gradualdiff.simulation import load_config, simulate
from shared import errors
from tests.command_line import gradualdiff
from tests.tiny_model import make_tiny_model, write_federation

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def file(tmp_path, tiny_model):
    return write_federation(tmp_path / "mine", tiny_model, rounds=2)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
def test_each_arm_gets_bytes_a_loss_and_a_share(file, tmp_path):
    """As JSON and as a picture; fp32 comes first and keeps all; nothing else is written."""
    before = tree(tmp_path / "mine")
    done = gradualdiff(
        *("tune-codec", file, "--rounds", 2, "--json", "--picture", "wire.png"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    arms = {one["arm"]: one for one in found["arms"]}
    assert list(arms) == ["fp32", "int8", "int4", "sign", "topk", "core", "ia3"]
    assert (found["rounds"], found["sites"], arms["fp32"]["share"]) == (2, 2, 1.0)
    assert arms["fp32"]["loss"] < found["base"]
    for arm in arms.values():
        share = (found["base"] - arm["loss"]) / (found["base"] - arms["fp32"]["loss"])
        assert arm["share"] == pytest.approx(share)
    assert arms["fp32"]["up"] > arms["int8"]["up"] > arms["int4"]["up"] > arms["topk"]["up"]
    assert arms["fp32"]["down"] > 4 * arms["fp32"]["values"] > arms["int8"]["down"]
    assert arms["core"]["rate"] == pytest.approx(3 * arms["fp32"]["rate"])
    assert image.imread(tmp_path / "wire.png").shape[2] == 4
    assert tree(tmp_path / "mine") == before


@pytest.mark.slow
def test_the_table_names_arms_and_says_which_are_best(file, tmp_path):
    """A line for each arm that was asked for, and for fp32."""
    done = gradualdiff(
        *("tune-codec", file, "--rounds", 1, "--arms", "int4"),
        *("--set", "training.optimizer_state=keep"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Run tiny: 1 rounds of 2 sites; held-out loss of the base model")
    told = [line.split() for line in lines if line.startswith(("fp32", "int4"))]
    assert [line[0] for line in told] == ["fp32", "int4"]
    assert "100.0%" in told[0]
    assert done.stderr.splitlines() == ["fp32: done", "int4: done"]


@pytest.mark.parametrize(("arm", "down"), [("fp32", "whole"), ("int8", "int8"), ("int4", "int4")])
def test_an_arm_comes_to_the_loss_of_a_run(file, arm, down):
    """The same training, first adapter, mean, codecs and feedback: a trial is no other run."""
    from gradualdiff.tuning.arms import ARMS
    from gradualdiff.tuning.comparing import compare_arms

    found = compare_arms(file, [ARMS[arm]], rounds=2)
    fed_back = str(ARMS[arm].feedback).lower()
    sets = [f"codec.name={arm}", f"codec.down={down}", f"codec.feedback={fed_back}"]
    run = simulate(load_config(file, sets), file.parent)
    assert found.arms[0].loss == pytest.approx(run.summary.held_out_nll, abs=2e-4)
    assert found.arms[0].loss < found.base - 0.01


def test_an_arm_that_diverges_is_told_and_the_others_go_on(file):
    """It has no loss and no share, is on no frontier, and does not end the comparison."""
    from gradualdiff.tuning.arms import ARMS
    from gradualdiff.tuning.comparing import compare_arms
    from gradualdiff.tuning.outcomes import frontier

    wild = replace(ARMS["int4"], rate=1e8)
    found = compare_arms(file, [ARMS["fp32"], wild, ARMS["int8"]], rounds=2)
    assert [one.share is None for one in found.arms] == [False, True, False]
    assert found.arms[1].loss is None
    assert "int4" not in [one.arm for one in frontier(found.arms)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (["--arms", "int3"], errors.ConfigError, "--arms: expected some of fp32, int8"),
        (["--rounds", "0"], errors.ConfigError, "--rounds: expected 1 or more, got 0"),
        (["--picture", "wire.txt"], errors.ConfigError, "expected a name that ends in .png"),
        (["--picture", "none/wire.png"], errors.ConfigError, "there is no none"),
        (
            ["--set", "aggregation.averaging=svd"],
            errors.ConfigError,
            "add --set aggregation.averaging=fedavg",
        ),
        (["--set", "simulation.sites=[]"], errors.ConfigError, "simulation.sites: expected"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_trained(file, tmp_path, options, error, says):
    """With the exit code of a mistake in the settings, and no trace."""
    before = tree(tmp_path)
    done = gradualdiff("tune-codec", file, *options, cwd=tmp_path)
    assert done.returncode == error.exit_code
    assert says in done.stderr
    assert tree(tmp_path) == before


def test_a_missing_file_is_named(tmp_path):
    """The file that was given, not one it names."""
    done = gradualdiff("tune-codec", "nothing.toml", cwd=tmp_path)
    assert done.returncode == errors.ConfigError.exit_code
    assert "nothing.toml" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "b.jsonl").unlink(), "b.jsonl"),
        (lambda folder: (folder / "b.jsonl").write_text(""), "b.jsonl"),
        (
            lambda folder: [
                (folder / name).write_text((folder / name).read_text().replace("0.25", "0"))
                for name in ("a.toml", "b.toml")
            ],
            "nothing is held out",
        ),
    ],
    ids=["no file", "no text", "nothing held out"],
)
def test_a_site_without_data_is_told(file, tmp_path, spoil, says):
    """A site's text is missing, empty, or has nothing to measure a loss on: the error of data."""
    spoil(tmp_path / "mine")
    done = gradualdiff("tune-codec", file, "--rounds", 1, cwd=tmp_path)
    assert done.returncode == errors.DataError.exit_code, done.stderr
    assert says in done.stderr
