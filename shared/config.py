"""``federation.toml`` (the run, written once for all) and ``site.toml`` (one site's own affairs).

Read from a file that is named, never at import and never from the environment. All mistakes are
reported at once, each with its field, what was expected and what came. The resolved federation
config and its digest are stored with the run; a run is resumed only under an equal digest.

The paper's settings (arXiv:2506.19164, section IV) are the defaults.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from shared.averaging import averaging_names
from shared.config_mistakes import NAME_PATTERN, SHA256_PATTERN, mistakes
from shared.config_rules import RULES
from shared.errors import ConfigError
from shared.topology import ANY_RUN, COORDINATOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]
Positive = Annotated[int, Field(ge=1)]
Module = Annotated[str, StringConstraints(max_length=300)]
StoreUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^/@\\\s]+/?$")]


def _known_averaging(name: str) -> str:
    """As a Literal of all modes would say it."""
    known = averaging_names()
    if name not in known:
        expected = ", ".join(map(repr, known))
        raise PydanticKnownError("literal_error", {"expected": expected})
    return name


AveragingName = Annotated[str, StringConstraints(max_length=64), AfterValidator(_known_averaging)]
RESERVED_NAMES = frozenset({ANY_RUN, COORDINATOR})


class Section(BaseModel):
    """One table of a TOML file: frozen, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What must hold of several settings together. Each yields what does not, and what to do.

        A rule may be asked of a table with settings missing, and then only as far as it can read.
        """
        return ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        found = [problem for rule in self.rules() for problem in rule()]
        if found:
            raise PydanticCustomError(
                "misfit", "{said}", {"said": "; ".join(found), "found": found}
            )
        return self


class RunSection(Section):
    """Which run, how long, who takes part."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    rounds: Positive = 15
    participants: Annotated[tuple[Name, ...], Field(min_length=1)]
    min_participants: Positive | None = None
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    versions: Literal["equal", "any"] = "equal"


class BaseSection(Section):
    """The frozen base model. The coordinator never opens it; participants do."""

    model: Annotated[str, Field(min_length=1, max_length=4_096)]
    quantisation: Literal["nf4", "int8", "none"] = "nf4"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    fingerprint: Sha256 | None = None


class LoraSection(Section):
    """The adapter. Defaults are the paper's: r=64, alpha=16, dropout 0.1, all linear layers.

    ``scaling``: of the product BA, alpha / r (``classic``) or alpha / sqrt(r) (``rslora``,
    arXiv:2312.03732). ``ranks``: of sites that have another one than ``rank``, the largest.
    """

    rank: Annotated[int, Field(ge=1, le=8192)] = 64
    alpha: Annotated[float, Field(gt=0)] = 16.0
    scaling: Literal["classic", "rslora"] = "classic"
    ranks: Annotated[dict[Name, Positive], Field(max_length=10_000)] = Field(default_factory=dict)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target_modules: (
        Literal["all-linear"] | Annotated[tuple[Module, ...], Field(min_length=1, max_length=1_000)]
    ) = "all-linear"


