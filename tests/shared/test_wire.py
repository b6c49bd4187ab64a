"""Events as bytes: what goes out comes back, and whatever else comes in is a DecodeError."""

from __future__ import annotations

import re
import types
import typing
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared.brokers.port import MAX_MESSAGE_BYTES
from shared.errors import DecodeError
from shared.protocol.bounds import Most
from shared.protocol.events import (
    EVENTS,
    AdapterEvaluated,
    CoordinatorTick,
    DeltaAnswered,
    DeltaSubmitted,
    Event,
    MessageRefused,
    ParticipantReady,
    RoundClosed,
    RoundStarted,
    RunAnnounced,
    RunDeclined,
    RunFinished,
    SiteOnline,
    SurvivorsSigned,
    TrainingFailed,
    TrainingProgressed,
    UnmaskAnswered,
    UnmaskRequested,
    UploadGranted,
    UploadRequested,
    WireBase,
    WireLora,
    WireTraining,
)
from shared.protocol.manifest import HeldOut, LocalMetrics, Manifest, Numerics, TensorSpec
from shared.protocol.secure import Revealed
from shared.protocol.wire import decode, encode

A, B = "a" * 64, "b" * 64
HELD_OUT = HeldOut(nll=3.5, tokens=100, examples=7)
TRAINING = WireTraining(local_steps=4, learning_rate=1e-3)

EXAMPLES = [
    RunAnnounced(
        run="r1",
        config_digest=A,
        base=WireBase(model="m", fingerprint=B),
        lora=WireLora(target_modules=("q_proj", "v_proj")),
        training=TRAINING,
        rounds=15,
        participants=5,
    ),
    RoundStarted(
        run="r1",
        round=3,
        source_sha=A,
        get_url="https://store/k?signature=00",
        expires_at=2e9,
        training=TRAINING,
        progress_from=0.2,
        progress_to=0.4,
        seed=2**63 - 1,
        codec="fp32",
        last_counted=B,
    ),
    UploadGranted(
        run="r1",
        round=3,
        sha=A,
        chunk_size=16 << 20,
        urls={0: "https://store/0", 4: "https://store/4"},
        expires_at=2e9,
    ),
    DeltaAnswered(run="r1", round=3, sha=A, verdict="refused", reason="norm: 9 > 1 ä"),
    RoundClosed(run="r1", round=3, result_sha=A),
    RunFinished(run="r1", round=3, sha=None, reason="no participants"),
    SiteOnline(run="r1", round=3),
    ParticipantReady(
        run="r1",
        config_digest=A,
        manifest=Manifest(
            tensors=(
                TensorSpec(name="a.lora_A", shape=(64, 576), init="kaiming_uniform"),
                TensorSpec(name="a.lora_B", shape=(576, 64), init="zeros"),
            ),
            target_modules=("q_proj",),
        ),
        fingerprint=B,
        numerics=Numerics(
            versions={},
            device="cpu",
            cpu_capability="AVX2",
            cpu_threads=2,
            compute_dtype="bfloat16",
        ),
        examples=12,
    ),
    RunDeclined(run="r1", reason="no"),
    UploadRequested(run="r1", round=3, sha=A, size=78_200_000),
    DeltaSubmitted(
        run="r1",
        round=3,
        source_sha=A,
        sha=B,
        size=78_200_000,
        examples=10,
        tokens=1000,
        metrics=LocalMetrics(
            steps=4,
            train_nll=4.5,
            first_step_nll=4.8,
            last_step_nll=4.2,
            mean_grad_norm=0.3,
            held_out=HELD_OUT,
            seconds={"training": 9.5},
        ),
        state="kept",
    ),
    TrainingFailed(run="r1", round=3, attempt=2, reason="out of memory", retryable=True),
    TrainingProgressed(
        run="r1", round=3, activity="train", step=2, of=4, seconds=3.5, tokens_per_second=99.5
    ),
    AdapterEvaluated(run="r1", round=3, sha=A, held_out=HELD_OUT),
    MessageRefused(run=None, queue="q", sender=None, reason="no event", data=b"\x00\xff"),
    UnmaskRequested(
        run="r1", round=3, survivors={"site-a": A, "site-b": B}, sealed={"site-b": "00ff"}
    ),
    UnmaskAnswered(
        run="r1", round=3, revealed=Revealed(own=A, keys={"site-c": B}, shares={"site-b": "00ff"})
    ),
    SurvivorsSigned(run="r1", round=3, signature="0f" * 64),
    CoordinatorTick(run="r1", writer="w", now=1.5),
]
TICK = EXAMPLES[-1]


