"""The codecs' layouts, bytes and error bounds, and the numbers told of deltas."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from shared import modes
from shared.errors import ConfigError
from shared.protocol.manifest import TensorSpec
from shared.tensors.arithmetic import (
    BLOCK,
    difference,
    is_finite,
    significant,
    square_and_product,
    squared_norm,
)
from shared.tensors.codecs import Codec, get_codec

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
SEEDS = st.integers(0, 2**63 - 1)
UNIFORM_GOLDEN = {
    "uniform4": ("bed01af9911f", "4123c1f4c18e0218"),
    "uniform16": ("e88e11d5be04", "f8810af9bf1d304e"),
    "uniform256": ("80ebf3911f05", "ffd78a1caca0b477"),
}
TENSORS = nps.arrays(np.float32, nps.array_shapes(max_dims=3, max_side=20), elements=FINITE)


def spec_of(values: np.ndarray[Any, Any]) -> TensorSpec:
    return TensorSpec(name="w", shape=values.shape, init="zeros")


def there_and_back(codec: Codec, values: Any) -> Any:
    spec = spec_of(values)
    return codec.decode(spec, codec.encode(spec, values, 1))


def test_codecs_are_found_by_their_file() -> None:
    """Every file in the folder is a codec of its own name."""
    uniform = {"uniform4", "uniform16", "uniform256"}
    assert {"bf16", "fp32", "int8"} | uniform <= set(modes.names("codecs"))
    for name in modes.names("codecs"):
        codec = get_codec(name)
        assert codec.name == name
        assert codec.version >= 1


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    """The message says what may stand there."""
    with pytest.raises(ConfigError, match=r"one of bf16, fp32, int4.*, got 'nope'"):
        get_codec("nope")


@pytest.mark.parametrize("name", modes.names("codecs"))
@given(values=TENSORS)
def test_parts_have_the_layout_that_was_promised(name: str, values: Any) -> None:
    """Names start with the tensor's own; dtypes and shapes are those of ``layout``."""
    codec, spec = get_codec(name), spec_of(values)
    layouts, parts = codec.layout(spec), codec.encode(spec, values, 1)
    assert layouts[0].name == "w"
    assert all(layout.name.startswith("w:") for layout in layouts[1:])
    for layout, part in zip(layouts, parts, strict=True):
        assert part.dtype == layout.numpy_dtype
        assert layout.holds(part.shape)
    decoded = codec.decode(spec, parts)
    assert (decoded.dtype, decoded.shape) == (np.float32, values.shape)


@pytest.mark.parametrize("name", modes.names("codecs"))
@given(values=TENSORS, seed=st.integers(0, 2**63 - 1))
def test_encoding_is_a_function_of_values_and_seed(name: str, values: Any, seed: int) -> None:
    """The same twice gives the same bytes."""
    codec, spec = get_codec(name), spec_of(values)
    first, second = (codec.encode(spec, values.copy(), seed) for _ in range(2))
    assert [part.tobytes() for part in first] == [part.tobytes() for part in second]


@given(TENSORS)
def test_fp32_is_exact(values: Any) -> None:
    """Not one bit changes."""
    assert there_and_back(get_codec("fp32"), values).tobytes() == values.tobytes()


def test_bf16_rounds_half_to_even() -> None:
    """Ties between neighbours 2**-7 apart at 1: 1 + 1/256 goes down, 1 + 3/256 goes up."""
    values = np.array([1 + 1 / 256, 1 + 3 / 256, -1 - 3 / 256], np.float32)
    assert there_and_back(get_codec("bf16"), values).tolist() == [1, 1 + 4 / 256, -1 - 4 / 256]


@given(TENSORS)
def test_bf16_keeps_its_bound(values: Any) -> None:
    """The error is at most 2**-8 of the value, or 2**-134 near zero."""
    error = np.abs(there_and_back(get_codec("bf16"), values).astype(np.float64) - values)
    assert np.all(error <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-134))


def test_int8_gives_the_numbers_worked_out_by_hand() -> None:
    """Largest magnitude 127 makes the scale 1, halves go to even, an all-zero block stays zero."""
    values = np.zeros(300, np.float32)
    values[:5] = [127, 0.5, 1.5, -2.5, 126.6]
    spec = spec_of(values)
    whole, scales = get_codec("int8").encode(spec, values, 1)
    assert whole[:6].tolist() == [127, 0, 2, -2, 127, 0]
    assert scales.astype(np.float32).tolist() == [1, 0]


