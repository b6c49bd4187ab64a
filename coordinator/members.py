"""Whether the sites that joined can be averaged with each other. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.lora_factors import is_factors_only, rank_of, site_manifest, whole_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.config import FederationConfig
    from shared.records import MemberRecord


def disagreement(members: Mapping[str, MemberRecord], config: FederationConfig) -> str | None:
    """Why these sites do not fit together, naming each; None when they do.

    All must hold the same base (``base.fingerprint`` where the config gives it, else unanimity),
    train the same tensors (each of the rank that the config gives it), and run the same library
    versions unless ``run.versions = "any"``.
    """
    pinned = config.base.fingerprint
    bases = {site: record.fingerprint for site, record in members.items()}
    if pinned is not None and any(value != pinned for value in bases.values()):
        wrong = {site: value for site, value in bases.items() if value != pinned}
        return (
            f"base.fingerprint is {pinned[:12]}, but {_each(wrong)} loaded another base model; "
            "give every site the model that the config names"
        )
    if len(set(bases.values())) > 1:
        return (
            f"the sites loaded different base models: {_each(bases)}; give every site the same "
            "weights, tokenizer and chat template, or pin one with base.fingerprint"
        )
    against = _other_tensors(members, config)
    if against is not None:
        return against
    if config.run.versions == "equal":
        versions = {site: _versions(record) for site, record in members.items()}
        if len(set(versions.values())) > 1:
            listed = "; ".join(f"{site}: {text}" for site, text in sorted(versions.items()))
            return (
                f"the sites run different versions: {listed}; make them equal, or allow it with "
                'run.versions = "any" (results are then no longer the same on every site)'
            )
    return None


def _other_tensors(members: Mapping[str, MemberRecord], config: FederationConfig) -> str | None:
    """Why what the sites train cannot be joined."""
    lora, mode = config.lora, config.aggregation.averaging
    for site, record in sorted(members.items()):
        if site_manifest(record.manifest, lora, site) != record.manifest:
            return (
                f"{site} trains factors of another rank than the {rank_of(lora, site)} that "
                "lora.rank and lora.ranks give it; start that site again"
            )
        if mode != "fedavg" and not is_factors_only(record.manifest):
            return (
                f'aggregation.averaging = "{mode}": {site} trains tensors that are no LoRA '
                'factors; set it to "fedavg", or change lora.target_modules'
            )
    shapes = {
        site: whole_manifest(record.manifest, lora).digest for site, record in members.items()
    }
    if len(set(shapes.values())) > 1:
        return f"the sites train different tensors: {_each(shapes)}; use one release everywhere"
    return None


def _each(values: Mapping[str, str]) -> str:
    return ", ".join(f"{site} ({value[:12]})" for site, value in sorted(values.items()))


def _versions(record: MemberRecord) -> str:
    numerics = record.numerics
    parts = [f"{name} {version}" for name, version in sorted(numerics.versions.items())]
    return ", ".join([*parts, numerics.compute_dtype])
