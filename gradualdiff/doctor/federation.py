"""What a coordinator needs: its file and secrets, broker, accounts, store and disk."""

from __future__ import annotations

import secrets
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradualdiff.doctor.checks import (
    CheckResult,
    attempt,
    check_clock,
    check_folder,
    check_key,
    check_permissions,
    check_publishing,
    check_secret,
    check_tls,
    connection,
)
from shared.errors import BrokerError, ConfigError, GradualDiffError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.accounts.site_accounts import SiteAccount
    from shared.brokers.rabbitmq import RabbitConnection
    from shared.config import FederationConfig, OperatedBrokerSection
    from shared.stores.port import ObjectStore
    from shared.stores.s3 import S3Store

SIGNED_SECONDS = 60.0
PROBE_BYTES = 4096


def check_federation(file: Path, spool: Path | None) -> Iterator[CheckResult]:
    """Each check's finding, in the order of what depends on what."""
    from shared.config import load_federation

    try:
        config = load_federation(file)
    except ConfigError as error:
        yield CheckResult("config", "FAIL", str(error))
        return
    count = len(config.run.participants)
    yield CheckResult("config", "OK", f"run {config.run.name} of {count} participants")
    folder = file.resolve().parent
    yield from _secrets(config, folder)
    if config.broker is None:
        yield CheckResult(
            "broker",
            "WARN",
            "no [broker] table: only gradualdiff simulate can run this; add "
            "[broker] for sites elsewhere",
        )
    else:
        yield from _broker(config, config.broker, folder)
    store: list[ObjectStore] = []
    yield from _store(config, folder, store)
    if config.broker is not None:
        yield from _accounts(config, config.broker, folder, store)
        yield from _site_keys(config, folder, store)
        yield from _coordinator(config, config.broker, folder, file, store)
    yield from check_folder("spool", spool or folder / "spool", make=True)


def _secrets(config: FederationConfig, folder: Path) -> Iterator[CheckResult]:
    if config.broker is not None:
        for name in ("password", "management_password"):
            yield from check_secret(config.broker, name, folder, "broker")
        if config.broker.key_file is not None:
            yield from check_permissions("broker.key_file", folder / config.broker.key_file)
    if config.store.url is not None:
        for name in ("access_key", "secret_key"):
            yield from check_secret(config.store, name, folder, "store")
    if config.trust is not None:
        yield from check_key(folder / config.trust.key_file)


# The broker --------------------------------------------------------------------------------------


def _broker(
    config: FederationConfig, section: OperatedBrokerSection, folder: Path
) -> Iterator[CheckResult]:
    yield from check_tls(section, folder)
    found: list[CheckResult] = []
    with connection(section, folder, found) as broker:
        yield from found
        if broker is not None:
            yield _version(broker.version)
            yield from _topology(broker, config)
            yield from attempt("rights", lambda: _rights(broker))


def _version(version: str) -> CheckResult:
    """Before 3.13 the broker may check another ``user_id`` than a client reads."""
    numbers = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
    if numbers >= [3, 13]:
        return CheckResult("broker version", "OK", f"RabbitMQ {version}")
    return CheckResult(
        "broker version",
        "WARN",
        f"RabbitMQ {version} passes on messages whose sender can be read in two ways: they are "
        "refused here, so no site speaks for another, but it cannot be said who sent them; update "
        "it to 3.13 or newer",
    )


def _topology(broker: RabbitConnection, config: FederationConfig) -> Iterator[CheckResult]:
    """Declares the exchanges, and of the queues those that are there: other arguments show.

    A run's queues would fill up if nobody ever began the run, so missing ones are only told.
    """
    try:
        there, missing = _declare_present(broker, config)
    except BrokerError as error:
        yield CheckResult("topology", "FAIL", str(error))
        return
    if missing:
        yield CheckResult(
            "topology",
            "WARN",
            f"not there yet: {', '.join(missing)}; run gradualdiff setup, or start the "
            "coordinator, which declares them",
        )
    else:
        yield CheckResult("topology", "OK", f"{there} queues are as they should be")


def _declare_present(broker: RabbitConnection, config: FederationConfig) -> tuple[int, list[str]]:
    from shared.topology import Topology, coordinator_queue, run_topology

    whole = run_topology(config.run.name, config.run.participants)
    missing = [queue.name for queue in whole.queues if not _is_there(broker, queue.name)]
    present = Topology(
        exchanges=whole.exchanges,
        queues=tuple(
            replace(queue, remade=False) for queue in whole.queues if queue.name not in missing
        ),
        bindings=tuple(binding for binding in whole.bindings if binding.queue not in missing),
    )
    broker.declare(present)
    # A finished run has none: whether one is needed is told with the coordinator.
    own = coordinator_queue(config.run.name)
    return len(present.queues), [name for name in missing if name != own]


