"""The codecs' layouts, bytes and error bounds, and the numbers told of deltas."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from shared.codecs import Codec, codec_names, get_codec
from shared.deltas import (
    BLOCK,
    difference,
    inner_product,
    is_finite,
    significant,
    square_and_product,
    squared_norm,
)
from shared.errors import ConfigError
from shared.manifest import TensorSpec

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
TENSORS = nps.arrays(np.float32, nps.array_shapes(max_dims=3, max_side=20), elements=FINITE)


def spec_of(values: np.ndarray[Any, Any]) -> TensorSpec:
    return TensorSpec(name="w", shape=values.shape, init="zeros")


def there_and_back(codec: Codec, values: Any) -> Any:
    spec = spec_of(values)
    return codec.decode(spec, codec.encode(spec, values, 1))


def test_codecs_are_found_by_their_file() -> None:
    """Every file in the folder is a codec of its own name."""
    assert {"bf16", "fp32", "int8"} <= set(codec_names())
    for name in codec_names():
        codec = get_codec(name)
        assert codec.name == name
        assert codec.version >= 1


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    """The message says what may stand there."""
    with pytest.raises(ConfigError, match=r"one of bf16, fp32, int8.*, got 'nope'"):
        get_codec("nope")


@pytest.mark.parametrize("name", codec_names())
@given(values=TENSORS)
def test_parts_have_the_layout_that_was_promised(name: str, values: Any) -> None:
    """Names start with the tensor's own; dtypes and shapes are those of ``layout``."""
    codec, spec = get_codec(name), spec_of(values)
    layouts, parts = codec.layout(spec), codec.encode(spec, values, 1)
    assert layouts[0].name == "w"
    assert all(layout.name.startswith("w:") for layout in layouts[1:])
    forms = [(layout.numpy_dtype, layout.shape) for layout in layouts]
    assert [(part.dtype, part.shape) for part in parts] == forms
    decoded = codec.decode(spec, parts)
    assert (decoded.dtype, decoded.shape) == (np.float32, values.shape)


@pytest.mark.parametrize("name", codec_names())
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


def test_sizes_are_those_of_the_table() -> None:
    """Bytes for LLaMA-2-7B at r=64 (159,907,840 values): 639.6, 319.8 and 161.2 MB."""
    spec = TensorSpec(name="w", shape=(159_907_840,), init="zeros")
    sizes = {
        name: sum(part.size_bytes for part in get_codec(name).layout(spec)) / 1e6
        for name in ("fp32", "bf16", "int8")
    }
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "fp32": 639.6, "bf16": 319.8, "int8": 161.2
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
        inner_product(np.zeros(2), np.zeros(1))


def test_norms_and_products_are_those_worked_out_by_hand() -> None:
    """3, 4 has squared norm 25; with 1, 2 it has the product 11; nothing at all has 0."""
    first, second = np.array([[3, 4]], np.float32), np.array([[1, 2]], np.float64)
    assert squared_norm(first) == 25
    assert inner_product(first, second) == 11
    assert square_and_product(first, second) == (25, 11)
    assert squared_norm(np.zeros((0, 3), np.float32)) == 0


def test_sums_are_taken_in_fp64_over_all_blocks() -> None:
    """In fp32 the ones would be lost beside 2**24; a rest shorter than a block counts as well."""
    values = np.ones(2 * BLOCK + 3, np.float32)
    values[0] = 2**14
    assert squared_norm(values) == 2**28 + 2 * BLOCK + 2
    assert inner_product(values, values) == squared_norm(values)
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
