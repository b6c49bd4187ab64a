"""What a site needs: its file, its secret, the broker, its disk, its text, its device.

Of the text only counts are told. torch and bitsandbytes are loaded last, at their own checks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

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
from participant.data import NOTHING_HELD_OUT, split_text
from participant.workspace import EXCHANGE_FILE
from shared.base_model import located
from shared.errors import AccessRefusedError, BrokerError, ConfigError, GradualDiffError
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.brokers.rabbitmq import RabbitConnection
    from shared.config import BrokerSection, SiteConfig
    from shared.config.servers import SiteTrustSection

# Longer than any run's name may be, so that no queue is bound for it.
NO_RUN = "doctor-" + "0" * 40
PEOPLE = "ask whoever runs the coordinator"


def check_site(file: Path, store_url: str | None) -> Iterator[CheckResult]:
    """Each check's finding, in the order of what depends on what."""
    from shared.config import load_site

    try:
        config = load_site(file)
    except ConfigError as error:
        yield CheckResult("config", "FAIL", str(error))
        return
    yield CheckResult("config", "OK", f"site {config.site.name}")
    folder = file.resolve().parent
    if config.broker is None:
        yield CheckResult(
            "broker",
            "WARN",
            "no [broker] table: only gradualdiff simulate can run this site; for gradualdiff "
            "participant take the table from the kit that gradualdiff sites add wrote",
        )
    else:
        yield from check_secret(config.broker, "password", folder, "broker")
        yield from check_tls(config.broker, folder)
        yield from _broker(config.broker, config.site.name, folder)
        if config.store is None:
            yield CheckResult(
                "store",
                "FAIL",
                "no [store] table: a participant fetches from and sends to nowhere else; add "
                f'[store] with url = "https://HOST:PORT": {PEOPLE}',
            )
        ca_file = None if config.broker.ca_file is None else folder / config.broker.ca_file
        yield from _clock(store_url or (config.store.url if config.store else None), ca_file)
        yield from _trust(config.trust, folder)
    yield from _files(config, folder)
    yield from check_folder("workspace", folder / config.site.workspace, make=True)
    yield from _data(config, folder)
    yield from _models(config, folder)
    yield from _device(config)
    yield from _quantisation()


def _files(config: SiteConfig, folder: Path) -> Iterator[CheckResult]:
    """What else must be its owner's alone: some of it is there only once it was needed."""
    if config.broker is not None and config.broker.key_file is not None:
        yield from check_permissions("broker.key_file", folder / config.broker.key_file)
    if config.privacy.names_file is not None:
        yield from check_permissions("privacy.names_file", folder / config.privacy.names_file)
    exchange = folder / config.site.workspace / EXCHANGE_FILE
    if exchange.exists():
        yield from check_permissions("this site's key for secure sums", exchange)


def _trust(section: SiteTrustSection, folder: Path) -> Iterator[CheckResult]:
    if section.key_file is not None:
        yield from check_key(folder / section.key_file)
    else:
        yield CheckResult(
            "signing key",
            "SKIP",
            "no trust.key_file: this site signs nothing; a run that demands it refuses what it "
            "says; to make a key: gradualdiff site init",
        )
    if section.coordinator is not None:
        pinned = PublicKey(section.coordinator)
        says = f"{pinned.fingerprint}: only what this key signed is heard; have it read out to you"
        yield CheckResult("coordinator's key", "OK", says)
    else:
        yield CheckResult(
            "coordinator's key",
            "SKIP",
            "no trust.coordinator: the broker's word for who speaks is believed; a kit of a run "
            "that is signed has that line",
        )


# The broker --------------------------------------------------------------------------------------


def _broker(section: BrokerSection, name: str, folder: Path) -> Iterator[CheckResult]:
    found: list[CheckResult] = []
    with connection(section, folder, found) as broker:
        yield from found
        if broker is None:
            return
        if broker.identity != name:
            yield CheckResult(
                "account",
                "WARN",
                f"broker.url names the account {broker.identity}, but site.name "
                f"is {name}: its messages would be refused; make both the same",
            )
        yield from attempt("own queue", lambda: _own_queue(broker, name))
        yield _other_queues(broker)
        key = f"{NO_RUN}.{name}.online"
        yield from attempt("publishing", lambda: check_publishing(broker, key))


def _own_queue(broker: RabbitConnection, name: str) -> str:
    from shared.topology import site_queue

    queue = site_queue(name)
    ready, consumers = broker.count(queue)
    broker.peek(queue, 1)
    listening = "a participant listens" if consumers else "no participant listens now"
    return f"{queue}: readable, {ready} messages wait, {listening}"


