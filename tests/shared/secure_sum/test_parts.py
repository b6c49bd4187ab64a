"""Rings, masks, keys, shares and levels: each against vectors of its standard or by hand."""

from __future__ import annotations

import hashlib
import hmac
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, DecodeError, ProtocolError
from shared.secure_sum import shamir
from shared.secure_sum.cohort import Attempt
from shared.secure_sum.exchange import ExchangeKey
from shared.secure_sum.masks import Keystream
from shared.secure_sum.quantise import mean_of, next_reach, quantise, step_of
from shared.secure_sum.ring import Ring, ring_for
from shared.secure_sum.said import commitment

ATTEMPT = Attempt("run", 7, 1)


# Ring --------------------------------------------------------------------------------------------


@given(
    bits=st.integers(1, 32),
    values=st.lists(st.integers(0, 2**32 - 1), max_size=40),
)
def test_what_is_packed_is_unpacked(bits, values):
    """Every width, every length: the same words, in the bytes that were promised, bit by bit."""
    ring = Ring(bits)
    words = (np.array(values, np.uint64) & np.uint64(2**bits - 1)).astype(ring.word)
    packed, wanted = ring.pack(words), b""
    for shift in range(0, bits, 8):
        width = min(8, bits - shift)
        fields = [(int(word) >> shift) % 2**width for word in words]
        joined = sum(field << width * place for place, field in enumerate(fields))
        wanted += joined.to_bytes(
            width * -(-len(values) // 8) if width < 8 else len(values), "little"
        )
    assert packed.tobytes() == wanted
    assert packed.size == ring.packed_bytes(len(values))
    assert np.array_equal(ring.unpack(packed, len(values)), words)


def test_eleven_bits_are_packed_as_the_docstring_says():
    """Lowest bytes first; then three bits of eight numbers in three bytes, the first lowest."""
    words = np.array([0x7FF, 0x001, 0x200], np.uint16)
    assert Ring(11).pack(words).tobytes().hex() == "ff0100" + "870000"


def test_too_few_bytes_are_refused():
    """Whatever is in as many as are needed stands for words, so that no vector stops a sum."""
    with pytest.raises(DecodeError, match="expected 6 bytes"):
        Ring(11).unpack(np.frombuffer(b"\x01\x02\x03\x00", np.uint8), 3)
    words = Ring(11).unpack(np.frombuffer(b"\xff" * 6, np.uint8), 3)
    assert words.tolist() == [2047] * 3


@pytest.mark.parametrize(
    ("cohort", "levels", "weight", "bits"),
    [(5, 127, 1, 11), (100, 127, 1, 15), (5, 3, 1, 5), (100, 7, 1, 11), (3, 7, 10, 9)],
)
def test_a_ring_holds_the_largest_sum_and_no_bit_more(cohort, levels, weight, bits):
    """The smallest k with 2 K L w + 1 <= 2**k."""
    ring, largest = ring_for(cohort, levels, weight), cohort * levels * weight
    assert ring.bits == bits
    assert 2 ** (bits - 1) < 2 * largest + 1 <= 2**bits
    both = np.array([largest, -largest])
    assert np.array_equal(ring.recentre(ring.encode(both)), both)


def test_a_sum_beyond_a_word_is_refused():
    """And says what to do."""
    with pytest.raises(ConfigError, match="coarser codec"):
        ring_for(1000, 2**31)


# Masks -------------------------------------------------------------------------------------------


def test_a_mask_is_the_keystream_of_rfc_8439():
    """Appendix A.1, test vector 1: key, nonce and counter 0; then words, then their negative."""
    words = np.zeros(16, np.uint32)
    Keystream(bytes(32)).add_to(words)
    assert words.tobytes().hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    Keystream(bytes(32)).add_to(words, minus=True)
    assert not words.any()


def test_a_mask_is_one_stream_however_it_is_cut():
    """Tensor by tensor or as a whole, and over more than one piece of it."""
    whole = np.zeros(200_003, np.uint16)
    Keystream(b"s" * 32).add_to(whole)
    parts, stream = np.zeros_like(whole), Keystream(b"s" * 32)
    for begin, end in itertools.pairwise([0, 1, 8, 70_001, 70_001, 200_003]):
        stream.add_to(parts[begin:end])
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("bits", [5, 11, 15])
@pytest.mark.parametrize("value", [0, -1, 3])
def test_a_masked_vector_is_uniform_over_the_whole_ring(bits, value):
    """Chi-square over all 2**k words, whatever was masked: within five standard deviations."""
    ring, count = Ring(bits), 64 << bits
    words = ring.encode(np.full(count, value))
    Keystream(hashlib.sha256(bytes([bits])).digest()).add_to(words)
    seen = np.bincount(ring.reduce(words), minlength=1 << bits)
    assert seen.size == 1 << bits
    statistic = ((seen - 64) ** 2 / 64).sum()
    freedom = (1 << bits) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_seed_has_256_bits():
    """No other length is taken."""
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(b"x" * 16)


# Keys --------------------------------------------------------------------------------------------


def _expand(secret: bytes, about: bytes) -> bytes:
    """HKDF-Expand for 32 bytes (RFC 5869, 2.3): one block."""
    return hmac.digest(secret, about + b"\x01", "sha256")


def test_two_sites_share_what_rfc_7748_and_rfc_5869_say():
    """Bob's key and Alice's public one of section 6.1; then HKDF written out with HMAC."""
    bob = ExchangeKey(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    alice = "x25519:hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo"
    assert bob.public == "x25519:3p7bfXt9wbTTW2HC7OQ1Nz-DQ8hbeGdNrfx-FG-IK08"
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    extracted = hmac.digest(bytes(32), shared, "sha256")
    names = f'["pair","run","{bob.public}","{alice}"]'.encode()
    secret = _expand(extracted, b"gradualdiff/1/secure-sum/" + names)
    mask_key = _expand(secret, b'gradualdiff/1/secure-sum/["mask","run",7,1]')
    assert bob.pair(alice, "run").mask_key(ATTEMPT) == mask_key


def test_both_ends_share_a_secret_of_one_run_one_round_and_one_attempt():
    """A mask key that was revealed opens nothing else."""
    one, other = ExchangeKey.generate(), ExchangeKey.generate()
    pair = one.pair(other.public, "run")
    assert pair.mask_key(ATTEMPT) == other.pair(one.public, "run").mask_key(ATTEMPT)
    keys = {
        key.pair(other.public, run).mask_key(Attempt(run, number, attempt))
        for key, run, number, attempt in itertools.product(
            (one, ExchangeKey.generate()), ("run", "other"), (7, 8), (1, 2)
        )
    }
    assert len(keys) == 16
    assert "secret" not in repr(pair)
    assert one.raw.hex() not in repr(one)


@pytest.mark.parametrize("text", ["x25519:" + "A" * 43, "x25519:short", "ed25519:" + "A" * 43, ""])
def test_a_public_key_that_gives_no_secret_is_refused(text):
    """A point of small order makes a secret that everybody knows."""
    with pytest.raises(ProtocolError, match="exchange key"):
        ExchangeKey.generate().pair(text, "run")


def test_shares_are_read_by_whom_they_are_for_and_as_what_they_are():
    """Another sender, receiver, vector, round or attempt, or another byte: refused."""
    one, other = ExchangeKey.generate(), ExchangeKey.generate()
    here, there = one.pair(other.public, "run"), other.pair(one.public, "run")
    sealed = here.seal(b"shares", ATTEMPT, "a", "b", "f" * 64)
    assert there.unseal(sealed, ATTEMPT, "a", "b", "f" * 64) == b"shares"
    assert here.seal(b"shares", ATTEMPT, "a", "b", "f" * 64) != sealed
    for altered in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:20], b""):
        with pytest.raises(ProtocolError, match="shares of a for b"):
            there.unseal(altered, ATTEMPT, "a", "b", "f" * 64)
    for about in (
        (ATTEMPT, "b", "a", "f" * 64),
        (ATTEMPT, "a", "b", "e" * 64),
        (Attempt("run", 8, 1), "a", "b", "f" * 64),
        (Attempt("run", 7, 2), "a", "b", "f" * 64),
        (Attempt("other", 7, 1), "a", "b", "f" * 64),
    ):
        with pytest.raises(ProtocolError, match="shares of"):
            there.unseal(sealed, *about)


