"""Core and (IA)3 adapters on a tiny Llama: what is trained, frozen and exported."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from coordinator.runs.expanding import write_lora
from participant.data import TokenisedExample
from participant.learner.training import Beginning, RoundPlace, train_round
from participant.model import LocalModel, attach_adapter, pick_device, settle_threads, write_bases
from participant.model.bases import range_of
from participant.model.loading import load_base
from shared.adapters import kind_of
from shared.adapters.core import KIND
from shared.config import BaseSection, LoraSection, TrainingSection
from shared.errors import ModelError
from shared.protocol.manifest import Manifest
from shared.tensors.genesis import draw_adapter
from shared.tensors.tensor_file import ADAPTER_METADATA, TensorFile, TensorLayout, write_tensors
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.model

RANK = 8
CORE = LoraSection(kind="core", rank=RANK, dropout=0.0)
IA3 = LoraSection(kind="ia3")
SETTINGS = TrainingSection(local_steps=6, batch_size=4, learning_rate=3e-2, weight_decay=0.0)
EXAMPLES = [TokenisedExample(tuple(range(3 + i, 15 + 2 * i)), 6 + i % 3) for i in range(16)]
QUANTISATIONS = ("none", "nf4", "int8")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party code building a model, not ours
        return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def base_of(path, quantisation="none"):
    return BaseSection(model=str(path), quantisation=quantisation, compute_dtype="float32")


def load(path, lora=CORE, quantisation="none", bases=None):
    settle_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LocalModel(base_of(path, quantisation), lora, pick_device("cpu"), bases)


def train(model):
    begun = draw(model)
    model.load_adapter(begun.__getitem__)
    before = loss(model)
    train_round(
        model,
        EXAMPLES,
        SETTINGS,
        RoundPlace("site", 1, 7, 0.0, 1.0),
        begin=Beginning(),
        should_stop=lambda: False,
        report=lambda _: None,
    )
    return before, loss(model)


def draw(model):
    inits = {"zeros": np.zeros, "ones": np.ones}
    return {s.name: inits[s.init](s.shape, np.float32) for s in model.manifest().tensors}


def loss(model):
    with torch.no_grad():
        return float(model.answer_nll(EXAMPLES))


def logits(network):
    with torch.no_grad():
        return network(torch.arange(40).reshape(2, 20)).logits


def save(model, folder, lora, base):
    """The adapter as it lies in the ledger."""
    folder.mkdir(exist_ok=True)
    tensors = model.manifest().tensors
    layouts = [TensorLayout(spec.name, "F32", spec.shape) for spec in tensors]
    target = folder / "adapter_model.safetensors"
    write_tensors(target, layouts, (model.read(s.name).copy() for s in tensors), ADAPTER_METADATA)
    config = kind_of(lora).peft_config(base, lora, model.manifest())
    (folder / "adapter_config.json").write_bytes(config)
    return target


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_the_first_core_changes_nothing_and_only_cores_are_trained(path, quantisation):
    """Over every kind of base; the bases stay as they were, to the byte."""
    model = load(path, CORE, quantisation)
    manifest = model.manifest()
    assert manifest.kind == "core"
    assert {spec.shape for spec in manifest.tensors} == {(RANK, RANK)}
    assert {spec.init for spec in manifest.tensors} == {"zeros"}
    layers = [KIND.layer_of(spec.name) for spec in manifest.tensors]
    frozen = {layer: tuple(part.tobytes() for part in model.frozen(layer)) for layer in layers}
    plain = load(path, LoraSection(rank=2), quantisation)  # PEFT begins with B = 0
    assert torch.equal(logits(model._network), logits(plain._network))
    before, after = train(model)
    assert after < before - 1
    assert all(model.read(spec.name).any() for spec in manifest.tensors)
    assert frozen == {
        layer: tuple(part.tobytes() for part in model.frozen(layer)) for layer in layers
    }


def test_a_core_is_not_transposed(path):
    """The layer adds exactly B R A x."""
    model = load(path)
    values = {
        spec.name: np.random.Generator(np.random.Philox(at)).standard_normal(spec.shape, np.float32)
        for at, spec in enumerate(model.manifest().tensors)
    }
    model.load_adapter(values.__getitem__)
    name = next(name for name in values if "down_proj" in name)
    layer = model._network.get_submodule(KIND.layer_of(name))
    b, a = model.frozen(KIND.layer_of(name))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        added = (layer(x) - layer.base_layer(x)).numpy()
    np.testing.assert_allclose(added, x.numpy() @ (b @ values[name] @ a).T, atol=1e-4)


def test_bases_of_the_weights_are_orthonormal_and_nearly_the_best():
    """Against the SVD; their bytes are a function of weight, rank and name."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    weight = weight @ torch.diag(1.0 / torch.arange(1.0, 65.0))
    b, a, held = range_of(weight, 16, "x")
    assert torch.allclose(b.T @ b, torch.eye(16), atol=1e-5)
    assert torch.allclose(a @ a.T, torch.eye(16), atol=1e-5)
    best = torch.linalg.svdvals(weight.double()).square()
    assert 0.99 < held / float(best[:16].sum() / best.sum()) <= 1
    again = range_of(weight, 16, "x")
    assert b.numpy().tobytes() == again[0].numpy().tobytes()
    assert a.numpy().tobytes() == again[1].numpy().tobytes()


