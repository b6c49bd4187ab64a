"""``federation.toml``: the run, written once for all, and what of it goes on record."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from shared import modes
from shared.config.reading import load, parse
from shared.config.rounds import CodecSection, ServerSection
from shared.config.rules import RULES
from shared.config.tables import FederationTables
from shared.config.values import RESERVED_NAMES, canonical_json
from shared.modes import WHOLE
from shared.topology import ANY_RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

NOT_RECORDED = ("limits", "broker", "trust", "store", "simulation")  # cannot change a run's result


class FederationConfig(FederationTables):
    """A whole ``federation.toml``."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_averaging(cls, tables: Any) -> Any:
        """Where each round makes the adapter anew, nothing waits for a later one: finer, whole."""
        match tables:
            case {"aggregation": {"averaging": str(name)}, **others}:
                codec = others.get("codec", {})
                known = name in modes.names("averaging")
                if known and isinstance(codec, dict) and not modes.get("averaging", name).by_value:
                    return {**tables, "codec": {**_MADE_ANEW, **codec}}
        return tables

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_secure_sum(cls, tables: Any) -> Any:
        """Nobody sees a delta's norm, so the default that asks for it is off."""
        match tables:
            case {"aggregation": {"secure": True, **section}}:
                given = {"clip_to_median": "off", **section, "secure": True}
                return {**tables, "aggregation": given}
        return tables

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_private_sites(cls, tables: Any) -> Any:
        """What a site's noise does not go with is off where nobody asks for it."""
        match tables:
            case {"privacy": {"unit": "site"}}:
                off: dict[str, dict[str, Any]] = {
                    "aggregation": {"clip_to_median": "off"},
                    "codec": {"feedback": False},
                }
                for table, values in off.items():
                    given = tables.get(table, {})
                    if isinstance(given, dict):
                        tables = {**tables, table: {**values, **given}}
        return tables

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What tables must have to do with each other."""
        return (
            self._names_fit,
            self._run_name_is_free,
            self._enough_are_listed,
            self._enough_to_begin,
            self._averaging,
            self._server,
            self._codec,
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

    def _enough_are_listed(self) -> Iterator[str]:
        setting = modes.get("policies", self.policy.kind).fewest
        wanted, names = getattr(self.policy, setting) if setting else None, self.run.participants
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

    def _averaging(self) -> Iterator[str]:
        yield from modes.get("averaging", self.aggregation.averaging).misfits(self)

    def _server(self) -> Iterator[str]:
        yield from modes.get("server_optimizers", self.server.optimizer).misfits(self)

    def _codec(self) -> Iterator[str]:
        # The default goes with everything, and is not asked: a codec's code loads numpy.
        if self.codec != CodecSection():
            yield from modes.get("codecs", self.codec.name).misfits(self)

    def recorded(self) -> dict[str, Any]:
        """What goes into the ledger: all that can change the result, nothing about this machine.

        A newer setting is left out where its value does what releases without it did.
        """
        values = self.model_dump(mode="json", exclude=set(NOT_RECORDED))
        if self.privacy is None:
            del values["privacy"]
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


_MADE_ANEW: dict[str, Any] = {"name": "int8", "down": WHOLE}

# Settings that came later, and what every run did before there were any: so the records of those
# runs keep their meaning and their digest.
_BEFORE: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "bases": "weights", "scaling": "classic", "ranks": {}},
    "training": {"proximal_mu": 0.0},
    "aggregation": {
        "averaging": "fedavg",
        "rule": "mean",
        "assumed_bad": 1,
        "clip_to_median": "off",
        "secure": False,
        "secure_reach": 0.01,
    },
    "server": ServerSection().model_dump(mode="json"),
    "codec": {"feedback": False, "down": WHOLE, "packed": False},
}


def load_federation(path: Path, overrides: Sequence[str] = ()) -> FederationConfig:
    """Read a ``federation.toml``; ``overrides``: ``section.key=value`` each, instead of its own.

    Raises ConfigError naming every mistake in both.
    """
    return load(path, FederationConfig, overrides)
