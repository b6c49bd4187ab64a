"""The demo's TOML files: written out, so that they can be read, changed and run by ``simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from shared.config import FederationConfig, parse
from shared.config.overrides import overridden
from shared.trust.keys import IDENTITY_FILE, SigningKey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradualdiff.demo.data import SiteFile

HELD_OUT_PER_SITE = 13  # 65 in all: one evaluation takes a few seconds on two cores
MAX_PROMPT_TOKENS = 48
MAX_ANSWER_TOKENS = 40
COORDINATORS_KEY = "coordinator.key"


def write_demo(
    folder: Path,
    run: str,
    model: str,
    sites: Sequence[SiteFile],
    settings: Mapping[str, float],
    servers: Mapping[str, Mapping[str, object]] | None = None,
    store: str = "store",
    overrides: Sequence[str] = (),
) -> Path:
    """Write ``federation.toml`` and one ``sites/<name>.toml`` each; the former's path.

    ``store``: its directory, as seen from ``folder``. ``servers``: [broker] and [store] tables to
    run it over; a site's password is then looked for in its kit, ``kits/<name>``, its key in its
    workspace, and the coordinator's key is made here, for each site to pin. ``overrides``: settings
    instead of the demo's own. Raises ConfigError for one that is wrong.

    The adapter's settings are the paper's (they are the defaults); learning rate and local steps
    are the demo's own, since the paper's move little in so few steps (docs/explanation/demo.md).
    """
    names = [site.name for site in sites]
    places = servers or {"store": {"directory": store}}
    tables: dict[str, dict[str, object]] = {
        "run": {
            "name": run,
            "seed": settings["seed"],
            "rounds": settings["rounds"],
            "participants": names,
        },
        "base": {"model": model, "quantisation": "nf4"},
        "lora": {"rank": 64, "alpha": 16.0, "dropout": 0.1, "target_modules": "all-linear"},
        "training": {
            "local_steps": settings["local_steps"],
            "batch_size": 4,
            "learning_rate": settings["learning_rate"],
            "max_grad_norm": 0.3,
            "weight_decay": 0.001,
            "warmup_ratio": 0.03,
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_answer_tokens": MAX_ANSWER_TOKENS,
            "cpu_threads": 2,
        },
        **{name: dict(table) for name, table in places.items()},
        "trust": {"key_file": COORDINATORS_KEY},
        "simulation": {"sites": [f"sites/{name}.toml" for name in names]},
    }
    tables, given = overridden(FederationConfig, tables, overrides)
    parse(FederationConfig, tables, "the demo's settings with --set" if given else "demo", given)
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    for site in sites:
        tables_of_site = _site(site)
        if servers:
            tables_of_site |= _over_servers(site.name, model, servers, folder)
        write_tables(folder / "sites" / f"{site.name}.toml", tables_of_site)
    path = folder / "federation.toml"
    write_tables(path, tables)
    return path


def _site(site: SiteFile) -> dict[str, dict[str, object]]:
    return {
        "site": {"name": site.name, "workspace": site.name},
        "data": {
            "path": str(Path("..") / "data" / site.path.name),
            **site.columns,
            "max_held_out": HELD_OUT_PER_SITE,
        },
    }


def _over_servers(
    name: str, model: str, servers: Mapping[str, Mapping[str, object]], folder: Path
) -> dict[str, dict[str, object]]:
    """What a kit would say: where the servers are, whom to believe, which model is accepted."""
    pinned = SigningKey.kept(folder / COORDINATORS_KEY, "trust.key_file").public
    return {
        "broker": _site_broker(name, servers["broker"]),
        "store": {"url": servers["store"]["url"]},
        "trust": {"key_file": str(Path(name) / IDENTITY_FILE), "coordinator": pinned.text},
        "accept": {"models": [model]},
    }


def _site_broker(name: str, broker: Mapping[str, object]) -> dict[str, object]:
    """The broker as the site's own account reaches it; the kit has its password."""
    scheme, _, rest = str(broker["url"]).partition("://")
    table: dict[str, object] = {
        "url": f"{scheme}://{name}@{rest.rpartition('@')[2]}",
        "password_file": str(Path("..") / "kits" / name / "broker-password"),
    }
    return table | {key: broker[key] for key in ("ca_file", "transport") if key in broker}


def write_tables(path: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    """Write a TOML file."""
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