def _is_there(broker: RabbitConnection, queue: str) -> bool:
    from shared.errors import BrokerUnavailableError

    try:
        broker.count(queue)
    except BrokerUnavailableError:
        raise
    except BrokerError:
        return False
    return True


def _rights(broker: RabbitConnection) -> str:
    """Reading and writing; a key of one word is bound by no queue."""
    from shared.topology import REFUSED_QUEUE

    told = check_publishing(broker, "doctor")
    if _is_there(broker, REFUSED_QUEUE):
        broker.peek(REFUSED_QUEUE, 1)
        return f"{told}, read and declare"
    return f"{told} and declare"


def _accounts(
    config: FederationConfig,
    section: OperatedBrokerSection,
    folder: Path,
    stores: list[ObjectStore],
) -> Iterator[CheckResult]:
    from coordinator.accounts.broker_administration import broker_admin

    if section.management_url is None and not section.rabbitmqctl:
        yield CheckResult(
            "management",
            "WARN",
            "no way to the broker's accounts: gradualdiff sites cannot work; "
            "add broker.management_url or broker.rabbitmqctl",
        )
        return
    way = section.management_url or "rabbitmqctl"
    try:
        on_broker = set(broker_admin(section, folder).accounts())
    except GradualDiffError as error:
        yield CheckResult("management", "FAIL", str(error))
        return
    yield CheckResult("management", "OK", f"{way} answers; {len(on_broker)} accounts")
    if stores:
        for site in config.run.participants:
            yield _account(stores[0], site, on_broker)


def _site_keys(
    config: FederationConfig, folder: Path, stores: list[ObjectStore]
) -> Iterator[CheckResult]:
    """Whether every participant has a key in force, where each has to sign."""
    from coordinator.site_keys import SiteKeys
    from shared.trust.keys import SigningKey

    if config.trust is None or not stores:
        return
    try:
        signer = SigningKey.load(folder / config.trust.key_file, "trust.key_file")
        known = SiteKeys(stores[0], signer.public).read_on()
    except ConfigError:
        return  # told with the secrets
    except GradualDiffError as error:
        yield CheckResult("site keys", "FAIL", str(error))
        return
    for site in config.run.participants:
        key = known.in_force(site)
        yield CheckResult(
            f"key of {site}",
            "FAIL" if key is None else "OK",
            "none is in force, and what it says is refused; it runs gradualdiff site init, and "
            f"you gradualdiff sites key {site} --key KEY"
            if key is None
            else key.public.fingerprint,
        )


def _account(store: ObjectStore, site: str, on_broker: set[str]) -> CheckResult:
    from coordinator.accounts.site_accounts import find_account

    check = f"account {site}"
    try:
        found = find_account(store, site)
    except GradualDiffError as error:
        return CheckResult(check, "FAIL", str(error))
    if found is None or found.state == "removed":
        return CheckResult(check, "FAIL", f"has no account; run gradualdiff sites add {site}")
    if found.state != "active":
        word = {"adding": "add", "removing": "remove"}.get(found.state, "rotate")
        return CheckResult(
            check, "WARN", f"is half done ({found.state}); repeat gradualdiff sites {word} {site}"
        )
    return _active(check, found, on_broker)


def _active(check: str, account: SiteAccount, on_broker: set[str]) -> CheckResult:
    ended, soon = account.ended(time.time()), account.ends_soon(time.time())
    is_there = account.site in on_broker
    if ended:
        still = "; gradualdiff sites expire cuts it off" if is_there else ""
        again = f"gradualdiff sites renew {account.site} --valid-days N lets it in again"
        return CheckResult(check, "FAIL", f"{ended}; {again}{still}")
    if not is_there:
        return CheckResult(
            check, "FAIL", "is on record, but the broker lost it; run gradualdiff sites restore"
        )
    return CheckResult(check, "WARN" if soon else "OK", soon or "is there")