def test_a_commitment_tells_seeds_apart():
    """By sha256."""
    digest = hashlib.sha256(b"gradualdiff/1/secure-sum/seed\0" + bytes(32)).hexdigest()
    assert commitment(bytes(32)) == digest


# Shares ------------------------------------------------------------------------------------------


def _product(one: int, other: int) -> int:
    """In GF(2**8), bit by bit: FIPS 197, 4.2."""
    total = 0
    while other:
        total ^= one if other & 1 else 0
        one, other = (one << 1) ^ (0x11B if one & 0x80 else 0), other >> 1
    return total


def test_shares_are_values_of_the_polynomial():
    """FIPS 197's {57} x {83} = {c1}; then f(x) = 42 + 57 x + 83 x**2, term by term."""
    assert _product(0x57, 0x83) == 0xC1
    shares = shamir.split(b"\x42", 3, 255, draw=lambda size: b"\x83\x57"[:size])
    for x, share in enumerate(shares, start=1):
        assert share[0] == 0x42 ^ _product(0x57, x) ^ _product(0x83, _product(x, x))
    assert shares[0].hex() == "96"


@given(data=st.data(), secret=st.binary(min_size=1, max_size=64), holders=st.integers(1, 40))
def test_any_threshold_of_the_shares_gives_the_secret(data, secret, holders):
    """Whichever they are, in whatever order."""
    threshold = data.draw(st.integers(1, holders))
    shares = dict(enumerate(shamir.split(secret, threshold, holders), start=1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert shamir.join({holder: shares[holder] for holder in chosen}) == secret


def test_one_share_fewer_goes_with_every_secret():
    """For two shares of three there is one polynomial for each of the 256 secrets."""
    shares = shamir.split(b"\x42", 3, 5)
    held = {2: shares[1], 5: shares[4]}
    secrets = {shamir.join({**held, 1: bytes([guess])}) for guess in range(256)}
    assert len(secrets) == 256


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (4, 3), (2, 256)])
def test_a_threshold_that_nobody_reaches_is_refused(threshold, holders):
    """Nor is there a holder 256 in a field of 256."""
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(b"s", threshold, holders)


