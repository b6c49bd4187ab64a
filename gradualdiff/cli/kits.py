"""For ``sites`` and ``setup``: the servers of a federation.toml, and a site's onboarding kit."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradualdiff.cli.output import toml_value
from shared.adapters import kind_of
from shared.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.accounts.site_accounts import Accounts
    from shared.config import FederationConfig, OperatedBrokerSection
    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey

PASSWORD_FILE = "broker-password"  # noqa: S105 - a file's name
CA_FILE = "ca.pem"
CERT_FILE = "certificate.pem"
CERT_KEY_FILE = "certificate.key"
# One sentence wherever this setting is explained.
METRICS_KEPT = (
    "false: no losses leave; deltas, counts (examples, tokens, steps) and seconds still do"
)
KITS = "kits"


@dataclass(frozen=True)
class Servers:
    """What the commands work with. ``folder``: the one that federation.toml stands in."""

    config: FederationConfig
    broker: OperatedBrokerSection
    folder: Path
    store: ObjectStore


def open_servers(federation: Path) -> Servers:
    """The servers in ``federation``. Raises ConfigError."""
    from shared.config import load_federation
    from shared.stores.opening import open_store

    config = load_federation(federation)
    folder = federation.resolve().parent
    if config.broker is None:
        raise ConfigError(
            f"{federation}: expected a [broker] table, got none; add broker.url and "
            "broker.password_file"
        )
    return Servers(config, config.broker, folder, open_store(config, folder))


def accounts_of(servers: Servers) -> Accounts:
    """Its sites' accounts, managed in the way that [broker] gives. Raises ConfigError."""
    from coordinator.accounts.broker_administration import broker_admin
    from coordinator.accounts.site_accounts import Accounts
    from shared.credentials import broker_address

    admin = broker_admin(servers.broker, servers.folder)
    vhost = broker_address(servers.broker, servers.folder).vhost
    return Accounts(servers.store, admin, vhost, time.time)


def signer_of(servers: Servers) -> SigningKey:
    """What the coordinator signs with. Raises ConfigError without ``[trust]``, or such a file."""
    from shared.trust.keys import SigningKey

    trust = servers.config.trust
    if trust is None:
        raise ConfigError(
            "trust: expected a [trust] table in federation.toml, got none; add it with key_file = "
            '"coordinator.key", run gradualdiff setup, and restart the coordinator'
        )
    return SigningKey.load(servers.folder / trust.key_file, "trust.key_file")


def declare_sites(servers: Servers, sites: list[str]) -> None:
    """The sites' queues only: a run's own queue would fill up if nobody ever began the run."""
    from shared.brokers.rabbitmq import connect
    from shared.credentials import broker_address
    from shared.topology import Topology, run_topology, site_queue

    names = {site_queue(site) for site in sites}
    whole = run_topology(servers.config.run.name, tuple(sites))
    part = Topology(
        exchanges=whole.exchanges,
        queues=tuple(queue for queue in whole.queues if queue.name in names),
        bindings=tuple(binding for binding in whole.bindings if binding.queue in names),
    )
    with connect(broker_address(servers.broker, servers.folder)) as connection:
        connection.declare(part)