def _other_queues(broker: RabbitConnection) -> CheckResult:
    """The refused queue stands for all that is not this site's."""
    from shared.topology import REFUSED_QUEUE

    try:
        broker.peek(REFUSED_QUEUE, 1)
    except AccessRefusedError:
        return CheckResult("other queues", "OK", "not readable, as it should be")
    except BrokerError as error:
        return CheckResult("other queues", "WARN", f"cannot be tried: {error}")
    return CheckResult(
        "other queues",
        "WARN",
        "this account may read more than its own queue; have its rights "
        f"made anew by gradualdiff sites restore: {PEOPLE}",
    )


def _clock(url: str | None, ca_file: Path | None) -> Iterator[CheckResult]:
    if url is None:
        yield CheckResult(
            "clock", "SKIP", "no [store] names a server; to compare, give --store-url"
        )
        return
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        yield from check_clock(f"{parts.scheme}://{parts.netloc}/", ca_file, "broker.ca_file")
    else:
        yield CheckResult(
            "clock", "FAIL", f"--store-url: expected https://HOST:PORT, got {url!r}; fix it"
        )


# What it trains with -----------------------------------------------------------------------------


def _data(config: SiteConfig, folder: Path) -> Iterator[CheckResult]:
    """Read, mapped and split as for a training, but not tokenised: that takes the model."""
    try:
        rows, split, unusable = split_text(config.data, folder)
    except GradualDiffError as error:
        yield CheckResult("data", "FAIL", str(error))
        return
    counts = (
        f"{folder / config.data.path}: {rows} rows, {len(unusable)} unusable, "
        f"{len(split.train)} to train on, "
        f"{len(split.held_out)} held out, {split.copies} left out as copies of these"
    )
    if not split.train:
        yield CheckResult(
            "data",
            "FAIL",
            f"{counts}: expected examples to train on; check [data]'s columns, lower "
            "data.held_out_fraction, or give more text",
        )
    elif not split.held_out:
        yield CheckResult("data", "WARN", f"{counts}; {NOTHING_HELD_OUT}")
    else:
        yield CheckResult("data", "OK", counts)


def _models(config: SiteConfig, here: Path) -> Iterator[CheckResult]:
    """Folders are looked for; what is fetched from a hub or a package cannot be told from here."""
    if config.accept.models is None:
        yield CheckResult(
            "base model", "SKIP", "any of the hub is accepted (no accept.models); the run names it"
        )
        return
    for model in config.accept.models:
        folder = Path(located(model, here))
        if not folder.is_absolute():
            yield CheckResult(
                "base model", "SKIP", f"{model}: is fetched when a run first asks for it"
            )
        elif (folder / "config.json").is_file():
            yield CheckResult("base model", "OK", f"{model}: is there")
        elif folder.is_dir():
            yield CheckResult(
                "base model",
                "FAIL",
                f"{model}: expected a model's folder with config.json, "
                "got one without; save the model there again",
            )
        else:
            yield CheckResult(
                "base model",
                "FAIL",
                f"{model}: expected a folder, got none; put the model there or fix accept.models",
            )


def _device(config: SiteConfig) -> Iterator[CheckResult]:
    kind = config.device.kind
    if importlib.util.find_spec("torch") is None:
        yield CheckResult(
            "device",
            "FAIL",
            "torch is not installed; run: pip install 'gradualdiff-fed[participant]'",
        )
        return
    if kind == "cpu":
        yield CheckResult("device", "OK", "the CPU, as device.kind says")
        return
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield CheckResult("device", "OK", f"{name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif kind == "cuda":
        yield CheckResult(
            "device",
            "FAIL",
            'device.kind: expected a GPU that torch can use for "cuda", found '
            'none; use "auto" or "cpu", or install a CUDA build of torch',
        )
    else:
        yield CheckResult("device", "OK", "the CPU: torch finds no GPU")


def _quantisation() -> Iterator[CheckResult]:
    """Loads bitsandbytes in the one way in which it is quiet and asks no network."""
    try:
        from participant.model.libraries import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        yield CheckResult(
            "bitsandbytes",
            "WARN",
            f"cannot be loaded ({type(error).__name__}: {error}): no run "
            "with base.quantisation nf4 or int8; run: pip install 'gradualdiff-fed[participant]'",
        )
        return
    yield CheckResult("bitsandbytes", "OK", f"version {bitsandbytes.__version__}")
