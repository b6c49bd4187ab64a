"""The first adapter and PEFT's config."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shared.adapters.lora import KIND
from shared.config import BaseSection, LoraSection
from shared.errors import ConfigError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.tensors.genesis import draw_adapter
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from pathlib import Path

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
MANIFEST = Manifest(
    tensors=(
        TensorSpec(name=NAME.format("A"), shape=(64, 400), init="kaiming_uniform"),
        TensorSpec(name=NAME.format("B"), shape=(400, 64), init="zeros"),
    ),
    target_modules=("v_proj", "q_proj"),
)
BASE = BaseSection(model="HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_is_uniform_within_its_bound_and_b_is_zero(tmp_path: Path) -> None:
    """U(-1/20, 1/20) for 400 inputs: mean 0 and variance 1/1200 within five standard errors."""
    draw_adapter(MANIFEST, 1, tmp_path / "adapter")
    with TensorFile(tmp_path / "adapter") as file:
        assert file.metadata == {"format": "pt"}
        assert [(one.name, one.dtype, one.shape) for one in file.layouts.values()] == [
            (spec.name, "F32", spec.shape) for spec in MANIFEST.tensors
        ]
        assert not file.read(NAME.format("B")).any()
        values = file.read(NAME.format("A")).astype(np.float64)
    bound, count = 1 / 20, values.size
    assert 0.999 * bound < np.abs(values).max() <= bound
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * count)
    # The fourth moment of a uniform is bound^4 / 5, so its square varies by bound^4 * 4 / 45.
    assert abs((values**2).mean() - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / count)


def test_fan_in_is_the_product_of_all_but_the_first_axis(tmp_path: Path) -> None:
    """A convolution's (out, in, height, width) has in * height * width inputs a value."""
    spec = TensorSpec(name="w", shape=(50, 4, 5, 5), init="kaiming_uniform")
    draw_adapter(Manifest(tensors=(spec,), target_modules=("w",)), 1, tmp_path / "adapter")
    with TensorFile(tmp_path / "adapter") as file:
        assert 0.099 < np.abs(file.read("w")).max() <= 0.1


def test_the_first_adapter_is_a_golden_file(tmp_path: Path) -> None:
    """The same bytes on every machine and numpy: a changed digest here breaks `runs verify`."""
    digest = draw_adapter(MANIFEST, 1, tmp_path / "adapter")
    assert digest.sha256 == "a4cdfa91f65be6df365fe21bb8feb8955447ae5ecae3ec4040099c0789e48492"


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    """Other tensors beside it do not shift its numbers; another seed or name changes them."""
    alone = TensorSpec(name="w", shape=(4, 4), init="kaiming_uniform")
    other = TensorSpec(name="v", shape=(4, 4), init="kaiming_uniform")
    draws = {}
    for key, specs, seed in (
        ("alone", (alone,), 1),
        ("beside", (other, alone), 1),
        ("reseeded", (alone,), 2),
    ):
        draw_adapter(Manifest(tensors=specs, target_modules=("w",)), seed, tmp_path / key)
        with TensorFile(tmp_path / key) as file:
            draws[key] = {name: file.read(name).tobytes() for name in file.layouts}
    assert draws["alone"]["w"] == draws["beside"]["w"]
    assert draws["alone"]["w"] != draws["beside"]["v"]
    assert draws["alone"]["w"] != draws["reseeded"]["w"]


def test_a_vector_has_no_fan_in(tmp_path: Path) -> None:
    """The error names the tensor, and no file stays."""
    spec = TensorSpec(name="bias", shape=(4,), init="kaiming_uniform")
    with pytest.raises(ConfigError, match=r"'bias': expected at least two dimensions"):
        draw_adapter(Manifest(tensors=(spec,), target_modules=("w",)), 1, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_the_config_has_the_runs_settings_in_one_byte_form() -> None:
    """Sorted keys and modules, an alpha without a fraction as a whole number, a last newline."""
    data = KIND.peft_config(BASE, LoraSection(), MANIFEST)
    config = json.loads(data)
    assert data == json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_dropout"], config["peft_type"]) == (64, 0.1, "LORA")
    assert b'"lora_alpha": 16,' in data
    assert b'"lora_alpha": 16.5,' in KIND.peft_config(BASE, LoraSection(alpha=16.5), MANIFEST)
    assert config["use_rslora"] is False
    rslora = KIND.peft_config(BASE, LoraSection(scaling="rslora"), MANIFEST)
    assert rslora == data.replace(b'"use_rslora": false', b'"use_rslora": true')


@pytest.mark.model
def test_peft_reads_the_config(tmp_path: Path) -> None:
    """LoraConfig.from_pretrained takes it as its own, without a warning."""
    peft = pytest.importorskip("peft")
    data = KIND.peft_config(BASE, LoraSection(rank=8), MANIFEST)
    (tmp_path / "adapter_config.json").write_bytes(data)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert (config.bias, config.use_rslora, config.inference_mode) == ("none", False, True)
    assert config.base_model_name_or_path == BASE.model
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.model
def test_peft_would_draw_from_the_same_distribution() -> None:
    """The bound of kaiming_uniform_(a=sqrt(5)) for 400 inputs, as torch draws it, is ours."""
    torch = pytest.importorskip("torch")
    weight = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    assert 0.999 / 20 < weight.abs().max().item() <= 1 / 20 + 1e-9
