"""A whole example of every record, and the ledger's door that damaged ones come to."""

from __future__ import annotations

from shared.config import canonical_json
from shared.errors import LedgerDamagedError
from shared.protocol import records
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import HeldOut, LocalMetrics
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    DeletingRecord,
    EvaluatedRecord,
    FailedRecord,
    FederationRecord,
    FinishedRecord,
    GenesisRecord,
    Input,
    LinkRecord,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    PrunedRecord,
    Record,
    RefusedRecord,
    RejoinedRecord,
    UnmaskedRecord,
)
from shared.protocol.secure import Revealed
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS

A, B = "a" * 64, "b" * 64
STAMP = {"writer": "one", "time": 5.5}
HELD_OUT = HeldOut(nll=3.5, tokens=100, examples=7)
CONFIG = federations.config()
MEMBER = {
    **STAMP,
    "site": "a",
    "manifest": MANIFEST,
    "fingerprint": A,
    "numerics": NUMERICS,
    "examples": 12,
}

EXAMPLES: list[Record] = [
    FederationRecord(**STAMP, config=CONFIG.recorded(), digest=CONFIG.digest),
    MemberRecord(**MEMBER),
    RejoinedRecord(**MEMBER, from_round=2, number=2),
    DeclinedRecord(**STAMP, site="a", reason="no"),
    OriginRecord(
        **STAMP,
        parent="day",
        parent_digest=A,
        parent_round=3,
        adapter_sha=B,
        adapter_size=400,
        manifest=MANIFEST,
        fingerprint=A,
        lora_alpha=16.0,
        lora_scaling="rslora",
    ),
    ControlRecord(**STAMP, number=1, action="extend", rounds=2, reason="more", by="me"),
    ControlRecord(**STAMP, number=1, action="exclude", site="a", reason="noise", by="me"),
    PrunedRecord(**STAMP, number=1, keep="last", keys=("runs/x", "runs/y"), reason="room", by="me"),
    DeletingRecord(**STAMP, by="me"),
    GenesisRecord(
        members=("a", "b"),
        manifest=MANIFEST,
        fingerprint=A,
        adapter_sha=B,
        adapter_size=400,
        origin="day@3",
    ),
    OpenedRecord(
        **STAMP,
        round=1,
        selected=("a", "b"),
        source_sha=A,
        seed=2**63 - 1,
        progress_from=0.0,
        progress_to=0.5,
        deadline_seconds=60.0,
        grace_seconds=5.0,
        rounds=3,
        members=("a", "b"),
        controls=1,
    ),
    AcceptedRecord(
        **STAMP,
        round=1,
        site="a",
        sha=A,
        size=400,
        examples=12,
        tokens=99,
        norm=1.5,
        metrics=LocalMetrics(
            steps=4, train_nll=4.5, mean_grad_norm=0.3, held_out=HELD_OUT, seconds={"train": 9.5}
        ),
        state="kept",
    ),
    RefusedRecord(**STAMP, round=1, site="a", sha=A, verdict="late", reason="over"),
    FailedRecord(**STAMP, round=1, site="a", attempt=2, reason="no memory", retryable=True),
    ClosingRecord(
        **STAMP,
        round=1,
        source_sha=A,
        inputs=(Input(site="a", from_round=1, sha=B, weight=1.0, scale=0.5),),
        excluded={"b": "late"},
        weighting="examples",
        controls=1,
    ),
    ClosedRecord(
        round=1,
        adapter_sha=A,
        adapter_size=400,
        mean_norm=0.5,
        delta_norms={"a": 0.5},
        cosines={"a": 1.0},
        source_held_out=HELD_OUT,
        left_out={"b": "far off"},
        exactness_gap=0.1,
        server_sha=B,
        step_norm=0.5,
    ),
    EvaluatedRecord(**STAMP, round=1, site="a", sha=A, held_out=HELD_OUT),
    UnmaskedRecord(
        **STAMP, round=1, site="a", revealed=Revealed(own=A, keys={"b": A}, shares={"c": "00ff"})
    ),
    FinishedRecord(**STAMP, round=3, sha=A, reason="done", controls=1),
    UnmaskedRecord(
        **STAMP, round=1, site="a", revealed=Revealed(own=A, keys={"b": B}, shares={"c": "00"})
    ),
    LinkRecord(
        **STAMP,
        run="test",
        number=2,
        previous=A,
        records={"finished.json": B},
        found={"control/00001.json": A},
        keys=f"3:{A}",
    ),
]
KINDS = {
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and issubclass(kind, Record) and kind.key is not Record.key
}


class OneObject:
    """A store that answers every question with the same bytes."""

    def __init__(self) -> None:
        self.data = b""

    def get(self, _key: str) -> bytes:
        """Whatever it was given."""
        return self.data


def whole() -> list[bytes]:
    """Each example as it lies in a store."""
    return [canonical_json(record.model_dump(mode="json")) for record in EXAMPLES]


class Reader:
    """Reads the same bytes in the place of each kind of record; ``taken``: as which they passed."""

    def __init__(self) -> None:
        self._store = OneObject()
        self._ledger = Ledger(self._store, "test", "reader", lambda: 0.0)  # type: ignore[arg-type]
        self._places = {(type(record), record.key("test")) for record in EXAMPLES}
        self.taken: set[type[Record]] = set()

    def read(self, data: bytes) -> None:
        """Of all places, and as the run's settings."""
        self._store.data = data
        self.taken = set()
        for kind, key in self._places:
            try:
                self._ledger.read(kind, key)
            except LedgerDamagedError:
                continue
            self.taken.add(kind)
        self._ledger.config()