class TrainingSection(Section):
    """Local training in each round: AdamW and one learning-rate schedule over the whole run."""

    local_steps: Positive | None = None
    local_epochs: Positive | None = None
    batch_size: Positive = 4
    gradient_accumulation: Positive = 1
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.001
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    optimizer_state: Literal["reset", "keep"] = "reset"
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    max_prompt_tokens: Positive = 512
    max_answer_tokens: Positive = 512
    cpu_threads: Positive = 2

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_said(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(
            values.get(name) is None for name in ("local_steps", "local_epochs")
        ):
            return {**values, "local_epochs": 1}
        return values

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Steps or epochs."""
        return (self._steps_or_epochs,)

    def _steps_or_epochs(self) -> Iterator[str]:
        if self.local_steps is not None and self.local_epochs is not None:
            yield "local_steps and local_epochs are both given; give exactly one"


class SelectionSection(Section):
    """Who trains in a round: all members (the paper), or a random part by the run's seed."""

    method: Literal["all", "random"] = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A fraction needs a draw."""
        return (self._fraction_needs_random,)

    def _fraction_needs_random(self) -> Iterator[str]:
        if self.method == "all" and self.fraction != 1.0:
            yield 'fraction needs method = "random"'


class PolicySection(Section):
    """When a round closes, and what becomes of a delta that comes after it.

    ``all``: every selected participant's delta is in, or it is excluded. ``quorum``: likewise, but
    once deadline and grace are over ``quorum`` deltas are enough. ``buffered``: as soon as
    ``buffer`` deltas are in, of whatever round (FedBuff, arXiv:2106.06639).
    """

    kind: Literal["all", "quorum", "buffered"] = "all"
    on_failure: Literal["wait", "exclude"] = "wait"
    max_attempts: Positive = 3
    quorum: Positive | None = None
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    deadline: Literal["fixed", "adaptive"] = "fixed"
    deadline_spread: Annotated[float, Field(gt=0)] = 3.0
    grace_seconds: Annotated[float, Field(ge=0)] = 0.0
    late: Literal["drop", "carry"] = "drop"
    max_staleness: Positive = 10
    buffer: Positive | None = None

    @property
    def carries(self) -> bool:
        """Whether a delta that comes after its round closed counts in a later one."""
        return self.kind == "buffered" or (self.kind == "quorum" and self.late == "carry")

    @property
    def late_rounds(self) -> int:
        """For how many rounds after its own a delta is still taken."""
        return self.max_staleness if self.carries else 0

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Each kind has settings of its own."""
        return (self._has_what_the_kind_needs, self._has_nothing_else, self._waits_as_a_quorum)

    def _has_what_the_kind_needs(self) -> Iterator[str]:
        needed = {"all": (), "quorum": ("quorum", "deadline_seconds"), "buffered": ("buffer",)}
        for name in needed[self.kind]:
            if getattr(self, name) is None:
                yield f'kind = "{self.kind}" needs {name}; add it'

    def _has_nothing_else(self) -> Iterator[str]:
        for name, kind in (
            ("quorum", "quorum"),
            ("deadline_seconds", "quorum"),
            ("buffer", "buffered"),
        ):
            if self.kind != kind and getattr(self, name) is not None:
                yield (
                    f'{name} goes with kind = "{kind}", got kind = "{self.kind}"; '
                    "remove it or change the kind"
                )

    def _waits_as_a_quorum(self) -> Iterator[str]:
        if self.kind != "quorum" and (
            self.late != "drop" or self.deadline != "fixed" or self.grace_seconds
        ):
            yield (
                f'late, deadline and grace_seconds go with kind = "quorum", got kind = '
                f'"{self.kind}"; remove them or change the kind'
            )


class AggregationSection(Section):
    """How a round's deltas become one. ``equal``, ``mean``, ``fedavg``: Algorithm 2 of the paper.

    ``averaging``: which factors of a LoRA adapter are trained and how they are joined. ``rule``:
    what is taken of all deltas for each value; ``assumed_bad``: how many bad ones ``multi-krum``
    and ``trimmed-mean`` withstand. ``clip_to_median``: a delta is scaled down to at most this many
    times the median norm of the round.
    """

    weights: Literal["equal", "examples", "tokens"] = "equal"
    max_delta_norm: Annotated[float, Field(gt=0)] | None = None
    averaging: AveragingName = "fedavg"
    rule: Literal["mean", "trimmed-mean", "median", "multi-krum"] = "mean"
    assumed_bad: Positive = 1
    clip_to_median: Annotated[float, Field(ge=1)] | Literal["off"] = 3.0

    @property
    def least_deltas(self) -> int:
        """With fewer deltas than this the rule withstands nothing, and a round does not close."""
        bad = self.assumed_bad
        return {"median": 3, "trimmed-mean": 2 * bad + 1, "multi-krum": 2 * bad + 3}.get(
            self.rule, 1
        )


class ServerSection(Section):
    """The coordinator's optimiser: the mean delta is its step. ``plain``: it is added as it is.

    ``fedavgm`` (arXiv:1909.06335), ``nesterov`` (DiLoCo, arXiv:2311.08105), ``fedadam``,
    ``fedyogi``, ``fedadagrad`` (arXiv:2003.00295; their letters beta_1, beta_2, tau).
    """

    optimizer: Literal["plain", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad"] = "plain"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    second_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class CodecSection(Section):
    """How a delta travels."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,20}$")] = "fp32"


class ConvergenceSection(Section):
    """Stop early: held-out loss not better by ``min_delta`` nats for ``patience`` rounds."""

    patience: Positive | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class LimitsSection(Section):
    """What one site may cause; beyond it, it is counted and dropped. See ``sites list``.

    ``records``: refusals on record, by site and round; ``uploads``: deltas it may upload for a
    round. ``messages_per_second``: of its messages that are looked at, after ``burst`` at once.
    """

    records: Positive = 16
    uploads: Positive = 8
    messages_per_second: Annotated[float, Field(gt=0)] = 50.0
    burst: Positive = 500


Transport = Literal["tls", "plaintext"]


class BrokerSection(Section):
    """RabbitMQ as this account reaches it. Files are relative to the TOML file.

    ``url``: ``amqps://ACCOUNT@HOST:PORT/VHOST``, without a password. ``transport``: plain text to
    another machine is refused unless it says ``"plaintext"``.
    """

    url: Annotated[str, StringConstraints(pattern=r"^amqps?://[^@/\s]+@[^@\s]+$")]
    password_file: str
    ca_file: str | None = None
    transport: Transport = "tls"


class OperatedBrokerSection(BrokerSection):
    """The coordinator's view of the broker, with one of two ways to manage its accounts.

    ``site_url``: HOST:PORT as sites reach it, if that differs. ``management_account`` and its
    password file: an administrator of the management API, if the coordinator's account is none.
    """

    site_url: str | None = None
    management_url: str | None = None
    management_account: str | None = None
    management_password_file: str | None = None
    rabbitmqctl: tuple[str, ...] | None = None


class StoreSection(Section):
    """Where the ledger lives: a directory, relative to the TOML file, or a bucket of an S3 server.

    ``site_url``: the server as sites reach it, if that differs; signed URLs carry it.
    """

    directory: str = "store"
    url: StoreUrl | None = None
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{2,62}$")] = "gradualdiff"
    region: str = "us-east-1"
    access_key_file: str | None = None
    secret_key_file: str | None = None
    site_url: StoreUrl | None = None
    ca_file: str | None = None
    transport: Transport = "tls"

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A server wants keys."""
        return (self._keys_go_with_the_url,)

    def _keys_go_with_the_url(self) -> Iterator[str]:
        if self.url is not None and (self.access_key_file is None or self.secret_key_file is None):
            yield "url needs access_key_file and secret_key_file"


class SimulationSection(Section):
    """For ``gradualdiff simulate`` only: the sites' own files, relative to the TOML file."""

    sites: tuple[str, ...] = ()


NOT_RECORDED = (
    "limits",
    "broker",
    "store",
    "simulation",
)  # tables that cannot change a run's result


class FederationConfig(Section):
    """A whole ``federation.toml``."""

    run: RunSection
    base: BaseSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = Field(default_factory=TrainingSection)
    selection: SelectionSection = SelectionSection()
    policy: PolicySection = PolicySection()
    aggregation: AggregationSection = AggregationSection()
    server: ServerSection = ServerSection()
    codec: CodecSection = CodecSection()
    convergence: ConvergenceSection = ConvergenceSection()
    limits: LimitsSection = LimitsSection()
    broker: OperatedBrokerSection | None = None
    store: StoreSection = StoreSection()
    simulation: SimulationSection = SimulationSection()

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What tables must have to do with each other."""
        return (
            self._names_fit,
            self._run_name_is_free,
            *(partial(self._enough_are_listed, setting) for setting in ("quorum", "buffer")),
            self._enough_to_begin,
            *(partial(rule, self) for rule in RULES),
        )

    def _names_fit(self) -> Iterator[str]:
        names = self.run.participants
        if len(set(names)) != len(names):
            yield "run.participants names a participant twice"
        reserved = sorted(RESERVED_NAMES.intersection(names))
        if reserved:
            yield f"run.participants: {', '.join(reserved)} is a reserved name; choose another"

    def _run_name_is_free(self) -> Iterator[str]:
        if self.run.name == ANY_RUN:
            yield f"run.name: {ANY_RUN} is a reserved name; choose another"

    def _enough_are_listed(self, setting: str) -> Iterator[str]:
        wanted, names = getattr(self.policy, setting), self.run.participants
        if wanted is not None and wanted > len(names):
            yield (
                f"policy.{setting} is {wanted}, but run.participants lists {len(names)}: no "
                "round could ever close"
            )

    def _enough_to_begin(self) -> Iterator[str]:
        if (self.run.min_participants or 1) > len(self.run.participants):
            yield (
                f"run.min_participants is {self.run.min_participants}, "
                f"but run.participants lists {len(self.run.participants)}"
            )

    def recorded(self) -> dict[str, Any]:
        """What goes into the ledger: all that can change the result, nothing about this machine.

        A newer setting is left out where its value does what releases without it did.
        """
        values = self.model_dump(mode="json", exclude=set(NOT_RECORDED))
        for table, before in _BEFORE.items():
            for name, value in before.items():
                if values[table][name] == value:
                    del values[table][name]
            if not values[table]:
                del values[table]
        return values

    @classmethod
    def from_record(cls, values: dict[str, Any], source: str) -> FederationConfig:
        """The config that :meth:`recorded` gave, here or in an earlier release.

        Raises ConfigError that names ``source``.
        """
        tables = dict(values)
        for table, before in _BEFORE.items():
            given = values.get(table, {})
            tables[table] = {**before, **given} if isinstance(given, dict) else given
        return parse(cls, tables, source)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of :meth:`recorded`."""
        return hashlib.sha256(canonical_json(self.recorded())).hexdigest()


# Settings that came later, and what every run did before there were any: so the records of those
# runs keep their meaning and their digest.
_BEFORE: dict[str, dict[str, Any]] = {
    "lora": {"scaling": "classic", "ranks": {}},
    "training": {"proximal_mu": 0.0},
    "aggregation": {
        "averaging": "fedavg",
        "rule": "mean",
        "assumed_bad": 1,
        "clip_to_median": "off",
    },
    "server": ServerSection().model_dump(mode="json"),
}


class SiteSection(Section):
    """Who this site is and where it keeps the current round, and how often."""

    name: Name
    workspace: str = "workspace"
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0


class DataSection(Section):
    """The site's private text and how to read it.

    Exactly one mapping: ``messages`` (a column holding a list of ``{role, content}``), ``prompt``
    and ``answer``, or ``text``. ``group`` names the column that must not be split between train
    and held-out.
    """

    path: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets"] = "auto"
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    group: str | None = None
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_held_out: Positive | None = None
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 1

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """One way to read the text."""
        return (self._one_mapping,)

    def _one_mapping(self) -> Iterator[str]:
        if (self.prompt is None) != (self.answer is None):
            yield "prompt and answer go together; give both column names"
            return
        kinds = [k for k in ("messages", "prompt", "text") if getattr(self, k) is not None]
        if len(kinds) != 1:
            yield (
                "give exactly one of: messages; prompt and answer; text "
                f"(got {', '.join(kinds) or 'none'})"
            )


class SiteStoreSection(Section):
    """The one store that this site fetches from and sends to, ``https://HOST:PORT``."""

    url: StoreUrl


class DeviceSection(Section):
    """Where this site trains. ``auto``: the GPU when there is one."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"


class AcceptSection(Section):
    """What this site takes part in; a run outside of it is declined.

    ``max_steps``: local optimiser steps in a round. ``min_participants``: of the run as announced.
    ``modules``: names of layers that may hold an adapter; embeddings and head never may. From
    ``min_steps`` to ``min_answer_tokens``: a delta of fewer steps or examples gives its text away.
    ``send_metrics``: false: no losses leave; deltas, counts (examples, tokens, steps) and seconds
    still do.
    ``flora``: whether its own factors may be given to all other sites, as that averaging does.
    """

    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    runs: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    max_rank: Positive | None = None
    max_steps: Positive | None = None
    max_rounds: Positive | None = None
    min_participants: Positive | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    min_steps: Positive = 4
    min_examples: Positive = 16
    min_batch: Positive = 4
    min_answer_tokens: Positive = 8
    min_held_out: Positive = 8
    send_metrics: bool = True
    flora: bool = False


class SiteConfig(Section):
    """A whole ``site.toml``."""

    site: SiteSection
    data: DataSection
    device: DeviceSection = DeviceSection()
    broker: BrokerSection | None = None
    store: SiteStoreSection | None = None
    accept: AcceptSection = AcceptSection()


AnyConfig = TypeVar("AnyConfig", bound=Section)


def load_federation(path: Path) -> FederationConfig:
    """Read a ``federation.toml``. Raises ConfigError naming every mistake in it."""
    return _load(path, FederationConfig)


def load_site(path: Path) -> SiteConfig:
    """Read a ``site.toml``. Raises ConfigError naming every mistake in it."""
    return _load(path, SiteConfig)


def parse(kind: type[AnyConfig], values: dict[str, Any], source: str) -> AnyConfig:
    """Check plain values against ``kind``. ``source`` is named in the error.

    Raises ConfigError with all that is wrong, a line each.
    """
    try:
        made, details = kind.model_validate(values), []
    except ValidationError as error:
        made, details = None, error.errors(include_url=False)
    lines = mistakes(kind, values, details)
    if made is not None and not lines:
        return made
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8. Refuses NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _load(path: Path, kind: type[AnyConfig]) -> AnyConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; give the path of a TOML file"
        ) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}; fix that line") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: is not TOML: brackets are nested too deep; close each one that is open"
        ) from None
    return parse(kind, values, str(path))
