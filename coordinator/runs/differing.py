"""Settings side by side: a run's against the defaults, and those of several runs.

Only what goes into the ledger is compared: servers and folders change no result.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from shared.config import NOT_RECORDED, FederationConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Every run has its own, and every table shows them anyway.
_OWN = ("run.name", "run.participants", "base.model")


def flat_settings(config: FederationConfig) -> dict[str, Any]:
    """Each recorded setting by its name, ``table.setting``."""
    return dict(_flat("", config.model_dump(mode="json", exclude=set(NOT_RECORDED))))


def changed_settings(config: FederationConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that are not at their default, each with its value and the default."""
    own = {"run": config.run.model_dump(include={"name", "participants"})}
    own["base"] = {"model": config.base.model}
    defaults = flat_settings(FederationConfig.model_validate(own))
    return {
        name: (value, defaults.get(name))
        for name, value in flat_settings(config).items()
        if name not in _OWN and value != defaults.get(name)
    }


def differing_settings(runs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of several runs' flat settings, a row for each that is not the same in all of them."""
    names = dict.fromkeys(name for settings in runs for name in settings if name not in _OWN)
    rows = ((name, [settings.get(name) for settings in runs]) for name in names)
    return [
        (name, *(told(value) for value in values))
        for name, values in rows
        if any(value != values[0] for value in values)
    ]


def told(value: object) -> str:
    """A setting's value as a TOML file has it, but for one that is not set."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
