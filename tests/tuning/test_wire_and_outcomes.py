"""One direction of the wire as it changes values and counts bytes, and which arms are worth it."""

from __future__ import annotations

import numpy as np
import pytest

from gradualdiff.tuning.arms import ARMS, REFERENCE, chosen
from gradualdiff.tuning.outcomes import Outcome, frontier, share_of_gain
from gradualdiff.tuning.wire import Channel
from shared.errors import ConfigError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, write_delta

SPECS = (
    TensorSpec(name="a.lora_A.weight", shape=(4, 300), init="zeros"),
    TensorSpec(name="b.lora_B.weight", shape=(70, 4), init="zeros"),
)
MANIFEST = Manifest(tensors=SPECS, target_modules=("a", "b"))


def drawn(seed):
    stream = np.random.default_rng(seed)
    return {spec.name: stream.standard_normal(spec.shape, np.float32) for spec in SPECS}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("codec", ["fp32", "int8", "int4", "sign", "topk"])
def test_the_bytes_counted_are_those_of_a_delta_file(codec, packed, tmp_path):
    """Values, scales and header: what ``write_delta`` writes of the same values, to the byte."""
    values, channel = drawn(1), Channel(MANIFEST, codec, packed=packed)
    channel.send(values, 7)
    header = DeltaHeader(
        run="tune",
        round=1,
        site="site",
        source_sha="0" * 64,
        codec=codec,
        codec_version=get_codec(codec).version,
    )
    written = write_delta(
        tmp_path / "d", MANIFEST, codec, header, lambda s: values[s.name], 7, packed=packed
    )
    # A plain header has room for the longest that a part whose length varies might come to be.
    apart = 0 if packed else 8 * len(SPECS)
    assert channel.sizes == [pytest.approx(written.size, abs=apart)]


def test_what_feedback_leaves_out_arrives_later():
    """All that arrived, and what is still owed, is all that was sent; without it, it is lost."""
    with_it, without = (Channel(MANIFEST, "sign", feedback=on) for on in (True, False))
    sent = drawn(2)
    arrived, lost = ({name: np.zeros_like(v) for name, v in sent.items()} for _ in range(2))
    for number in range(60):
        for channel, sum_of in ((with_it, arrived), (without, lost)):
            for name, values in channel.send(sent, number).items():
                sum_of[name] += values
    wanted = np.concatenate([60 * values.ravel() for values in sent.values()])
    missed = [
        np.linalg.norm(np.concatenate([v.ravel() for v in sums.values()]) - wanted)
        for sums in (arrived, lost)
    ]
    assert missed[0] < missed[1] / 5


def test_a_seed_belongs_to_each_tensor():
    """As in a run: the codec's seed is derived from the delta's and the tensor's name."""
    values = drawn(3)
    channel, codec = Channel(MANIFEST, "uniform4"), get_codec("uniform4")
    arrived = channel.send(values, 11)
    for spec in SPECS:
        parts = codec.encode(spec, values[spec.name], derive_seed(11, spec.name))
        assert np.array_equal(arrived[spec.name], codec.decode(spec, parts))


def outcome(arm, size, loss):
    return Outcome(arm, "", 1e-3, 10, size / 2, size / 2, loss, None)


def test_the_frontier_holds_whatever_nothing_cheaper_beats():
    """In order of bytes, without arms that diverged or that cost more for no less loss."""
    arms = [
        outcome("dear", 100, 2.0),
        outcome("dearer", 200, 2.0),
        outcome("cheap", 10, 3.0),
        outcome("worse", 20, 3.5),
        outcome("diverged", 1, None),
    ]
    assert [one.arm for one in frontier(arms)] == ["cheap", "dear"]


@pytest.mark.parametrize(
    ("reference", "loss", "share"),
    [(4.0, 4.0, 1.0), (4.0, 4.25, 0.75), (4.0, 5.5, -0.5), (4.0, None, None), (5.0, 4.0, None)],
)
def test_a_share_is_of_what_the_reference_gained(reference, loss, share):
    """(base - loss) / (base - reference) from a base of 5; none where there was no gain."""
    assert share_of_gain(5.0, reference, loss) == share


def test_the_reference_comes_first_whatever_is_chosen():
    """Shares are of its gain, so it always runs; nothing chosen is everything."""
    assert [arm.name for arm in chosen(["topk", "int8"])] == [REFERENCE, "int8", "topk"]
    assert [arm.name for arm in chosen([])] == list(ARMS)


def test_an_unknown_arm_is_told_with_those_there_are():
    """Expected, got, what to do."""
    with pytest.raises(ConfigError, match=r"--arms: expected some of fp32, int8.*got int3, zip"):
        chosen(["int8", "zip", "int3"])
