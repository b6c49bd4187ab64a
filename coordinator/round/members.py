"""Which of the sites that joined cannot be averaged with the others, and why. Pure.

And why a branch cannot continue from its origin.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shared.adapters import kind_of
from shared.config import canonical_json
from shared.methods.averaging import get_averaging
from shared.printing import cut
from shared.protocol.bounds import prose

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shared.config import FederationConfig
    from shared.protocol.records import MemberRecord, OriginRecord

MOST_OF_ONE = 300  # characters of what a site said of its versions
AGAIN = "and start it again: its new word then counts"


def unfit(
    members: Mapping[str, MemberRecord],
    config: FederationConfig,
    origin: OriginRecord | None = None,
    excluded: Collection[str] = (),
) -> dict[str, str]:
    """The sites that do not fit, each with why and what to do; empty when all fit together.

    All must hold the same base, train the same tensors (each of the rank that the config gives it),
    and run the same library versions unless ``run.versions = "any"``. Which is right says the
    config (``base.fingerprint``), the run's origin, or else more than half of the sites that spoke
    and are not ``excluded``. Where none has a majority, no site fits.
    """
    found: dict[str, str] = {}

    def left() -> dict[str, MemberRecord]:
        return {site: member for site, member in sorted(members.items()) if site not in found}

    if config.aggregation.secure:
        found |= _without_key(left())
    found |= _other_base(left(), config, origin, excluded)
    found |= _other_factors(left(), config)
    found |= _other_bases(left(), config)
    found |= _other_tensors(left(), config, origin, excluded)
    if config.run.versions == "equal":
        found |= _by_majority(
            {site: _versions(member) for site, member in left().items()},
            excluded,
            ("runs other versions than most sites", "the sites run different versions"),
            f'give it their versions {AGAIN}, or allow it with run.versions = "any" (results are '
            "then no longer the same on every site)",
        )
    return {site: prose(why) for site, why in found.items()}  # it holds what sites said


def _without_key(members: Mapping[str, MemberRecord]) -> dict[str, str]:
    """Who can share no masks: a site of an older release, or one with another's key."""
    keys = Counter(member.exchange.key for member in members.values() if member.exchange)
    return {
        site: f"expected an exchange key of its own, which aggregation.secure needs, got "
        f"{'none' if member.exchange is None else 'one that another site has, too'}; update "
        f"the site, give it a workspace of its own {AGAIN}"
        for site, member in members.items()
        if member.exchange is None or keys[member.exchange.key] > 1
    }


def misfit(config: FederationConfig, origin: OriginRecord | None) -> str | None:
    """Why a run with these settings cannot continue from its origin; None when it can."""
    if origin is None:
        return None
    averaging = config.aggregation.averaging
    why = get_averaging(averaging).no_branch_to
    if why:
        return (
            f'aggregation.averaging = "{averaging}" {why}, but the run branches from '
            f"{origin.label}; use another averaging, or begin a run that is no branch"
        )
    for name, mine in kind_of(config.lora).scale(config.lora).items():
        theirs = getattr(origin, name)
        if mine != theirs:
            return (
                f"{name.replace('_', '.', 1)} is {_shown(mine)}, but the adapter of {origin.label} "
                f"was trained with {_shown(theirs)}: with another scale it is another model"
            )
    return None


