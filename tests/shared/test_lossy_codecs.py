"""``int4``, ``sign`` and ``topk``: bytes by hand, error bounds, hostile parts; ``int8`` in fp32."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from shared import modes
from shared.errors import ConfigError, DecodeError
from shared.protocol.manifest import TensorSpec
from shared.tensors import packing
from shared.tensors.arithmetic import is_finite
from shared.tensors.codecs import get_codec
from tests import federations

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = nps.arrays(np.float32, st.integers(1, 700), elements=FINITE)
# zstd's bytes are those of the release in constraints.txt: another digest means another version.
GOLDEN = {"int4": "92de68fed8dfc2ce", "sign": "78662874e5cc31e5", "topk": "3d9499f738171a4b"}
SINES = np.sin(np.arange(9000, dtype=np.float64)).astype(np.float32)


def spec_of(count: int) -> TensorSpec:
    return TensorSpec(name="w", shape=(count,), init="zeros")


def encoded(name: str, values: Any) -> Any:
    return get_codec(name).encode(spec_of(values.size), values, 1)


def decoded(name: str, count: int, *parts: Any) -> Any:
    return get_codec(name).decode(spec_of(count), parts)


def there_and_back(name: str, values: Any) -> Any:
    return decoded(name, values.size, *encoded(name, values))


def frame(data: bytes) -> Any:
    return np.frombuffer(zstandard.ZstdCompressor().compress(data), np.uint8)


def bfloat16(*values: float) -> Any:
    return np.array(values, ml_dtypes.bfloat16).view(np.uint8)


def test_int4_gives_the_numbers_worked_out_by_hand() -> None:
    """Magnitude 7 makes the scale 1, halves go to even, and q + 8 stands two a byte."""
    (part,) = encoded("int4", np.float32([7, 0.5, 1.5, -2.5, -7]))
    scale, rest = part[:2].view(ml_dtypes.bfloat16), part[2:]
    assert scale.tolist() == [1]
    assert zstandard.decompress(rest.tobytes()) == bytes([0x8F, 0x6A, 0x81])
    assert decoded("int4", 5, part).tolist() == [7, 0, 2, -2, -7]


@given(VALUES)
def test_int4_keeps_its_bound(values: Any) -> None:
    """The error is at most half a scale: m / 14 * (1 + 2**-7), or 2**-134 near zero."""
    error = np.abs(there_and_back("int4", values).astype(np.float64) - values)
    for start in range(0, values.size, 256):
        m = float(np.abs(values[start : start + 256]).max())
        bound = max(m / 14 * (1 + 2**-7), m / 14 + 2.0**-134)
        assert error[start : start + 256].max() <= bound


def test_sign_gives_the_numbers_worked_out_by_hand() -> None:
    """Mean magnitude 2; zeros, minus zero too, count as plus; the first is in the lowest bit."""
    bits, scales = encoded("sign", np.float32([6, -2, 0, -0.0, -2]))
    assert bits.tolist() == [0b10010]
    assert scales.astype(np.float32).tolist() == [2]
    assert decoded("sign", 5, bits, scales).tolist() == [2, -2, 2, 2, -2]


@given(VALUES)
def test_sign_is_the_mean_magnitude_of_its_block(values: Any) -> None:
    """Within bfloat16's rounding, 2**-8, and no more than 2**-134 near zero."""
    got = there_and_back("sign", values)
    for start in range(0, values.size, 256):
        block = values[start : start + 256].astype(np.float64)
        mean = np.abs(block).mean()
        off = np.abs(got[start : start + 256] - np.where(block < 0, -mean, mean))
        assert off.max() <= max(mean * 2.0**-8 * (1 + 1e-9), 2.0**-134)


def test_topk_gives_the_numbers_worked_out_by_hand() -> None:
    """Three of 130 values: 8 is above their mean 4, and 3 and 1 come back as 2."""
    values = np.zeros(130, np.float32)
    values[[0, 5, 129]] = [1, -8, 3]
    (part,) = encoded("topk", values)
    assert part[:4].view(ml_dtypes.bfloat16).tolist() == [2, 8]
    assert part[4] == 0b00_11_00
    assert zstandard.decompress(part[5:].tobytes()) == bytes([0, 4, 123])
    got = decoded("topk", 130, part)
    assert {i: got[i] for i in np.flatnonzero(got)} == {0: 2, 5: -8, 129: 2}


