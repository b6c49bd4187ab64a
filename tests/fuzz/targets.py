"""What is fed: examples that are whole, and the door that damaged ones come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared import modes
from shared.config import load_federation, load_site
from shared.errors import (
    ConfigError,
    DecodeError,
    DeltaRefusedError,
    GradualDiffError,
    LedgerDamagedError,
)
from shared.protocol import wire
from shared.protocol.manifest import TensorSpec
from shared.tensors.arithmetic import is_finite, squared_norm
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, check_delta, write_delta
from shared.tensors.packed_header import MARK, pack
from shared.tensors.packing import to_frame
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors
from shared.trust.keys import SigningKey
from shared.trust.seal import seal
from tests.fuzz import federations, operators, records, stores
from tests.numpy_learner import MANIFEST
from tests.shared.test_wire import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

FEDERATION = """
[run]
name = "night"
participants = ["a", "b"]
rounds = 3
[base]
model = "some/model"
[broker]
url = "amqps://coordinator@broker.example/v"
password_file = "secret"
[store]
directory = "store"
"""
SITE = """
[site]
name = "a"
[data]
path = "text.jsonl"
"""


@dataclass(frozen=True)
class Target:
    """``feed`` takes damaged bytes; only an error of ``allowed`` may come out of it.

    ``share``: the suite's inputs; the long script's are shared out in this proportion.
    """

    examples: list[bytes]
    feed: Callable[[bytes], object]
    allowed: type[Exception]
    share: int = 1000

    def holds(self, data: bytes) -> bool:
        """Whether these bytes are taken, or refused by an error that is meant."""
        try:
            self.feed(data)
        except self.allowed:
            return True
        except Exception:  # noqa: BLE001 - whatever else comes out is what is looked for
            return False
        return True


HEADERS = [
    DeltaHeader(
        run="night",
        round=1,
        site="a",
        source_sha="0" * 64,
        codec=name,
        codec_version=get_codec(name).version,
    )
    for name in modes.names("codecs")
]


def deltas(file: Path) -> list[bytes]:
    """Two whole deltas of each codec, one packed."""

    def values(spec: TensorSpec) -> NDArray[np.float32]:
        count = int(np.prod(spec.shape))
        return np.linspace(-1, 1, count, dtype=np.float32).reshape(spec.shape)

    found = []
    for header in HEADERS:
        for packed in (False, True):
            write_delta(file, MANIFEST, header.codec, header, values, seed=1, packed=packed)
            found.append(file.read_bytes())
    return found


def check(path: Path) -> None:
    """As the coordinator does, whichever codec it expects."""
    for header in HEADERS:
        try:
            check_delta(path, MANIFEST, header, max_norm=10.0)
        except DeltaRefusedError:
            continue


# Two chunks, many blocks, and a last byte that is not full.
SPEC = TensorSpec(name="x.lora_A.weight", shape=(3, 1387), init="zeros")
INSIDE = "-inside"  # a part that ends in a frame, with the frame's content in its place
FRAME = b"\nframe of\n"


def payloads() -> list[bytes]:
    """A whole tensor by each codec: its name, and the bytes of its parts."""
    values = np.linspace(-1, 1, SPEC.elements, dtype=np.float32).reshape(SPEC.shape)
    found = []
    for name in modes.names("codecs"):
        codec = get_codec(name)
        data = b"".join(part.tobytes() for part in codec.encode(SPEC, values, 1))
        found.append(b"%s\n%s" % (name.encode(), data))
        if any(layout.varies for layout in codec.layout(SPEC)):
            begin = data.index(zstandard.FRAME_HEADER)
            content = data[:begin] + FRAME + zstandard.decompress(data[begin:])
            found.append(b"%s%s\n%s" % (name.encode(), INSIDE.encode(), content))
    return found


def decode(data: bytes) -> None:
    """As a delta is read: parts of a size that may be, and that may hold anything."""
    word, _, payload = data.partition(b"\n")
    name = word.decode(errors="replace")
    if name.endswith(INSIDE):
        head, _, content = payload.partition(FRAME)
        payload = head + to_frame(np.frombuffer(content, np.uint8)).tobytes()
        name = name.removesuffix(INSIDE)
    if name not in modes.names("codecs"):
        return
    codec, parts, begin = get_codec(name), [], 0
    for layout in codec.layout(SPEC):
        end = begin + layout.size_bytes
        part = payload[begin:end]
        if not layout.varies:
            part = part.ljust(layout.size_bytes, b"\0")
        count = (len(part),) if layout.varies else layout.shape
        parts.append(np.frombuffer(part, layout.numpy_dtype).reshape(count))
        begin = end
    values = codec.decode(SPEC, parts)
    assert (values.dtype, values.shape) == (np.float32, SPEC.shape)
    if is_finite(values):
        squared_norm(values)


def targets(folder: Path) -> dict[str, Target]:
    """All of them, by name. ``folder``: for what is read from a file."""
    file = folder / "input"

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def feed(data: bytes) -> object:
            file.write_bytes(data)
            return read(file)

        return feed

    def read_tensors(path: Path) -> None:
        with TensorFile(path) as opened:
            for name in opened.layouts:
                opened.read(name)

    layouts = [TensorLayout("x.lora_A", "F32", (2, 3)), TensorLayout("x.lora_B", "I8", (4,))]
    values = [np.ones((2, 3), np.float32), np.ones(4, np.int8)]
    tensors = []
    for packed in (False, True):
        write_tensors(file, layouts, values, {"format": "pt"}, packed=packed)
        tensors.append(file.read_bytes())
    text = zstandard.decompress(tensors[1][tensors[1].index(zstandard.FRAME_HEADER) : -4])

    def read_header(data: bytes) -> None:
        file.write_bytes(MARK + bytes(28) + pack(data))
        read_tensors(file)

    messages = [wire.encode(event, 0.0) for event in EXAMPLES]
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    signed = [seal(message, "a", "run:test", key) for message in messages]
    return {
        "wire": Target(messages + signed, wire.decode, DecodeError),
        "tensors": Target(tensors, from_file(read_tensors), DecodeError),
        "headers": Target([text], read_header, DecodeError),
        "deltas": Target(deltas(file), from_file(check), DeltaRefusedError),
        "federation": Target([FEDERATION.encode()], from_file(load_federation), ConfigError),
        "site": Target([SITE.encode()], from_file(load_site), ConfigError),
        "codecs": Target(payloads(), decode, DecodeError),
        "federations": Target(
            federations.scripts(),
            lambda script: federations.disturb(folder / "federation", script),
            GradualDiffError,
            share=12,
        ),
        "stores": Target(
            stores.scripts(), lambda data: stores.feed(data, file), GradualDiffError, share=100
        ),
        "management": Target(operators.ANSWERS, operators.management, GradualDiffError),
        "accounts": Target(
            operators.ACCOUNTS + operators.STATUS, operators.accounts, LedgerDamagedError
        ),
        "keys": Target(operators.KEYS, lambda data: operators.keys(data, file), ConfigError),
        "records": Target(records.whole(), records.Reader().read, GradualDiffError),
    }