def _shown(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else f'"{value}"'


def _other_base(
    members: Mapping[str, MemberRecord],
    config: FederationConfig,
    origin: OriginRecord | None,
    excluded: Collection[str],
) -> dict[str, str]:
    values = {site: member.fingerprint for site, member in members.items()}
    advice = f"give it the same weights, tokenizer and chat template {AGAIN}"
    if config.base.fingerprint is not None:
        wanted = config.base.fingerprint
        right = f"base.fingerprint is {wanted[:12]}"
    elif origin is not None:
        wanted = origin.fingerprint
        right = f"the adapter of {origin.label} was trained over {wanted[:12]}"
    else:
        return _by_majority(
            values,
            excluded,
            (
                "loaded another base model than most sites",
                "the sites loaded different base models",
            ),
            f"{advice}, or pin the right one with base.fingerprint",
        )
    return {
        site: f"{site} loaded another base model ({value[:12]}), but {right}; {advice}"
        for site, value in values.items()
        if value != wanted
    }


def _other_factors(members: Mapping[str, MemberRecord], config: FederationConfig) -> dict[str, str]:
    """What a site trains against the config alone."""
    lora, mode = config.lora, config.aggregation.averaging
    found = {}
    kind = kind_of(lora)
    for site, member in members.items():
        if kind.manifest_for(member.manifest, lora, site) != member.manifest:
            found[site] = (
                f"{site} trains factors of another rank than the {kind.rank(lora, site)} that "
                f"lora.rank and lora.ranks give it; give it this run's settings {AGAIN}"
            )
        elif get_averaging(mode).factors_only and not kind.is_factors_only(member.manifest):
            found[site] = (
                f'aggregation.averaging = "{mode}": {site} trains tensors that are no '
                'factors of a layer; set it to "fedavg", or change lora.target_modules'
            )
    return found


def _other_tensors(
    members: Mapping[str, MemberRecord],
    config: FederationConfig,
    origin: OriginRecord | None,
    excluded: Collection[str],
) -> dict[str, str]:
    values = {
        site: kind_of(member.manifest).manifest_for(member.manifest, config.lora).digest
        for site, member in members.items()
    }
    if origin is None:
        return _by_majority(
            values,
            excluded,
            ("trains other tensors than most sites", "the sites train different tensors"),
            f"give it their release and base model {AGAIN}",
        )
    return {
        site: (
            f"{site} trains other tensors than the adapter of {origin.label} has; a branch keeps "
            "its parent's lora.kind, lora.bases, lora.rank and lora.target_modules"
        )
        for site, value in values.items()
        if value != origin.manifest.digest
    }


def _other_bases(members: Mapping[str, MemberRecord], config: FederationConfig) -> dict[str, str]:
    """Other bases than the file's, or found by equal machines.

    Unequal ones round otherwise: that is only shown.
    """
    wanted = config.lora.bases_sha
    if wanted is not None:
        return {
            site: (
                f"lora.bases: expected {wanted[:12]}, which the run has on record, got "
                f"{member.manifest.bases or 'none'} at {site}; give it a release that fetches them "
                f"{AGAIN}"
            )
            for site, member in members.items()
            if member.manifest.bases != wanted
        }
    found, first = {}, dict[str, tuple[str, str]]()
    for site, member in members.items():
        if member.bases is None:
            continue
        machine = canonical_json(member.numerics.model_dump(mode="json")).decode()
        other, sha = first.setdefault(machine, (site, member.bases.sha))
        if sha != member.bases.sha:
            found[site] = (
                f"lora.bases: expected {sha[:12]}, as {other} found with the same base model and "
                f"versions, got {member.bases.sha[:12]} at {site}; look for a changed library or "
                f"a broken machine there {AGAIN}"
            )
    return found


def _by_majority(
    values: Mapping[str, str], excluded: Collection[str], words: tuple[str, str], advice: str
) -> dict[str, str]:
    """Who has not the value that more than half have; everybody where there is no such value."""
    votes = Counter(value for site, value in values.items() if site not in excluded)
    best, count = next(iter(votes.most_common(1)), ("", 0))
    sides = "; ".join(
        f"{', '.join(site for site, own in values.items() if own == value)}: {_short(value)}"
        for value in dict.fromkeys(values.values())
    )
    one, all_of_them = words
    if 2 * count > votes.total():
        odd = {site for site, value in values.items() if value != best}
        return {site: f"{site} {one} ({sides}); {advice}" for site in sorted(odd)}
    if not votes:
        return {}
    return dict.fromkeys(values, f"{all_of_them}, and none has a majority ({sides}); {advice}")


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else cut(value, MOST_OF_ONE)


def _versions(record: MemberRecord) -> str:
    numerics = record.numerics
    parts = [f"{name} {version}" for name, version in sorted(numerics.versions.items())]
    return ", ".join([*parts, numerics.compute_dtype])