def outer(event=TICK) -> dict[str, Any]:
    """An event's message, unpacked, to be altered."""
    unpacked = msgpack.unpackb(encode(event, 12.5, "id-1"), strict_map_key=False)
    assert isinstance(unpacked, dict)
    return unpacked


def refused(message: object) -> DecodeError:
    """The error that this message is refused with."""
    data = msgpack.packb(message)
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert caught.value.data == data
    return caught.value


def event_or_none(data: bytes) -> Event | None:
    """The event, or None when it is refused."""
    try:
        return decode(data).event
    except DecodeError:
        return None


def test_there_is_an_example_of_every_event():
    """So that the tests below leave none out; names and words are distinct."""
    assert [type(event).__name__ for event in EXAMPLES] == list(EVENTS)
    assert len({kind.word for kind in EVENTS.values()}) == len(EVENTS)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_went(event):
    """Equal, of the same type, with its id and time; twice the same bytes."""
    data = encode(event, 12.5, "id-1")
    envelope = decode(data)
    assert envelope.event == event
    assert type(envelope.event) is type(event)
    assert (envelope.id, envelope.time) == ("id-1", 12.5)
    assert encode(envelope.event, 12.5, "id-1") == data


def test_every_message_has_an_id_of_its_own():
    """Unless one is given."""
    assert decode(encode(TICK, 1.0)).id != decode(encode(TICK, 1.0)).id


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_unknown_field_is_ignored(event):
    """In the message and in the body: a newer program of the same version may say more."""
    message = outer(event)
    message["more"] = message["body"]["more"] = [1, {"x": None}]
    assert decode(msgpack.packb(message)).event == event


def test_a_setting_of_a_newer_release_is_ignored():
    """In the config's sections that travel, too."""
    message = outer(EXAMPLES[0])
    for section in ("base", "lora", "training"):
        message["body"][section]["from_the_future"] = 1
    assert decode(msgpack.packb(message)).event == EXAMPLES[0]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_a_missing_field_is_refused_by_name(event):
    """Each required field in turn."""
    for name, field in type(event).model_fields.items():
        message = outer(event)
        del message["body"][name]
        if field.is_required():
            assert f"{type(event).__name__}.{name}" in str(refused(message))
        else:
            decode(msgpack.packb(message))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_a_mistyped_field_is_refused_by_name(event):
    """No text for a number, no number for text: nothing is guessed."""
    for name, value in outer(event)["body"].items():
        message = outer(event)
        message["body"][name] = [[1.5]] if not isinstance(value, list) else "text"
        assert f"{type(event).__name__}.{name}" in str(refused(message))


