"""What is fed: examples that are whole, and the door that damaged ones come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared import wire
from shared.codecs import codec_names, get_codec
from shared.config import load_federation, load_site
from shared.delta_file import DeltaHeader, check_delta, write_delta
from shared.errors import ConfigError, DecodeError, DeltaRefusedError, LedgerDamagedError
from shared.ledger import Ledger
from shared.records import ClosingRecord, FinishedRecord, OpenedRecord
from shared.tensors import TensorFile, TensorLayout, write_tensors
from tests.numpy_learner import MANIFEST
from tests.shared.test_wire import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.manifest import TensorSpec

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
    """``feed`` takes damaged bytes; only an error of ``allowed`` may come out of it."""

    examples: list[bytes]
    feed: Callable[[bytes], object]
    allowed: type[Exception]

    def holds(self, data: bytes) -> bool:
        """Whether these bytes are taken, or refused by an error that is meant."""
        try:
            self.feed(data)
        except self.allowed:
            return True
        except Exception:  # noqa: BLE001 - whatever else comes out is what is looked for
            return False
        return True


class OneObject:
    """A store that answers every question with the same bytes."""

    def __init__(self) -> None:
        self.data = b""

    def get(self, _key: str) -> bytes:
        """Whatever it was given."""
        return self.data


HEADERS = [
    DeltaHeader(
        run="night",
        round=1,
        site="a",
        source_sha="0" * 64,
        codec=name,
        codec_version=get_codec(name).version,
    )
    for name in codec_names()
]


def deltas(file: Path) -> list[bytes]:
    """One whole delta of each codec."""

    def values(spec: TensorSpec) -> NDArray[np.float32]:
        count = int(np.prod(spec.shape))
        return np.linspace(-1, 1, count, dtype=np.float32).reshape(spec.shape)

    found = []
    for header in HEADERS:
        write_delta(file, MANIFEST, header.codec, header, values, seed=1)
        found.append(file.read_bytes())
    return found


def check(path: Path) -> None:
    """As the coordinator does, whichever codec it expects."""
    for header in HEADERS:
        try:
            check_delta(path, MANIFEST, header, max_norm=10.0)
        except DeltaRefusedError:
            continue


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
    write_tensors(file, layouts, values, {"format": "pt"})
    tensors = file.read_bytes()
    store = OneObject()
    ledger = Ledger(store, "night", "reader", lambda: 0.0)  # type: ignore[arg-type]

    def read_records(data: bytes) -> None:
        store.data = data
        for kind in (ClosingRecord, FinishedRecord, OpenedRecord):
            try:
                ledger.read(kind, "runs/night/any.json")
            except LedgerDamagedError:
                continue

    record = b'{"run":"night","round":1,"sha":"' + b"a" * 64 + b'","inputs":[],"at":1.5}'
    return {
        "wire": Target([wire.encode(event, 0.0) for event in EXAMPLES], wire.decode, DecodeError),
        "tensors": Target([tensors], from_file(read_tensors), DecodeError),
        "deltas": Target(deltas(file), from_file(check), DeltaRefusedError),
        "federation": Target([FEDERATION.encode()], from_file(load_federation), ConfigError),
        "site": Target([SITE.encode()], from_file(load_site), ConfigError),
        "records": Target([record], read_records, LedgerDamagedError),
    }
