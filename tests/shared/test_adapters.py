"""A kind of adapter: its factors by name, what is trained when, and what a smaller rank is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

import shared
from shared.adapters import AdapterKind
from shared.adapters.lora import KIND
from shared.config import LoraSection
from shared.errors import ConfigError
from shared.methods.averaging import delta_manifest, get_averaging
from shared.protocol.manifest import Manifest, TensorSpec
from tests.federations import config


def spec(name, *shape):
    return TensorSpec(name=name, shape=shape, init="zeros")


ONE = Manifest(
    tensors=(
        spec("q.lora_A.weight", 4, 6),
        spec("q.lora_B.weight", 5, 4),
        spec("v.lora_A.weight", 4, 6),
        spec("v.lora_B.weight", 3, 4),
    ),
    target_modules=("q", "v"),
)


def names(manifest):
    return [tensor.name for tensor in manifest.tensors]


def test_factors_are_paired_by_layer():
    """Each layer's A with its own B, and nothing else."""
    assert [(layer.right.name, layer.left.name) for layer in KIND.layers(ONE)] == [
        ("q.lora_A.weight", "q.lora_B.weight"),
        ("v.lora_A.weight", "v.lora_B.weight"),
    ]
    assert KIND.layer_of("q.lora_A.weight") == KIND.layer_of("q.lora_B.weight") == "q"
    with pytest.raises(ValueError, match="lora_A"):
        KIND.layer_of("q.weight")


@pytest.mark.parametrize(
    "tensors",
    [
        (spec("q.lora_A.weight", 4, 6),),
        (spec("q.lora_B.weight", 4, 6),),
        (spec("q.lora_A.weight", 4, 6), spec("v.lora_B.weight", 5, 4)),
        (spec("q.lora_A.weight", 4, 6), spec("q.lora_B.weight", 5, 3)),
        (spec("q.weight", 4, 6),),
    ],
)
def test_what_is_no_pair_is_not_taken_for_one(tensors):
    """No partner, another layer's, another rank, no factor at all."""
    manifest = Manifest(tensors=tensors, target_modules=())
    assert KIND.layers(manifest) == ()
    assert not KIND.is_factors_only(manifest)
    assert KIND.is_factors_only(ONE)


@pytest.mark.parametrize(
    ("averaging", "by_round"),
    [
        ("fedavg", ["AB", "AB", "AB"]),
        ("svd", ["AB", "AB", "AB"]),
        ("flora", ["AB", "AB", "AB"]),
        ("ffa", ["B", "B", "B"]),
        ("rolora", ["B", "A", "B"]),
    ],
)
def test_each_mode_trains_its_factors(averaging, by_round):
    """Rounds 1 to 3; the rest of the manifest stays what it was."""
    for number, letters in enumerate(by_round, start=1):
        part = get_averaging(averaging).trained_in(ONE, number)
        assert names(part) == [n for n in names(ONE) if n[-len("A.weight")] in letters]
        assert part.target_modules == ONE.target_modules


def test_an_adapter_without_the_factor_is_refused():
    """Nothing would be trained; the error says what to set."""
    plain = Manifest(tensors=(spec("q.weight", 2),), target_modules=())
    with pytest.raises(ConfigError, match=r"averaging.*lora_B.*fedavg"):
        get_averaging("ffa").trained_in(plain, 1)


@pytest.mark.parametrize(("scaling", "power"), [("classic", 1.0), ("rslora", 0.5)])
def test_the_scale_is_the_same_at_every_rank(scaling, power):
    """By r, or by its root: equal for the site of rank 16 and the run of rank 64."""
    lora = LoraSection(rank=64, alpha=16.0, scaling=scaling, ranks={"west": 16})
    west, east = KIND.for_site(lora, "west"), KIND.for_site(lora, "east")
    assert (west.rank, east.rank) == (16, 64)
    assert math.isclose(west.alpha / 16**power, 16.0 / 64**power)
    assert east.alpha == 16.0
    # No site is told the others' names.
    assert west.ranks == east.ranks == {}


def test_without_ranks_of_their_own_sites_are_told_the_settings_as_they_are():
    """What was announced before there were ranks is announced still."""
    lora = LoraSection(rank=64, alpha=16.0)
    assert KIND.for_site(lora, "west") is lora
    assert KIND.manifest_for(ONE, lora) is ONE
    assert KIND.manifest_for(ONE, lora, "west") is ONE