def test_int8_scales_are_rounded_up() -> None:
    """127.25 / 127 lies between 1 and 1 + 2**-7, nearer to 1, which would clip the value."""
    values = np.array([127.25, -127.25], np.float32)
    whole, scales = get_codec("int8").encode(spec_of(values), values, 1)
    assert scales.astype(np.float32).tolist() == [1 + 2**-7]
    assert whole.tolist() == [126, -126]


@given(
    nps.arrays(
        np.float32,
        st.integers(1, 600),
        elements=FINITE,
    )
)
def test_int8_keeps_its_bound(values: Any) -> None:
    """The error is at most half a scale: m / 254 * (1 + 2**-7), or 2**-134 near zero."""
    error = np.abs(there_and_back(get_codec("int8"), values).astype(np.float64) - values)
    for start in range(0, values.size, 256):
        m = float(np.abs(values[start : start + 256]).max())
        bound = max(m / 254 * (1 + 2**-7), m / 254 + 2.0**-134)
        assert error[start : start + 256].max() <= bound


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_bad_scale_decodes_to_values_that_are_not_finite(scale: float) -> None:
    """So that the check of decoded values sees it, even where all whole numbers are zero."""
    parts = (np.zeros(3, np.int8), np.array([scale], ml_dtypes.bfloat16))
    values = get_codec("int8").decode(TensorSpec(name="w", shape=(3,), init="zeros"), parts)
    assert not is_finite(values)


def test_uniform_gives_the_numbers_worked_out_by_hand() -> None:
    """Levels -1, 0, 1, 2 are exact whatever the seed; the first value is in the lowest bits."""
    values = np.array([-1, 0, 1, 2, 2], np.float32)
    for seed in range(20):
        packed, ranges = get_codec("uniform4").encode(spec_of(values), values, seed)
        assert packed.tolist() == [0b11_10_01_00, 0b11]
        assert ranges.tolist() == [[-1, 2]]
    decoded = get_codec("uniform4").decode(spec_of(values), (packed, ranges))
    assert decoded.tolist() == values.tolist()
    four, _ = get_codec("uniform16").encode(spec_of(values), np.float32([0, 1, 2, 15, 9]), 1)
    assert four.tolist() == [0x10, 0xF2, 0x09]


@pytest.mark.parametrize(("name", "golden"), UNIFORM_GOLDEN.items())
def test_uniform_keeps_its_bytes(name: str, golden: tuple[str, str]) -> None:
    """For one seed: another digest means another version, or a numpy that broke its promise."""
    values = np.sin(np.arange(600, dtype=np.float64)).astype(np.float32)
    packed, ranges = get_codec(name).encode(spec_of(values), values, 7)
    assert (packed[:6].tobytes().hex(), hashlib.sha256(packed.tobytes()).hexdigest()[:16]) == golden
    assert ranges.shape == (3, 2)
    assert ranges[0].tolist() == [values[:256].min(), values[:256].max()]


