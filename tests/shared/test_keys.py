"""Signing keys: what a signature binds, and what a key file must be."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, SignatureError
from shared.trust.keys import SIGNATURE_BYTES, PublicKey, SigningKey

KEY = SigningKey.generate()


def test_rfc_8032_gives_this_public_key():
    """Test 1 of RFC 8032, section 7.1."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public.text == "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
    assert key.public.fingerprint == "21fe 31df a154 a261 626b f854 046f d227"


@given(data=st.binary(max_size=200), at=st.integers(0, 10_000))
def test_a_signature_fits_its_bytes_its_purpose_and_its_key_only(data, at):
    """One flipped bit of data or signature, another purpose or another key: refused."""
    signature = KEY.sign("event", data)
    assert len(signature) == SIGNATURE_BYTES
    KEY.public.verify("event", signature, data)
    bit = at % (8 * SIGNATURE_BYTES)
    bad = bytearray(signature)
    bad[bit // 8] ^= 1 << bit % 8
    for public, purpose, given_signature, given_data in (
        (KEY.public, "link", signature, data),
        (KEY.public, "event", bytes(bad), data),
        (KEY.public, "event", signature, data + b"x"),
        (KEY.public, "event", b"", data),
        (SigningKey.generate().public, "event", signature, data),
    ):
        with pytest.raises(SignatureError, match="altered, or somebody else"):
            public.verify(purpose, given_signature, given_data)


def test_a_saved_key_comes_back_and_is_its_owners_alone(tmp_path):
    """Mode 0600; a second save to the same place changes nothing."""
    path = tmp_path / "identity.key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path, "trust.key_file").public == KEY.public
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        SigningKey.generate().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity.key"]


def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "identity.key"
    KEY.save(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640; chmod 600"):
        SigningKey.load(path, "trust.key_file")


def test_a_key_that_systemd_hands_over_is_the_services_alone(tmp_path, monkeypatch):
    """Its mode may show a group, the mask of an access list; all users may read it nowhere."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "handed"))
    for folder in ("handed", "elsewhere"):
        (tmp_path / folder).mkdir()
        KEY.save(tmp_path / folder / "key")
        (tmp_path / folder / "key").chmod(0o440)
    handed = tmp_path / "handed" / "key"
    assert SigningKey.load(handed, "trust.key_file").public == KEY.public
    handed.chmod(0o444)
    for path, mode in ((handed, "0404"), (tmp_path / "elsewhere" / "key", "0440")):
        with pytest.raises(ConfigError, match=f"mode {mode}"):
            SigningKey.load(path, "trust.key_file")


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key_is_named_by_its_setting(tmp_path, content):
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="expected an Ed25519"):
        SigningKey.load(path, "trust.key_file")
    with pytest.raises(ConfigError, match="No such file"):
        SigningKey.load(tmp_path / "nowhere", "trust.key_file")


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:" + "A" * 42, "rsa:" + "A" * 43])
def test_a_text_that_is_no_public_key_is_refused(text):
    with pytest.raises(ConfigError, match="expected ed25519:"):
        PublicKey(text)


def test_the_private_half_is_never_in_words():
    assert repr(KEY) == f"SigningKey({KEY.public.text})"
