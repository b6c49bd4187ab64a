"""Signed messages: what opens, what is believed, and that no part can stand for another."""

from __future__ import annotations

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.announcing import announcement as announced
from participant.births import Births
from participant.workspace import Workspace
from shared.errors import DecodeError, SignatureError
from shared.protocol import wire
from shared.protocol.events import RoundClosed, RunDeclined, SiteOnline
from shared.protocol.hearing import hear_at_coordinator, hear_at_site
from shared.protocol.messages import Voice, to_coordinator, to_site
from shared.trust.keys import SigningKey
from shared.trust.seal import MOST_SEAL_BYTES, MOST_TEXT, opened, seal
from tests import federations

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
VOICE = Voice(KEY, "birth")
DECLINED = RunDeclined(run="r", reason="why")
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
DATA = wire.encode(DECLINED, 1.0, "id")


def test_what_is_sealed_comes_out_as_it_went_in():
    """Bytes, recipient, key and head; and the check says who."""
    for head in (None, "", "abc"):
        found = opened(seal(DATA, "a", "run:r", KEY, head), 10_000)
        assert (found.data, found.to, found.by, found.head) == (
            DATA,
            "run:r",
            KEY.public.text,
            head,
        )
        found.check("a", "run:r", KEY.public)


def test_a_seal_adds_no_more_than_it_says():
    """Whatever sender, recipient and head are."""
    longest = "x" * MOST_TEXT
    assert len(seal(DATA, "a", longest, KEY, longest)) <= len(DATA) + MOST_SEAL_BYTES


def test_no_bit_of_it_can_be_flipped():
    """Each makes it no signed message, or one that does not hold."""
    whole = seal(DATA, "a", "run:r", KEY, "h")
    for at in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found = opened(bytes(flipped), 10_000)
        except DecodeError:
            continue
        if found is None or found.by != KEY.public.text:
            continue
        with pytest.raises(SignatureError):
            found.check("a", "run:r", KEY.public)


@pytest.mark.parametrize(
    ("sender", "to", "head"),
    [("b", "run:r", "h"), ("a", "run:s", "h"), ("a", "run:r", None), ("ar", "un:r", "h")],
)
def test_no_part_stands_for_another(sender, to, head):
    """Who says it, to whom and the head are signed as such, and not only their bytes in a row."""
    found = opened(seal(DATA, sender, to, KEY, head), 10_000)
    mine = opened(seal(DATA, "a", "run:r", KEY, "h"), 10_000)
    assert found.signature != mine.signature
    with pytest.raises(SignatureError):
        type(mine)(DATA, "run:r", mine.by, found.signature, "h").check("a", "run:r", KEY.public)


@pytest.mark.parametrize(
    "change",
    [
        {"to": 1},
        {"by": b"x"},
        {"signature": b"short"},
        {"signature": "x" * 64},
        {"sealed": "text"},
        {"to": "x" * (MOST_TEXT + 1)},
        {"head": 3},
        {"more": 1},
        {"sealed": [1]},
    ],
)
def test_what_only_begins_like_one_does_not_open(change):
    """The bytes are kept, to be looked at."""
    outer = msgpack.unpackb(seal(DATA, "a", "run:r", KEY))
    whole = msgpack.packb(outer | change)
    with pytest.raises(DecodeError) as caught:
        opened(whole, 10_000)
    assert caught.value.data == whole


def test_a_long_one_is_not_even_read():
    """Nor is one without an end, or with something after it."""
    whole = seal(DATA, "a", "run:r", KEY)
    for message in (whole + b"x" * 10_000, whole[:-1], whole + b"x"):
        with pytest.raises(DecodeError):
            opened(message, 10_000)


def test_an_unsigned_message_has_no_seal():
    """It decodes as ever; a reader that demands no key takes the other as well."""
    assert opened(DATA, 10_000) is None
    assert wire.decode(DATA).seal is None
    sealed = wire.decode(seal(DATA, "a", "run:r", KEY))
    assert sealed.event == wire.decode(DATA).event
    assert sealed.event.said is None


def hear(message, *, site=None, births=None):
    """As the coordinator, or the site, hears it from a."""
    envelope = wire.decode(message.body)
    if site is not None:
        return hear_at_site(site, KEY.public, births)(envelope, "coordinator")
    return hear_at_coordinator(lambda _sender, _by: KEY.public, "birth")(envelope, "a")


def test_what_is_heard_brings_its_proof_along():
    """The event's own bytes, its recipient, key and signature; nothing of it travels."""
    event = hear(to_coordinator("a", DECLINED, 1.0, voice=VOICE))
    assert (event.said.by, event.said.to) == (KEY.public.text, "run:r:birth")
    event.said.seal().check("a", "run:r:birth", KEY.public)
    assert b"ed25519" not in wire.encode(event, 1.0)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (to_coordinator("a", SiteOnline(), 1.0), "got none"),
        (to_coordinator("b", SiteOnline(), 1.0, voice=VOICE), "expected one of"),
        (to_coordinator("a", SiteOnline(), 1.0, voice=Voice(OTHER)), "expected one of"),
        (to_coordinator("a", DECLINED, 1.0, voice=Voice(KEY, "old")), "got run:r:old"),
    ],
)
def test_a_coordinator_hears_only_what_its_sender_signed(message, why):
    """Unsigned, said by somebody else, or by another key."""
    with pytest.raises(SignatureError, match=why):
        hear(message)


CLOSED = RoundClosed(run="r", round=1, result_sha="0" * 64)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (to_site("n", CLOSED, 1.0), "got none"),
        (to_site("m", CLOSED, 1.0, VOICE), "to: expected site:n:birth, got site:m:birth"),
        (to_site("n", CLOSED, 1.0, Voice(OTHER, "birth")), "the key in trust.coordinator"),
        (to_site("n", CLOSED, 1.0, Voice(KEY, "old")), "got site:n:old"),
        (to_coordinator("coordinator", CLOSED, 1.0, voice=VOICE), "to: expected site:n:birth"),
    ],
)
def test_a_site_hears_only_what_its_coordinator_signed_for_it(message, why, tmp_path):
    """Unsigned, for another site, by another key, in another run, or for the coordinator itself."""
    births = Births(Workspace(tmp_path))
    births.announced("r", "birth")
    with pytest.raises(SignatureError, match=why):
        hear(message, site="n", births=births)


def announcement(birth, key=KEY):
    """The word with which a run begins at a site."""
    event = announced(federations.config("n", name="r"), "n")
    return to_site("n", event, 1.0, Voice(key, birth))


def test_a_run_that_was_displaced_by_another_of_its_name_is_over(tmp_path):
    """Also after a restart; and nobody without the key displaces one."""
    births = Births(Workspace(tmp_path))
    hear(announcement("old"), site="n", births=births)
    old = to_site("n", CLOSED, 1.0, Voice(KEY, "old"))
    assert hear(old, site="n", births=births).said.to == "site:n:old"
    with pytest.raises(SignatureError):
        hear(announcement("false", OTHER), site="n", births=births)
    for _ in range(2):
        hear(announcement("new"), site="n", births=births)
    births = Births(Workspace(tmp_path))
    for word, why in ((old, "got site:n:old"), (announcement("old"), "displaced")):
        with pytest.raises(SignatureError, match=why):
            hear(word, site="n", births=births)
    assert births.of("r") == "new"
    new = to_site("n", CLOSED, 1.0, Voice(KEY, "new"))
    assert hear(new, site="n", births=births).said.to == "site:n:new"