def test_topk_takes_the_first_of_equal_ones_and_skips_far() -> None:
    """Of equal values the first 64; a gap of 4,095 + 3,000 is 27 bytes of 255 and one more."""
    assert np.flatnonzero(there_and_back("topk", np.ones(5000, np.float32))).tolist() == [
        *range(64),
        *range(4096, 4096 + 15),
    ]
    values = np.zeros(8192, np.float32)
    values[:64] = values[7168 : 7168 + 64] = 2
    (part,) = encoded("topk", values)
    gaps = zstandard.decompress(part[8 + 32 :].tobytes())
    assert gaps == b"\0" * 64 + b"\xff" * 27 + bytes([7168 - 64 - 27 * 255]) + b"\0" * 63
    assert decoded("topk", 8192, part).tolist() == values.tolist()


@given(nps.arrays(np.float32, st.integers(1, 9000), elements=FINITE, fill=FINITE))
def test_topk_sends_the_largest_and_stays_between_them(values: Any) -> None:
    """None left out is larger than one sent; what comes back has its sign and is among them."""
    got = there_and_back("topk", values)
    for start in range(0, values.size, 4096):
        block, back = values[start : start + 4096], got[start : start + 4096]
        sent, count = np.flatnonzero(back), -(-block.size // 64)
        largest = np.sort(np.abs(block))[-count:]
        assert sent.size <= count
        assert np.all(np.sign(back[sent]) == np.where(block[sent] < 0, -1, 1))
        assert np.all(np.abs(block[sent]) >= largest[0])
        sizes = np.abs(back[sent])
        assert np.all(sizes <= largest[-1] * (1 + 2.0**-8) + 2.0**-134)
        if largest[0] > 2.0**-120:
            assert sent.size == count
            assert np.all(sizes >= largest[0] * (1 - 2.0**-8))


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_kept(name: str) -> None:
    """A change of them is a new version of the codec."""
    data = b"".join(part.tobytes() for part in encoded(name, SINES))
    assert hashlib.sha256(data).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", ["bf16", "int8", *GOLDEN])
@pytest.mark.parametrize("count", [1, 3, 255, 257, 2**16, 2**16 + 1, 2 * 2**16 - 1])
def test_any_number_of_values(name: str, count: int) -> None:
    """One, odd ones, and where pieces meet; minus zero and zero are one value."""
    values = np.resize(SINES, count)
    got = there_and_back(name, values)
    assert got.shape == (count,)
    error = np.square(got - values, dtype=np.float64).sum()
    assert error <= np.square(values, dtype=np.float64).sum()
    zeros = np.zeros(count, np.float32)
    assert not there_and_back(name, zeros).any()
    first, second = encoded(name, -zeros), encoded(name, zeros)
    if name != "bf16":
        assert [part.tobytes() for part in first] == [part.tobytes() for part in second]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 1e30, 2.0**127])
def test_extreme_values(name: str, value: float) -> None:
    """The smallest and the largest come back finite, and none larger than it went in."""
    values = np.float32([value, -value, 0, value / 2] * 100)
    got = there_and_back(name, values)
    assert is_finite(got)
    assert np.abs(got).max() <= value * (1 + 2.0**-7) + 7 * 2.0**-133


def test_the_largest_numbers_do_not_overflow_a_mean() -> None:
    """fp32's largest is above bfloat16's: a mean stays there."""
    values = np.full(300, np.finfo(np.float32).max)
    for name in ("sign", "topk"):
        assert is_finite(there_and_back(name, values))


def reference_int8(values: Any) -> tuple[bytes, bytes]:
    """Version 1 as it was first written: every quotient in fp64."""
    rows = np.pad(values, (0, -values.size % 256)).reshape(-1, 256)
    scales = packing.rounded_up(np.abs(rows).max(axis=1).astype(np.float64) / 127)
    divisors = np.where(scales == 0, 1, scales).astype(np.float64)
    whole = np.rint(rows / divisors[:, np.newaxis]).astype(np.int8)
    return whole.reshape(-1)[: values.size].tobytes(), scales.tobytes()


def next_to_halves(scale: np.float32) -> Any:
    """Every (q + 1/2) s of the scale, and the fp32 numbers on both sides of it."""
    halves = (np.arange(-127, 127) + 0.5).astype(np.float32) * scale
    near = [np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))]
    return np.concatenate([halves, *near])


def test_int8_in_fp32_gives_the_bytes_of_fp64() -> None:
    """Where it could fail: at halves and next to them, for each of 128 mantissas of a scale."""
    mantissas = 1 + np.arange(128, dtype=np.float64) / 128
    for exponent in (-133, -130, -127, -126, -125, -100, -1, 0, 1, 60, 118):
        scales = (mantissas * 2.0**exponent).astype(ml_dtypes.bfloat16).astype(np.float32)
        blocks = []
        for scale in scales[scales > 0]:
            near, top = next_to_halves(scale), np.float32(127) * scale
            blocks += [np.resize([top, *near[start:]], 256) for start in range(0, near.size, 255)]
        values = np.concatenate(blocks, dtype=np.float32)
        got = encoded("int8", values)
        assert tuple(part.tobytes() for part in got) == reference_int8(values)