def test_uniform_rounds_by_the_first_words_of_philox() -> None:
    """Here x = 1 and the step is 0.75: q = floor(1.333 + u), by numpy's documented stream."""
    values = np.ones(256, np.float32)
    values[:2] = [0, 2.25]
    packed, _ = get_codec("uniform4").encode(spec_of(values), values, 99)
    words = np.random.Philox(key=99).random_raw(256)
    wanted = [0, 3, *(int(1 / 0.75 + (int(word) >> 11) / 2**53) for word in words[2:])]
    assert [(packed[i // 4] >> 2 * (i % 4)) & 3 for i in range(256)] == wanted
    assert set(wanted[2:]) == {1, 2}


@pytest.mark.parametrize("name", UNIFORM_GOLDEN)
@given(values=nps.arrays(np.float32, st.integers(1, 600), elements=FINITE), seed=SEEDS)
def test_uniform_keeps_its_bound(name: str, values: Any, seed: int) -> None:
    """The error is at most one step of the value's own block, beside fp32's rounding."""
    codec, spec = get_codec(name), spec_of(values)
    decoded = codec.decode(spec, codec.encode(spec, values, seed)).astype(np.float64)
    for start in range(0, values.size, 256):
        block = values[start : start + 256].astype(np.float64)
        step = (block.max() - block.min()) / (int(name.removeprefix("uniform")) - 1)
        rounding = np.abs(block).max() * 2.0**-24 + 2.0**-150
        assert np.abs(decoded[start : start + 256] - block).max() <= step * (1 + 1e-12) + rounding


@pytest.mark.parametrize("name", UNIFORM_GOLDEN)
def test_uniform_is_right_on_average(name: str) -> None:
    """The mean over 4,000 seeds is the value: within 5 standard errors of at most step / 2 each."""
    stream = np.random.Generator(np.random.Philox(3))
    values = stream.standard_normal(300).astype(np.float32)
    codec, spec, count = get_codec(name), spec_of(values), 4000
    total = np.zeros(300)
    for seed in range(count):
        total += codec.decode(spec, codec.encode(spec, values, seed))
    step = float(values.max() - values.min()) / (int(name.removeprefix("uniform")) - 1)
    assert np.abs(total / count - values).max() < 5 * step / 2 / math.sqrt(count)


@pytest.mark.parametrize("name", UNIFORM_GOLDEN)
def test_uniform_takes_the_largest_numbers_there_are(name: str) -> None:
    """Here hi - lo overflows fp32; a u next to 1 on hi, and equal values, stay on the levels."""
    ends = np.array([-3.4e38, 3.4e38] * 200, np.float32)
    assert there_and_back(get_codec(name), ends).tolist() == ends.tolist()
    equal = np.full(300, np.float32(0.1))
    assert there_and_back(get_codec(name), equal).tolist() == equal.tolist()


@pytest.mark.parametrize("name", UNIFORM_GOLDEN)
@given(data=st.data(), count=st.integers(1, 600))
def test_uniform_decodes_anything_and_hides_no_bad_range(name: str, data: Any, count: int) -> None:
    """Any bytes and any two floats; a NaN or an infinity shows in every value of its block."""
    spec = TensorSpec(name="w", shape=(count,), init="zeros")
    codec = get_codec(name)
    first, second = codec.layout(spec)
    packed = data.draw(nps.arrays(np.uint8, first.shape))
    ranges = data.draw(nps.arrays(np.float32, second.shape, elements=st.floats(width=32)))
    decoded = codec.decode(spec, (packed, ranges))
    for number, start in enumerate(range(0, count, 256)):
        bad = not np.isfinite(ranges[number]).all()
        assert np.isfinite(decoded[start : start + 256]).all() == (not bad)
        if bad:
            assert not np.isfinite(decoded[start : start + 256]).any()


def test_layouts_promise_the_sizes_worked_out_by_hand() -> None:
    """MB for LLaMA-2-7B at r=64 (159,907,840 values), in one tensor and without a header."""
    spec = TensorSpec(name="w", shape=(159_907_840,), init="zeros")
    sizes = {
        name: sum(part.size_bytes for part in get_codec(name).layout(spec)) / 1e6
        for name in modes.names("codecs")
    }
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "int4": 81.5, "sign": 21.2, "topk": 3.9,  # of int4 and topk: the most
        "fp32": 639.6, "bf16": 319.8, "int8": 161.2,
        "uniform256": 164.9, "uniform16": 85.0, "uniform4": 45.0,
    }  # fmt: skip


def test_a_difference_is_taken_in_fp32() -> None:
    """Also of bfloat16 tensors, whose own subtraction would round to 8 bits."""
    local = np.array([1.0, 256.0], ml_dtypes.bfloat16)
    source = np.array([2.0**-9, 1.0], np.float32)
    got = difference(local, source)
    assert got.dtype == np.float32
    assert got.tolist() == [1 - 2.0**-9, 255]


def test_tensors_of_two_shapes_are_not_broadcast() -> None:
    """A forgotten axis is an error, not a larger tensor."""
    with pytest.raises(ValueError, match="one shape"):
        difference(np.zeros((2, 1), np.float32), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="one shape"):
        square_and_product(np.zeros(2), np.zeros(1))


def test_norms_and_products_are_those_worked_out_by_hand() -> None:
    """3, 4 has squared norm 25; with 1, 2 it has the product 11; nothing at all has 0."""
    first, second = np.array([[3, 4]], np.float32), np.array([[1, 2]], np.float64)
    assert squared_norm(first) == 25
    assert square_and_product(first, second) == (25, 11)
    assert squared_norm(np.zeros((0, 3), np.float32)) == 0


def test_sums_are_taken_in_fp64_over_all_blocks() -> None:
    """In fp32 the ones would be lost beside 2**24; a rest shorter than a block counts as well."""
    values = np.ones(2 * BLOCK + 3, np.float32)
    values[0] = 2**14
    assert squared_norm(values) == 2**28 + 2 * BLOCK + 2
    assert square_and_product(values, values) == (squared_norm(values),) * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_spoils_a_tensor(value: float) -> None:
    """NaN and both infinities are seen wherever they stand."""
    values = np.zeros((3, 3), np.float32)
    assert is_finite(values)
    values[2, 1] = value
    assert not is_finite(values)


def test_recorded_numbers_have_nine_digits() -> None:
    """Enough for a norm, few enough for the last bits of a sum not to show."""
    assert significant(math.pi * 1e-7) == 3.14159265e-7
    assert significant(0.0) == 0