# Levels ------------------------------------------------------------------------------------------


def test_values_become_levels_of_a_public_scale():
    """By hand: reach 1, 4 levels, step 1/4; half to even; clipped at the reach."""
    step = step_of(1.0, 4)
    values = np.array([-0.1, 0.125, 0.375, -0.26, 0.9, 5.0, -3e38], np.float32)
    sent = np.full_like(values, np.nan)
    assert quantise(values, step, 4, sent).tolist() == [0, 0, 2, -1, 4, 4, -4]
    assert sent.tolist() == [0, 0, 0.5, -0.25, 1, 1, -1]
    assert not np.signbit(sent[:2]).any()  # -0.1 stands for 0.0, as 0.1 does


def test_a_mean_of_levels_weighs_them():
    """(3 x 2 + 1 x -4) / 4 of a step of 1/4."""
    total = np.array([3 * 2 + 1 * -4])
    assert mean_of(total, np.float32(0.25), 4).tolist() == [0.125]


def test_a_reach_follows_what_was_summed():
    """1.5 sqrt(K) times the largest of the mean; a quarter after a sum of zeros; never no step."""
    assert next_reach(1.0, 4, peak=8, weight=4, cohort=4) == 1.5 * 2 * 0.5
    assert next_reach(1.0, 4, peak=0, weight=4, cohort=4) == 0.25
    assert step_of(0.0, 4) > 0