def test_int8_in_fp32_gives_the_bytes_of_fp64_on_any_bits() -> None:
    """A million values drawn from all bit patterns of finite fp32, and as many normal ones."""
    stream = np.random.Generator(np.random.Philox(5))
    bits = stream.integers(0, 2**32, 2**20, np.uint32).view(np.float32)
    bits[~np.isfinite(bits)] = 0
    normal = stream.standard_normal(2**20).astype(np.float32)
    for values in (bits, np.sort(bits), normal, normal * np.float32(1e-38)):
        got = encoded("int8", values)
        assert tuple(part.tobytes() for part in got) == reference_int8(values)


@pytest.mark.parametrize("size", [0, 1, 255, 4096, 2**17, 2**17 + 1, 10**6])
def test_a_frame_is_never_longer_than_its_bound(size: int) -> None:
    """Random bytes do not become fewer; what comes back is what went in."""
    data = np.random.Generator(np.random.Philox(size)).integers(0, 256, size, np.uint8)
    made = packing.to_frame(data)
    assert made.size <= packing.frame_bound(size)
    assert packing.from_frame(made, 0, size).tobytes() == data.tobytes()


SCALE, LEVELS = bfloat16(1), bfloat16(1, 2)
HOSTILE = {
    "a frame of more than there is": ("int4", 4, [SCALE, frame(b"\x88" * 3)], "expected 2 bytes"),
    "a bomb": ("int4", 4, [SCALE, frame(b"\0" * 10**8)], "in it, got 100000000"),
    "no frame": ("int4", 4, [SCALE, np.zeros(9, np.uint8)], "expected a whole one"),
    "half a frame": ("int4", 4, [SCALE, frame(b"\x88\x88")[:-1]], "expected a whole one"),
    "more after it": ("int4", 4, [SCALE, frame(b"\x88\x88"), SCALE], "expected a whole one"),
    "too short": ("int4", 300, [SCALE], "at least 4 bytes, got 2"),
    "too few positions": ("topk", 65, [LEVELS, SCALE[:1], frame(b"\1\xff")], "expected 2 whole"),
    "one that never ends": ("topk", 300, [LEVELS, SCALE, frame(b"\1" * 5 + b"\xff")], "expected 5"),
    "beyond the end": ("topk", 65, [LEVELS, SCALE[:1], frame(b"\x3f\1")], "expected 64 in every"),
    "in another chunk": (
        "topk", 4160, [LEVELS, LEVELS, np.zeros(17, np.uint8), frame(b"\0" * 65)], "in every 4096",
    ),
    "a level": ("topk", 64, [bfloat16(1, np.inf), SCALE[:1], frame(b"\0")], "expected finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_part_is_a_decode_error(case: str) -> None:
    """None is believed."""
    name, count, parts, said = HOSTILE[case]
    with pytest.raises(DecodeError, match=said):
        decoded(name, count, np.concatenate(parts))


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_bad_scale_shows_in_every_value(scale: float) -> None:
    """Also where every q is 0; and a q that no encoder writes does."""
    packed = frame(b"\x88\x88")
    assert not np.isfinite(decoded("int4", 4, np.append(bfloat16(scale), packed))).any()
    bits = np.zeros(1, np.uint8)
    assert not np.isfinite(decoded("sign", 4, bits, np.array([scale], ml_dtypes.bfloat16))).any()
    got = decoded("int4", 4, np.append(SCALE, frame(b"\x80\x88")))
    assert np.isnan(got).tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["sign", "topk"])
def test_what_is_of_use_only_with_feedback_is_refused_without(name: str) -> None:
    """And where the mode makes the factors anew, so that nothing can be sent later."""
    with pytest.raises(ConfigError, match=f'codec.feedback is false, but codec.name = "{name}"'):
        federations.config(codec={"name": name, "feedback": False})
    with pytest.raises(ConfigError, match=r'aggregation.averaging = "svd" makes the adapter anew'):
        federations.config(codec={"name": name}, aggregation={"averaging": "svd"})
    assert federations.config(codec={"name": name}).codec.feedback


def test_topk_goes_with_no_rule_that_takes_the_middle() -> None:
    """Of mostly zeros it is zero."""
    for rule in modes.names("rules"):
        if not modes.get("rules", rule).by_coordinate:
            continue
        with pytest.raises(ConfigError, match=f'aggregation.rule = "{rule}" judges each value'):
            federations.config(codec={"name": "topk"}, aggregation={"rule": rule})