def test_a_little_other_weight_has_a_little_other_bases():
    """No sign or rotation is left to chance: machines may round otherwise."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)).double()
    near = weight + 1e-9 * torch.randn(64, 48, generator=torch.Generator().manual_seed(4))
    one, two = range_of(weight, 16, "x"), range_of(near, 16, "x")
    assert float((one[0] - two[0]).abs().max()) < 1e-5
    assert float((one[1] - two[1]).abs().max()) < 1e-5


def test_a_rank_beyond_a_layer_leaves_directions_empty():
    """And nothing else of them."""
    b, a, held = range_of(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), 16, "x")
    assert (b.shape, a.shape) == ((8, 16), (16, 32))
    assert not b[:, 8:].any()
    assert not a[8:].any()
    assert math.isclose(held, 1.0, rel_tol=1e-9)


def test_every_load_finds_the_same_bases(path):
    """So that sites with equal machines agree by their sha256."""
    one, two = load(path).bases, load(path).bases
    assert one == two
    assert set(one.figures()) == {"least", "median", "most"}
    assert load(path, CORE.model_copy(update={"rank": 4})).bases.sha != one.sha


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_an_exported_core_is_a_lora_adapter_that_plain_peft_loads(path, tmp_path, quantisation):
    """With the same logits, and merged too."""
    base, model = base_of(path, quantisation), load(path, CORE, quantisation)
    train(model)
    cores = save(model, tmp_path / "ledger", CORE, base)
    with pytest.raises(Exception, match="GRADUALDIFF_CORE"):
        peft_of(base, tmp_path / "ledger")
    write_bases(base, CORE, model.fingerprint, {model.bases.sha}, tmp_path / "bases")
    (tmp_path / "out").mkdir()
    write_lora(cores, tmp_path / "bases", tmp_path / "out" / "adapter_model.safetensors")
    lora = KIND.as_lora(CORE)
    config = kind_of(lora).peft_config(base, lora, model.manifest())
    (tmp_path / "out" / "adapter_config.json").write_bytes(config)
    loaded = peft_of(base, tmp_path / "out")
    mine = logits(model._network)
    torch.testing.assert_close(logits(loaded), mine, atol=2e-5, rtol=1e-4)
    if quantisation == "none":
        merged = loaded.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(logits(merged), mine, atol=2e-5, rtol=1e-4)


def peft_of(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = load_base(base, torch.device("cpu"), torch.float32).network
        return attach_adapter(network, folder, "default").eval()


def test_bases_of_another_model_are_refused(path, tmp_path):
    """By the fingerprint that the run has on record."""
    with pytest.raises(ModelError, match=r"expected fingerprint 0000.*--base"):
        write_bases(base_of(path), CORE, "0" * 64, set(), tmp_path / "bases")


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_ia3_begins_as_ones_trains_and_loads_in_plain_peft(path, tmp_path, quantisation):
    """As the adapter that lies in the ledger, with the same logits."""
    base, model = base_of(path, quantisation), load(path, IA3, quantisation)
    specs = model.manifest().tensors
    assert {spec.init for spec in specs} == {"ones"}
    assert {spec.shape[0] == 1 for spec in specs if "down_proj" in spec.name} == {True}
    assert {spec.shape[1] == 1 for spec in specs if "down_proj" not in spec.name} == {True}
    begun = draw(model)
    before, after = train(model)
    assert after < before
    assert all((model.read(spec.name) != begun[spec.name]).any() for spec in specs)
    save(model, tmp_path / "ledger", IA3, base)
    if quantisation == "int8":  # whose arithmetic in eval mode is another one: see int8_layers
        return
    loaded = peft_of(base, tmp_path / "ledger")
    torch.testing.assert_close(logits(loaded), logits(model._network), atol=2e-5, rtol=1e-4)


def test_genesis_draws_what_each_kind_begins_with(path, tmp_path):
    """The coordinator has no base model: the manifest tells."""
    for lora, value in ((CORE, 0.0), (IA3, 1.0)):
        draw_adapter(load(path, lora).manifest(), 1, tmp_path / lora.kind)
        with TensorFile(tmp_path / lora.kind) as file:
            assert {v for name in file.layouts for v in file.read(name).ravel()} == {value}


def test_a_manifest_of_lora_says_nothing_of_its_kind(path):
    """So digests of before there were others stay."""
    one = load(path, LoraSection(rank=2)).manifest()
    assert "kind" not in one.model_dump(mode="json")
    core = load(path).manifest()
    assert core.model_dump(mode="json")["kind"] == "core"
    assert Manifest.model_validate_json(core.model_dump_json()) == core