# The kit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """What a site shows the broker beside its password. ``key`` None: the site has it already."""

    file: Path
    key: Path | None

    def check(self, broker: OperatedBrokerSection) -> None:
        """Raises ConfigError for a broker without TLS, and for files that are no such pair."""
        import ssl

        from shared.brokers.rabbitmq.tls import load_certificate

        if not broker.url.startswith("amqps://"):
            raise ConfigError(
                "--cert: expected a broker with TLS, got amqp:// in broker.url; use amqps://"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.key is not None:
            load_certificate(context, self.file, self.key, "--cert")
        elif not self.file.is_file():
            raise ConfigError(f"--cert: expected a file, got none at {self.file}; fix the path")


def prepare_kit(
    servers: Servers,
    name: str,
    kit: Path | None,
    certificate: Certificate | None = None,
    *,
    hospital: bool = False,
) -> Path:
    """Make the folder and all in it but the password; files that are there stay as they are.

    ``hospital``: a person there approves each run, and looks at each delta that may tell of text.
    All that can go wrong with the folder goes wrong here, before the site's account is touched.
    """
    from shared.credentials import existing_file

    folder = kit or servers.folder / KITS / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    _check_owner(folder / "site.toml", name)
    with tempfile.TemporaryFile(dir=folder):
        pass  # it can be written to
    authority = existing_file(servers.folder, servers.broker.ca_file, "broker.ca_file")
    files = {
        "site.toml": _site_toml(servers, name, certificate, hospital=hospital).encode(),
        "README.txt": _readme(name, signs=servers.config.trust is not None).encode(),
    }
    if authority is not None:
        files[CA_FILE] = authority.read_bytes()
    if certificate is not None:
        files[CERT_FILE] = certificate.file.read_bytes()
        if certificate.key is not None and not (folder / CERT_KEY_FILE).exists():
            write_secret(folder / CERT_KEY_FILE, certificate.key.read_text("ascii").rstrip())
    for file, data in files.items():
        if not (folder / file).exists():
            (folder / file).write_bytes(data)
    return folder


def _check_owner(site_toml: Path, name: str) -> None:
    if not site_toml.exists():
        return
    try:
        owner = tomllib.loads(site_toml.read_text(encoding="utf-8"))["site"]["name"]
    except (ValueError, KeyError, TypeError):
        return  # half edited; it is not ours to judge
    if owner != name:
        raise ConfigError(
            f"--kit: expected a new folder or the kit of site {name}, got {site_toml.parent} with "
            f"that of site {owner}; give another folder"
        )


def write_secret(path: Path, secret: str) -> None:
    """Write a file only its owner can read; whole or not at all."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def site_url(broker: OperatedBrokerSection, name: str) -> str:
    """The broker's URL with the site's account. Raises ConfigError for one no site may use."""
    from shared.credentials import check_transport

    parts = urlsplit(broker.url)
    address = parts.netloc.rpartition("@")[2]
    if broker.site_url is not None:
        address = broker.site_url
        if not address or set(address) & set("/@?# \t\n"):
            raise ConfigError(
                f"broker.site_url: expected HOST:PORT, got {broker.site_url!r}; leave out the rest"
            )
    url = f"{parts.scheme}://{name}@{address}{parts.path}"
    check_transport("broker", url, broker.transport)
    return url


def _site_toml(
    servers: Servers, name: str, certificate: Certificate | None, *, hospital: bool
) -> str:
    from shared.config import AcceptSection

    config = servers.config
    broker = [f"url = {toml_value(site_url(servers.broker, name))}"]
    broker.append(f"password_file = {toml_value(PASSWORD_FILE)}")
    if servers.broker.ca_file is not None:
        broker.append(f"ca_file = {toml_value(CA_FILE)}")
    # A broker that asked a certificate of the coordinator asks one of each site.
    if certificate is not None or servers.broker.cert_file is not None:
        broker.append(f"cert_file = {toml_value(CERT_FILE)}")
        broker.append(f"key_file = {toml_value(CERT_KEY_FILE)}")
    broker.append(f"transport = {toml_value(servers.broker.transport)}")
    store = config.store.site_url or config.store.url
    pinned = None if config.trust is None else signer_of(servers).public
    steps = config.training.local_steps
    return _SITE_TOML.format(
        name=toml_value(name),
        broker="\n".join(broker),
        store=f"[store]\nurl = {toml_value(store)}"
        if store
        else '# [store] with url = "https://..."',
        trust="" if pinned is None else _TRUST.format(pinned=toml_value(pinned.text)),
        model=toml_value(config.base.model),
        run=toml_value(config.run.name),
        rank=kind_of(config.lora).rank(config.lora, name),
        steps=1000 if steps is None else steps,
        rounds=config.run.rounds,
        participants=len(config.run.participants),
        least=AcceptSection(),
        metrics=METRICS_KEPT,
        approval="approval = true" if hospital else "# approval = true",
        audit="gate" if hospital else "off",
    )


def _readme(name: str, *, signs: bool) -> str:
    first = (
        "First run gradualdiff site init here: it makes this site's signing key, which stays "
        "here. Send its public half to whoever runs the coordinator, and read the fingerprint out "
        "over the phone.\n"
    )
    return (first if signs else "") + (
        f"This is all that site {name} needs to take part; {PASSWORD_FILE} is its secret: keep it "
        "to yourself (mode 0600), and ask for another one if somebody else saw it.\n"
        "In site.toml fill in [data] with the path and columns of your text, which never leaves "
        "your machine, and in [accept] what you are willing to take part in.\n"
        "The site opens connections outwards only, to broker.url and to store.url (and to the "
        "model hub for a model that is not here); it needs no open port.\n"
    )


_TRUST = """
[trust]
key_file = "identity.key"       # make it: gradualdiff site init; it never leaves here
# Only what this key signed is heard. Have its fingerprint read out to you: gradualdiff doctor.
coordinator = {pinned}
"""

# Written from a template, not by tomli-w: a site has to read the comments and fill in the rest.
_SITE_TOML = """\
# Site {name}. Files are relative to this one. Fill in [data]; look through [accept].

[site]
name = {name}
workspace = "workspace"         # folder of the current round; keep it between starts

[broker]
{broker}

# All that is fetched and sent goes through this server; no other one is asked.
{store}
{trust}
[data]
path = ""                       # FILL IN: your text, a .jsonl, .csv or .parquet file
messages = "messages"           # FILL IN: the column with a list of role and content,
# prompt = "question"           # or, instead of it, the columns of prompt and answer
# answer = "answer"
# text = "text"                 # or, instead of both, a column of plain text
# group = "patient"             # rows of one group are never split between train and held-out
# held_out_fraction = 0.1       # the part that is only measured, never trained on

[device]
kind = "auto"                   # the GPU when there is one; or "cpu", "cuda"

[accept]
# What you take part in; a run outside of it is declined. You need not trust whoever runs the
# coordinator to keep to it: this machine does. The first five are the present run's values.
models = [{model}]   # no other base model is loaded
max_rank = {rank}                   # a larger adapter carries more of your text
max_steps = {steps}                # local optimiser steps in a round: your machine's time
max_rounds = {rounds}                 # so many trainings, also where a round is asked for again
min_participants = {participants}            # fewer sites hide each other less
# A delta of one step is one gradient: text can be read from it.
min_steps = {least.min_steps}
# Different examples in a delta: of a single one everything could be read.
min_examples = {least.min_examples}
# Examples in one optimiser step: they hide each other.
min_batch = {least.min_batch}
# Answers are not cut shorter: a few tokens at a time could be read one by one.
min_answer_tokens = {least.min_answer_tokens}
# No loss of fewer held-out examples leaves: it would tell of each.
min_held_out = {least.min_held_out}
# Adapters stand on attention and MLP layers, never on embeddings or head; or only on these:
# modules = ["q_proj", "v_proj"]
# runs = [{run}]
# Hospitals switch this on: no run begins here until a person says gradualdiff site approve RUN.
{approval}
# privacy = "required"          # a run without differential privacy is declined
# max_epsilon = 8.0             # and one that would cost more, counted over all runs on this text
# send_metrics = true
#   {metrics}

[privacy]
# Before a delta leaves: was text learnt by heart? "report" sends the numbers along, "gate" also
# keeps a bad one here until you say what becomes of it (gradualdiff site audit).
audit = "{audit}"
"""