def _coordinator(
    config: FederationConfig,
    section: OperatedBrokerSection,
    folder: Path,
    file: Path,
    stores: list[ObjectStore],
) -> Iterator[CheckResult]:
    """Whether one listens. Before the run's first start there need be none."""
    from coordinator.liveness import moment, read_status
    from shared.protocol.ledger import list_runs
    from shared.topology import coordinator_queue, finished_key

    run = config.run.name
    queue = coordinator_queue(run)
    with connection(section, folder, []) as broker:
        if broker is None or not stores:
            return  # told above
        listening = broker.consumers([queue])[queue] if _is_there(broker, queue) else 0
    store = stores[0]
    if run not in list_runs(store):
        yield CheckResult("coordinator", "SKIP", f"run {run} has not begun")
        return
    if any(info.key == finished_key(run) for info in store.list(finished_key(run))):
        yield CheckResult("coordinator", "OK", f"run {run} is finished, and needs none")
        return
    status = read_status(store, run)
    if status is not None and status.problem:
        yield CheckResult("run", "FAIL", status.problem)
    for site, counts in sorted(status.over.items() if status else ()):
        dropped = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        yield CheckResult(
            f"limits of {site}",
            "WARN",
            f"it is over the [limits] of run {run}; counted and dropped: {dropped}. Look at what "
            "it sends (gradualdiff queues peek events), ask its people, and if need be: "
            f"gradualdiff runs exclude {run} {site} --reason WHY takes it out of this run, "
            f"gradualdiff sites remove {site} cuts it off from all",
        )
    if listening:
        yield CheckResult(
            "coordinator", "OK", f"{listening} listen to {queue}; one of them is active"
        )
    else:
        wrote = f", and the last one wrote at {moment(status.at)}" if status else ""
        yield CheckResult(
            "coordinator",
            "FAIL",
            f"run {run} is not finished, but no coordinator listens to {queue}{wrote}; run: "
            f"gradualdiff coordinator {file}",
        )


# The store ---------------------------------------------------------------------------------------


def _store(
    config: FederationConfig, folder: Path, opened: list[ObjectStore]
) -> Iterator[CheckResult]:
    """``opened`` receives the store if it can be used."""
    from shared.stores.opening import open_s3

    section = config.store
    if section.url is None:
        yield from check_folder("store", folder / section.directory, make=True)
        yield from _open_directory(folder / section.directory, opened)
        return
    try:
        store = open_s3(section, folder)
    except ConfigError as error:
        yield CheckResult("store", "FAIL", str(error))
        return
    ca_file = None if section.ca_file is None else folder / section.ca_file
    yield from check_clock(section.url, ca_file, "store.ca_file")
    try:
        store.check()
    except GradualDiffError as error:
        yield CheckResult("store", "FAIL", str(error))
        return
    opened.append(store)
    bucket = f"{section.url}, bucket {section.bucket}"
    yield CheckResult("store", "OK", f"{bucket}: keys are right, conditional create is honoured")
    if store.indirect:
        yield CheckResult(
            "uploads",
            "WARN",
            f"expected that a signed URL creates an object, but {store.indirect}; each delta is "
            "stored twice. Give the key the rights to list and abort uploads in parts, or use a "
            "server that has conditional writes (SeaweedFS, MinIO, AWS S3)",
        )
    else:
        yield CheckResult("uploads", "OK", "sites send deltas straight to where they stay")
    yield _signed_urls(config, store, ca_file)


def _open_directory(directory: Path, opened: list[ObjectStore]) -> Iterator[CheckResult]:
    from shared.stores.directory import DirectoryStore

    if directory.exists():
        try:
            opened.append(DirectoryStore(directory, create=False))
        except GradualDiffError as error:
            yield CheckResult("store", "FAIL", str(error))


def _signed_urls(config: FederationConfig, store: S3Store, ca_file: Path | None) -> CheckResult:
    """A PUT and a GET as a site would do them, at the address that sites are given."""
    import hashlib

    from shared.stores.transfer import HttpTransfer

    key = f".probe/doctor-{secrets.token_hex(8)}"
    data = secrets.token_bytes(PROBE_BYTES)
    where = config.store.site_url or config.store.url
    try:
        transfer = HttpTransfer(ca_file=ca_file, plaintext=config.store.transport == "plaintext")
        with tempfile.TemporaryDirectory(prefix="gradualdiff-doctor-") as scratch:
            sent, got = Path(scratch) / "sent", Path(scratch) / "got"
            sent.write_bytes(data)
            expires_at = time.time() + SIGNED_SECONDS
            try:
                transfer.upload(store.sign_put(key, expires_at, len(data)), sent, 0, len(data))
                transfer.download(
                    store.sign_get(key, expires_at), got, hashlib.sha256(data).hexdigest()
                )
            finally:
                store.delete(key)
    except StoreUnavailableError as error:
        if config.store.site_url is not None:
            return CheckResult(
                "signed urls",
                "WARN",
                f"{error}; sites are sent to {where}: if only they can "
                "reach it, run gradualdiff doctor at a site",
            )
        return CheckResult("signed urls", "FAIL", str(error))
    except GradualDiffError as error:
        return CheckResult("signed urls", "FAIL", f"{error}; sites are sent to {where}")
    return CheckResult("signed urls", "OK", f"PUT and GET work at {where}")