@pytest.mark.parametrize(
    ("index", "name", "value"),
    [
        (4, "round", "3"),
        (4, "round", -1),
        (4, "round", 3.0),
        (4, "round", True),
        (4, "run", b"r1"),
        (4, "run", "../r1"),
        (4, "run", "r1\n"),
        (4, "result_sha", "A" * 64),
        (3, "verdict", "maybe"),
        (1, "expires_at", float("nan")),
        (1, "expires_at", float("inf")),
        (2, "chunk_size", 0),
        (2, "urls", {"0": "u"}),
        (9, "size", 0),
        (14, "data", "text"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(index, name, value):
    """Names and digests by their pattern, numbers by their range and their very type."""
    message = outer(EXAMPLES[index])
    message["body"][name] = value
    assert f"{message['type']}.{name}" in str(refused(message))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("v", 2, "expected version 1, got 2; update the older"),
        ("v", "1", "version"),
        ("v", True, "version"),
        ("v", None, "version"),
        ("v", [[]], "got list"),
        ("type", "Nonsense", "known event, got 'Nonsense'"),
        ("type", 7, "known event"),
        ("type", ["CoordinatorTick"], "known event, got list"),
        ("type", "Event", "known event"),
        ("id", 7, "text in id"),
        ("time", "noon", "number in time"),
        ("time", float("nan"), "number in time"),
        ("time", float("-inf"), "number in time"),
        ("body", None, "CoordinatorTick.body"),
        ("body", [], "CoordinatorTick.body"),
    ],
)
def test_a_wrong_envelope_is_refused(name, value, says):
    """Unknown version and type, and an envelope without id, time or body."""
    assert says in str(refused(outer() | {name: value}))
    message = outer()
    del message[name]
    refused(message)


@pytest.mark.parametrize("message", [None, 1, "text", b"bytes", [], [1, 2], {}, {1: 2}, {"v": 1}])
def test_what_is_no_envelope_is_refused(message):
    """Any other msgpack value."""
    refused(message)


def test_a_strangers_length_and_depth_stay_out_of_the_message():
    """The reason is logged and published: it must be short, and making it must not fail."""
    nested = b"\x91" * 1000 + b"\xc0"
    deep = msgpack.packb({"type": 0})[:-1] + nested
    assert msgpack.unpackb(deep)
    with pytest.raises(DecodeError) as caught:
        decode(deep)
    assert len(str(caught.value)) < 200
    long = "x" * 100_000
    assert len(str(refused(outer() | {"type": long}))) < 200
    granted = outer(EXAMPLES[2])
    granted["body"]["urls"] = {long: "u"}
    assert len(str(refused(granted))) < 300


def test_an_oversize_message_is_refused_on_both_ways():
    """The limit is in bytes, and bulk belongs into the store."""
    urls = dict.fromkeys(range(1_000), "u" * 2_000)
    with pytest.raises(DecodeError, match=f"at most {MAX_MESSAGE_BYTES} bytes"):
        encode(EXAMPLES[2].model_copy(update={"urls": urls}), 1.0)
    with pytest.raises(DecodeError, match=f"at most {MAX_MESSAGE_BYTES} bytes"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_a_truncated_message_is_refused(event):
    """At every length."""
    data = encode(event, 12.5, "id-1")
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            decode(data[:length])


@given(tail=st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_refused(tail):
    """One message, nothing behind it."""
    with pytest.raises(DecodeError):
        decode(encode(TICK, 12.5, "id-1") + tail)


@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    """And nothing but a DecodeError comes of them."""
    with pytest.raises(DecodeError):
        decode(data)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
def test_an_altered_message_decodes_or_is_refused(data):
    """Any value anywhere: an event that can be encoded again, or a DecodeError."""
    message = outer(data.draw(st.sampled_from(EXAMPLES)))
    where = data.draw(st.sampled_from([message, message["body"]]))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(VALUES)
    packed = msgpack.packb(message)
    event = event_or_none(packed)
    if event is not None:
        assert decode(encode(event, 1.0)).event == event


@given(data=st.data())
def test_a_flipped_byte_decodes_or_is_refused(data):
    """Nothing else escapes."""
    packed = bytearray(encode(data.draw(st.sampled_from(EXAMPLES)), 12.5, "id-1"))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    event_or_none(bytes(packed))


# Bounds ------------------------------------------------------------------------------------------


def loose(annotation, metadata=(), where=""):
    """Every text, bytes, list and map in a type that has no bound on its length, by its place."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return loose(inner, (*metadata, *more), where)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return [p for n, f in fields for p in loose(f.annotation, f.metadata, f"{where}.{n}")]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return []
    if origin in (typing.Union, types.UnionType):
        return [p for kind in arguments for p in loose(kind, metadata, where)]
    found = [] if is_bounded(metadata) else [where]
    if origin in (dict, tuple):
        return found + [p for a in arguments if a is not ... for p in loose(a, (), f"{where}[]")]
    assert annotation in (str, bytes, int, float, bool, type(None)), (where, annotation)
    return found if annotation in (str, bytes) else []


def is_bounded(metadata):
    """A maximum of ours or of pydantic's, or a pattern that has one."""
    for mark in metadata:
        if isinstance(mark, FieldInfo) and is_bounded(mark.metadata):
            return True
        pattern = getattr(mark, "pattern", None)
        if isinstance(mark, Most) or getattr(mark, "max_length", None) is not None:
            return True
        if pattern is not None and re.search(r"\{(1,)?\d+\}\$$", pattern):
            return True
    return False


@pytest.mark.parametrize("kind", EVENTS.values(), ids=EVENTS)
def test_everything_in_an_event_has_a_bound(kind):
    """Whoever adds a text, a list or a map says how long it may be."""
    assert loose(kind, where=kind.__name__) == []


def test_a_field_without_a_bound_is_found():
    """By its place, in whatever it is nested."""

    class Careless(Event):
        word = "careless"
        note: str | None
        names: Annotated[dict[int, tuple[str, ...]], Most(3)]

    assert loose(Careless, where="Careless") == [
        "Careless.note",
        "Careless.names[]",
        "Careless.names[][]",
    ]


def longer(value):
    """The same kind of value, far too long."""
    match value:
        case str():
            return "A" * 900_000
        case bytes():
            return bytes(1_000_000)
        case list() | tuple():
            return [*value] * 100_000
        case dict():
            key = next(iter(value), "key")
            keys = range(100_000) if isinstance(key, int) else map(str, range(100_000))
            return dict.fromkeys(keys, next(iter(value.values()), "text"))
    return None


def places(value, path=()):
    """Each value in a message's body with its way there."""
    yield path, value
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_what_is_far_too_long_is_cut_or_refused(event):
    """At every place of every event; what comes out can be sent on."""
    tried = 0
    for path, value in places(outer(event)["body"]):
        message, instead = outer(event), longer(value)
        if not path or instead is None:
            continue
        where = message["body"]
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = instead
        tried += 1
        found = event_or_none(msgpack.packb(message))
        assert found is None or len(encode(found, 1.0)) < 50_000
    assert tried or type(event) is CoordinatorTick


@pytest.mark.parametrize(
    ("index", "way", "value", "says"),
    [
        (
            7,
            ("numerics", "versions"),
            {str(n): "1" for n in range(101)},
            "at most 100 of them, got 101",
        ),
        (7, ("numerics", "device"), "cpu\x1b[2J", "printable"),
        (7, ("manifest", "target_modules"), ["\u202eproj"], "printable"),
        (10, ("metrics", "held_out", "nll"), -1.79e308, "-1 to 1e"),
        (10, ("metrics", "held_out", "nll"), 1.7e308, "-1 to 1e"),
        (10, ("metrics", "last_step_nll"), 1e300, "-1 to 1e"),
        (10, ("metrics", "held_out", "tokens"), 2**63, "got 9.2"),
        (10, ("tokens",), 2**64 - 1, "got 1.8"),
        (13, ("held_out", "nll"), -1.79e308, "-1 to 1e"),
    ],
)
def test_what_breaks_a_bound_is_refused_on_both_ways(index, way, value, says):
    """By the reader, and by a writer that would not be read."""
    message = outer(EXAMPLES[index])
    where = message["body"]
    for key in way[:-1]:
        where = where[key]
    where[way[-1]] = value
    error = refused(message)
    assert f"{message['type']}.{'.'.join(way)}" in str(error)
    assert says in str(error)
    lenient = type(EXAMPLES[index]).model_validate(message["body"])
    with pytest.raises(DecodeError, match=re.escape(says)):
        encode(lenient, 1.0)


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("x" * 3_000, "x" * 1_992 + " … (cut)"),
        ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),
        ("a\u202eb\u0085c\nd", r"a\u202eb\x85c\nd"),
        ("ä, 中文", "ä, 中文"),
    ],
)
def test_prose_is_printable_and_cut_wherever_it_comes_from(said, heard):
    """In an event that was read, and in one that this program makes."""
    message = outer(EXAMPLES[8])
    message["body"]["reason"] = said
    assert decode(msgpack.packb(message)).event.reason == heard
    assert RunDeclined(run="r1", reason=said).reason == heard
    assert RunDeclined(run="r1", reason=heard).reason == heard
