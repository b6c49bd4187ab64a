"""One file that proves a run to another party: its records, and what they are checked with.

Canonical JSON, a value a line: what it is, every record's bytes, which objects they name, what
``verify`` found here, what is installed here, and last the sha256 of all lines before, signed by
whoever has a key. Equal input gives equal bytes. Whoever reads one believes none of it: the records
prove themselves.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, cast

from pydantic import Field, ValidationError

from coordinator.audit.chain import Finding
from coordinator.audit.held import HeldObjects
from coordinator.audit.verification import verify_records
from coordinator.history import read_history
from shared import topology
from shared.config import Name, canonical_json
from shared.errors import LedgerDamagedError, SignatureError
from shared.protocol.chain import opened_json, signed_json
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import Schema
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coordinator.audit.evidence import Verification
    from coordinator.audit.links import Expected
    from coordinator.history import History
    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey

FORMAT: Final = "gradualdiff-attestation/1"
MOST_LINE_BYTES: Final = 32 * 1024 * 1024
MOST_BYTES: Final = 2 * 1024 * 1024 * 1024  # all of it is in memory while it is checked


@dataclass(frozen=True)
class Named:
    """An object that records name. ``size``: bytes, as far as it is known. ``stored``: it was."""

    key: str
    sha256: str
    size: int | None
    stored: bool


@dataclass
class Attestation:
    """What a file says. ``records``: bytes by key. ``made``: seconds since the epoch.

    ``signed_by``: whose signature of the whole file was checked; None for an unsigned one.
    """

    run: str
    made: float
    release: str
    records: dict[str, bytes] = field(default_factory=dict)
    objects: list[Named] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)
    bom: dict[str, Any] = field(default_factory=dict)
    signed_by: PublicKey | None = None


def attest(ledger: Ledger, found: Verification, made: float, release: str) -> Attestation:
    """Gather what proves a run. ``found``: what ``verify`` says of it, without a finding.

    Raises LedgerDamagedError for a record that is no text, and as ``read_history``.
    """
    store, run = ledger.store, ledger.run
    # The links first: every record that one of them names is there then.
    keys = [info.key for info in store.list(topology.links_prefix(run))]
    history = read_history(store, run)
    keys += [topology.federation_key(run), *(place.key for place in ledger.places())]
    signed_by = history.federation.signed_by
    if signed_by is not None:
        prefix = topology.site_keys_prefix(PublicKey(signed_by).fingerprint)
        keys += [info.key for info in store.list(prefix)]
    sizes = {info.key: info.size for info in store.list(topology.run_prefix(run))}
    objects = [
        Named(key, sha, sizes.get(key, size), key in sizes)
        for key, (sha, size) in sorted(_named(history).items())
    ]
    records = {key: store.get(key) for key in sorted(keys)}
    return Attestation(run, made, release, records, objects, asdict(found))


def _named(history: History) -> dict[str, tuple[str, int | None]]:
    """Every object that a record names by its sha256: that, and its bytes where they are told."""
    run = history.run
    found: dict[str, tuple[str, int | None]] = {}
    for (site, number), accepted in history.accepted.items():
        key = topology.delta_key(run, number, site, accepted.sha)
        found[key] = (accepted.sha, accepted.size)
    bases = history.genesis.manifest.bases if history.genesis else None
    if bases is not None:
        found[topology.bases_key(run, bases)] = (bases, None)
    for there in history.rounds.values():
        if there.result is not None:
            sha = there.result.adapter_sha
            found[topology.adapter_key(run, sha)] = (sha, there.result.adapter_size)
        if there.closed is not None:
            closed = there.closed
            for sha in filter(None, (closed.server_sha, closed.exact_sha)):
                found[topology.server_state_key(run, sha)] = (sha, None)
            if closed.update_sha is not None:
                key = topology.update_key(run, closed.update_sha)
                found[key] = (closed.update_sha, closed.update_size)
    return found


# Writing ---------------------------------------------------------------------------------------


def write_attestation(told: Attestation, file: BinaryIO, key: SigningKey | None) -> None:
    """Write it, signed by ``key`` if there is one. Raises LedgerDamagedError."""
    digest = hashlib.sha256()
    for value in _lines(told):
        line = canonical_json(value) + b"\n"
        digest.update(line)
        file.write(line)
    file.write(signed_json({"sha256": digest.hexdigest()}, FORMAT, key) + b"\n")


def _lines(told: Attestation) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "run": told.run, "made": told.made, "release": told.release}
    for key, data in told.records.items():
        try:
            yield {"record": key, "text": data.decode()}
        except UnicodeDecodeError:
            raise LedgerDamagedError(f"{key}: expected a record, got no text") from None
    for named in told.objects:
        yield {"object": named.key, **{k: v for k, v in asdict(named).items() if k != "key"}}
    yield {"verification": told.verification}
    yield {"bom": told.bom}


# Reading ---------------------------------------------------------------------------------------


def read_attestation(file: BinaryIO, name: str) -> Attestation:
    """What a file says, with its own signature checked. ``name``: of the file, for errors.

    Raises LedgerDamagedError for what is no attestation, SignatureError for one that was altered.
    """
    digest, told, read = hashlib.sha256(), None, 0
    for number in count(1):
        line = file.readline(MOST_LINE_BYTES + 1)
        read += len(line)
        where = f"{name}: line {number}"
        value = _value(line, where)
        if read > MOST_BYTES:
            raise LedgerDamagedError(f"{name}: expected at most {MOST_BYTES} bytes, got more")
        if told is None:
            told = _begun(value, where)
        elif "sha256" in value and "object" not in value:
            if file.read(1):
                raise LedgerDamagedError(f"{where}: expected the end after the digest, got more")
            told.signed_by = _signer(line[:-1], digest.hexdigest(), where)
            return told
        else:
            _take(told, value, where)
        digest.update(line)
    raise AssertionError("a file has an end")


def _value(line: bytes, where: str) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        got = "a longer one" if len(line) > MOST_LINE_BYTES else "the end of the file"
        raise LedgerDamagedError(
            f"{where}: expected a line of at most {MOST_LINE_BYTES} bytes, got {got}; fetch the "
            "file again"
        )
    try:
        value = json.loads(line)
        whole = isinstance(value, dict) and canonical_json(value) + b"\n" == line
    except (ValueError, RecursionError, UnicodeError):
        whole = False
    if not whole:
        raise LedgerDamagedError(f"{where}: expected canonical JSON, got something else")
    return cast("dict[str, Any]", value)


class _First(Schema):
    """The first line."""

    format: Annotated[str, Field(pattern=f"^{FORMAT}$")]
    run: Name
    made: Annotated[float, Field(ge=0, le=1e11)]
    release: Annotated[str, Field(max_length=100)]


def _begun(value: dict[str, Any], where: str) -> Attestation:
    try:
        first = _First.model_validate(value)
    except ValidationError:
        raise LedgerDamagedError(
            f"{where}: expected {FORMAT} with run, made and release; the file is no attestation, "
            "or a later release's"
        ) from None
    return Attestation(first.run, first.made, first.release)


def _take(told: Attestation, value: dict[str, Any], where: str) -> None:
    match value:
        case {"record": str(key), "text": str(text)}:
            if key in told.records:
                raise LedgerDamagedError(f"{where}: expected {key} once, got it again")
            told.records[key] = text.encode()
        case {"object": str(key), "sha256": str(sha), "stored": bool(stored)}:
            size = value.get("size")
            known = size if isinstance(size, int) and size >= 0 else None
            told.objects.append(Named(key, sha, known, stored))
        case {"verification": dict(found)}:
            told.verification = found
        case {"bom": {"components": [*_]} as bom}:
            told.bom = bom
        case _:
            raise LedgerDamagedError(
                f"{where}: expected a record, an object, a verification or a list of components"
            )


def _signer(last: bytes, digest: str, where: str) -> PublicKey | None:
    try:
        values, key = opened_json(last, FORMAT)
    except SignatureError as error:
        raise SignatureError(f"{where}: {error}") from None
    if values["sha256"] != digest:
        raise SignatureError(f"{where}: sha256: expected {digest}, got another: it was altered")
    return key


def check_attestation(told: Attestation, scratch: Path, expected: Expected) -> Verification:
    """Check the records against each other, as ``verify`` does, without any tensor.

    ``scratch``: an empty local folder. Raises as ``verify_run``, and SignatureError where the whole
    file is signed by another key than the one that is expected.
    """
    key = expected.key
    if key is not None and expected.demanded and told.signed_by != key:
        got = told.signed_by.fingerprint if told.signed_by else "nobody"
        raise SignatureError(
            f"attestation: expected the signature of {key.fingerprint}, got one of {got}"
        )
    store = cast("ObjectStore", HeldObjects(told.records))
    found = verify_records(Ledger(store, told.run, "reader", lambda: 0.0), scratch, expected)
    if not found.findings:
        wanted = _named(read_history(store, told.run))
        listed = {one.key: one.sha256 for one in told.objects}
        for object_key in sorted(wanted.keys() | listed.keys()):
            mine, theirs = wanted.get(object_key, ("none", None))[0], listed.get(object_key)
            if mine != theirs:
                problem = f"sha256: expected {mine}, as the records say, got {theirs or 'none'}"
                found.findings.append(Finding(0, object_key, problem))
    return found