def test_manifests_follow_from_each_other():
    """From a small site's the run's, and from that every site's, to the digest."""
    lora = LoraSection(rank=4, alpha=4.0, ranks={"west": 2})
    west = KIND.manifest_for(ONE, lora, "west")
    assert [tensor.shape for tensor in west.tensors] == [(2, 6), (5, 2), (2, 6), (3, 2)]
    assert KIND.manifest_for(west, lora).digest == ONE.digest
    assert KIND.manifest_for(west, lora, "east").digest == ONE.digest


def test_a_delta_is_of_its_sites_rank_and_its_rounds_factors():
    """What intake holds a delta against."""
    svd = config(
        ("east", "west"),
        lora={"rank": 4, "ranks": {"west": 2}},
        aggregation={"averaging": "svd"},
    )
    assert delta_manifest(ONE, svd, "west", 1) == KIND.manifest_for(ONE, svd.lora, "west")
    rolora = config(aggregation={"averaging": "rolora"})
    assert delta_manifest(ONE, rolora, "a", 2) == get_averaging("rolora").trained_in(ONE, 2)


def test_the_leading_block_is_rows_of_a_and_columns_of_b():
    """Their product is what the first directions of the whole one add up to."""
    a, b = np.arange(24.0).reshape(4, 6), np.arange(20.0).reshape(5, 4)
    small_a, small_b = KIND.leading("q.lora_A.weight", a, 2), KIND.leading("q.lora_B.weight", b, 2)
    assert small_a.tolist() == a[:2].tolist()
    assert small_b.tolist() == b[:, :2].tolist()
    other = np.ones(3)
    assert KIND.leading("q.weight", other, 2) is other


def test_what_is_beyond_the_leading_block_is_the_rest_of_the_product():
    """Together they are the whole; of a tensor that is no factor there is no rest."""
    a, b = np.arange(24.0).reshape(4, 6), np.arange(20.0).reshape(5, 4)
    for rank in (0, 1, 4):
        parts = [
            part("q.lora_B.weight", b, rank) @ part("q.lora_A.weight", a, rank)
            for part in (KIND.leading, KIND.beyond)
        ]
        assert (parts[0] + parts[1] == b @ a).all()
    with pytest.raises(ValueError, match=r"q.weight: expected"):
        KIND.beyond("q.weight", a, 2)


def test_a_larger_rank_keeps_the_scale_too():
    """What an adapter that grew needs for plain PEFT to give the same product."""
    for scaling, power in (("classic", 1.0), ("rslora", 0.5)):
        lora = LoraSection(rank=4, alpha=6.0, scaling=scaling, ranks={"west": 1})
        grown = KIND.at_rank(lora, 36)
        assert grown.rank == 36
        assert math.isclose(grown.alpha / 36**power, 6.0 / 4**power)
        assert grown.ranks == {}


def test_no_other_file_knows_the_kind():
    """Its tensors' names and its file: in its own file and where the model makes the adapter."""
    root = Path(shared.__file__).parents[1]
    knowing = {
        str(path.relative_to(root))
        for package in ("shared", "coordinator", "participant", "gradualdiff")
        for path in (root / package).rglob("*.py")
        if re.search(r"lora_[AB]|adapters\.lora|adapters import lora", path.read_text("utf-8"))
    }
    assert knowing == {
        "shared/adapters/lora.py",
        "shared/adapters/core.py",  # it is exported as one
        "participant/model/kinds/core.py",
    }


def test_a_kind_without_factors_is_refused_by_modes_that_need_them(monkeypatch):
    """It has no layers to multiply and no directions to take; fedavg takes it whole."""

    class Plain(AdapterKind):
        name = "plain"
        factors = {}  # noqa: RUF012

    monkeypatch.setattr("shared.adapters.lora.KIND", Plain())
    assert not Plain().is_factors_only(ONE)
    values = np.ones((4, 6))
    assert Plain().leading("q.lora_A.weight", values, 2) is values
    for averaging in ("ffa", "rolora"):
        with pytest.raises(ConfigError, match=r"averaging.*two factors.*fedavg"):
            get_averaging(averaging).trained_in(ONE, 1)
    assert get_averaging("fedavg").trained_in(ONE, 1) is ONE
