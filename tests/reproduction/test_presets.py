"""The presets load, and every arm of them is a run that the product takes."""

import math

import pytest

from gradualdiff.reproduction.arms import (
    ARMS,
    UNTRAINED,
    Setting,
    check_arms,
    check_plans,
    config_of,
    plans,
)
from gradualdiff.reproduction.experiment import climb
from gradualdiff.reproduction.presets import PRESETS, Preset, changed, load_preset
from shared.config import parse
from shared.errors import ConfigError


def configs(preset: Preset, arm: str, batch_size: int = 4):
    setting = Setting(1, batch_size, preset.reproduce.learning_rates[0])
    for plan in plans(preset, arm, setting):
        yield config_of(preset, plan)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in UNTRAINED])
def test_every_arm_of_a_preset_is_a_run(name, arm):
    preset = load_preset(name)
    for size in preset.reproduce.batch_sizes:
        found = list(configs(preset, arm, size))
        assert len(found) == (preset.reproduce.participants if arm == "local" else 1)
        assert all(config.training.batch_size == size for config in found)


def test_the_paper_preset_is_the_papers_settings():
    preset = load_preset("paper")
    (config,) = configs(preset, "federated")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16.0, 0.1)
    assert (config.training.max_grad_norm, config.training.weight_decay) == (0.3, 0.001)
    assert config.training.warmup_ratio == 0.03
    assert config.base.quantisation == "nf4"
    assert preset.reproduce.rounds == 15
    assert preset.reproduce.batch_sizes == (4, 8)
    assert preset.reproduce.learning_rates[:5] == (1e-5, 3e-5, 5e-5, 8e-5, 1e-4)
    assert config.aggregation.clip_to_median == "off"  # the paper's rule, and nothing else


def test_arms_process_as_many_batches():
    """K participants times their steps, in whatever form."""
    preset = load_preset("cpu")
    batches = {
        arm: sum(
            len(config.run.participants)
            * config.training.local_steps
            * config.training.gradient_accumulation
            for config in configs(preset, arm)
        )
        for arm in ARMS
        if arm not in UNTRAINED
    }
    assert set(batches.values()) == {20}, batches


def test_central_arms_differ_in_steps_and_batch():
    preset = load_preset("cpu")
    (steps,), (batch,) = configs(preset, "central-steps"), configs(preset, "central-batch")
    assert (steps.training.local_steps, steps.training.gradient_accumulation) == (20, 1)
    assert (batch.training.local_steps, batch.training.gradient_accumulation) == (4, 5)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--arms: expected some of base, local, .* got 'centre'"):
        check_arms(("base", "centre"))
    with pytest.raises(ConfigError, match="--preset: expected cpu, paper or the path"):
        load_preset("gpu")


@pytest.mark.parametrize(
    ("recommended", "says"),
    [
        ({"run": {"name": "x"}}, "recommended.run: expected one of the tables aggregation"),
        ({"training": {"learning_rate": 1.0}}, "recommended.training.learning_rate: expected"),
        (
            {"training": {"max_answer_tokens": 8}},
            "training.max_answer_tokens: expected what",
        ),
        ({"selection": {"fraction": 0.6}}, "recommended.selection: expected one of the tables"),
        ({"aggregation": {"averaging": "flora"}}, "expected one whose adapter keeps its rank"),
    ],
)
def test_the_recommended_mode_may_not_change_what_is_compared(recommended, says):
    values = load_preset("cpu").model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        parse(Preset, values | {"recommended": recommended}, "mine")


@pytest.mark.parametrize(
    ("recommended", "says"),
    [
        ({"lora": {"scalling": "rslora"}}, r"lora\.scalling: expected a known"),
        ({"aggregation": {"rule": "multi-krum", "assumed_bad": 2}}, "multi-krum"),
        ({"lora": {"ranks": {"site-1": 2}}}, r"lora\.ranks"),
    ],
)
def test_every_arm_is_checked_before_any_is_trained(recommended, says):
    values = load_preset("cpu").model_dump(mode="json", exclude_unset=True)
    preset = parse(Preset, values | {"recommended": recommended}, "mine")
    check_plans(preset, ("base", "local", "fedavg", "federated"))
    with pytest.raises(ConfigError, match=f"(?s)arm recommended.*{says}"):
        check_plans(preset, tuple(ARMS))


def test_epochs_are_no_setting_of_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        "[reproduce]\nlearning_rates = [1e-3]\n[base]\nmodel = 'm'\n[training]\nlocal_epochs = 2\n"
    )
    with pytest.raises(ConfigError, match=r"training\.local_epochs: expected"):
        load_preset(str(file))


@pytest.mark.parametrize(
    ("losses", "best", "asked"),
    [
        ([3, 2, 1, 2, 3], 2, {1, 2, 3}),
        ([5, 4, 3, 2, 1], 4, {2, 3, 4}),
        ([1, 2, 3, 4, 5], 0, {0, 1, 2, 3}),
        ([2, 1, math.inf, math.inf, math.inf], 1, {0, 1, 2, 3}),
        ([1, math.inf, math.inf, math.inf, math.inf], 0, {0, 1, 2, 3}),
        ([math.inf] * 5, 0, {0, 1, 2, 3}),
        ([1], 0, set()),
    ],
)
def test_the_grid_is_climbed_past_what_diverges(losses, best, asked):
    seen = set()

    def loss(at):
        seen.add(at)
        return losses[at]

    assert climb(len(losses), loss) == best
    assert seen == asked


def test_fedavg_needs_the_run_it_is_computed_from():
    assert check_arms(("fedavg",)) == ("fedavg", "federated")


def test_a_preset_is_checked_as_a_whole(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[reproduce]\nlearning_rates = [1e-3]\nround = 3\n[base]\nmodel = 'm'\n")
    with pytest.raises(ConfigError, match=r"reproduce\.round: expected a known setting"):
        load_preset(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_preset(str(tmp_path / "none.toml"))
    file.write_text(
        "[reproduce]\nlearning_rates = [1e-3]\n[base]\nmodel = 'm'\n"
        "[recommended.training]\nwarmup_ratio = nan\n"
    )
    with pytest.raises(ConfigError, match=r"recommended: training: warmup_ratio: .*finite.* nan"):
        load_preset(str(file))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rates": [1e-3, 1e-4]}, "ascending"),
        ({"learning_rates": [1e-3], "partition": "dirichlet"}, "ALPHA a number above 0"),
        ({"learning_rates": [1e-3, float("nan")]}, "entry 2: expected a finite number, got nan"),
        ({"learning_rates": [1e-3], "participants": 1}, "expected 2 or more, got 1"),
    ],
)
def test_sizes_that_make_no_sense(values, says):
    with pytest.raises(ConfigError, match=says):
        parse(Preset, {"reproduce": values, "base": {"model": "m"}}, "test")


def test_what_arms_vary_is_not_set_for_all():
    values = {
        "reproduce": {"learning_rates": [1e-3]},
        "base": {"model": "m"},
        "training": {"local_steps": 3},
    }
    with pytest.raises(
        ConfigError, match=r"training\.local_steps: expected it under \[reproduce\]"
    ):
        parse(Preset, values, "test")


def test_options_change_the_digest():
    preset = load_preset("cpu")
    other = changed(preset, "another", partition="dirichlet(0.5)")
    assert (other.base.model, other.reproduce.partition) == ("another", "dirichlet(0.5)")
    assert other.digest != preset.digest
    assert changed(preset, None, partition=None).digest == preset.digest
