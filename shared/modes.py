"""What a run may choose by name, found by that name: built in, or of another installed package.

One registry for every kind. A built-in mode is a file in its kind's folder, called as the mode is
(``-`` is written ``_``), whose ``MODE`` is the value. Another package offers a mode by an entry
point of the group ``gradualdiff.KIND``; its code is imported when its name is asked for, not
before. Nothing here imports a mode or a kind, so that settings may ask without a circle.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, StringConstraints

from shared.errors import (
    ConfigError,
    ForeignPackageError,
    GradualDiffError,
    MissingPackageError,
    did_you_mean,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from importlib.metadata import EntryPoint


WHOLE: Final = "whole"  # where a codec may be named: none, the adapter as it is
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._+!-]{1,100}$")]


@dataclass(frozen=True)
class Kind:
    """One sort of modes.

    ``contract``: the class in ``package`` whose parts a mode must have. ``at_sites``: whether sites
    run its code too. ``also``: a further setting that names one, or says ``WHOLE``.
    """

    package: str
    contract: str
    setting: str
    at_sites: bool = False
    also: str = ""


KINDS: Final = {
    "averaging": Kind(
        "shared.methods.averaging", "Averaging", "aggregation.averaging", at_sites=True
    ),
    "codecs": Kind("shared.tensors.codecs", "Codec", "codec.name", True, "codec.down"),
    "policies": Kind("shared.methods.policies", "Policy", "policy.kind"),
    "rules": Kind("shared.methods.rules", "Rule", "aggregation.rule"),
    "server_optimizers": Kind(
        "shared.methods.server_optimizers", "ServerOptimizer", "server.optimizer"
    ),
}


class Origin(BaseModel):
    """Where a mode that is not built in comes from, as it goes on record with a run."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    kind: Label
    name: Label
    version: Label
    distribution: Label

    def __str__(self) -> str:
        return f"{self.kind}.{self.name} of {self.distribution} {self.version}"


def names(kind: str) -> tuple[str, ...]:
    """Every mode of this kind, sorted. None of other packages is imported."""
    return tuple(sorted({*_built_in(kind), *_installed(kind)}))


@functools.cache
def get(kind: str, name: str) -> Any:
    """The mode of this name. Raises ConfigError that lists the known ones.

    Raises ForeignPackageError where another package's mode takes a name that is taken, cannot be
    imported, or lacks what its kind needs.
    """
    point = _foreign(kind, name)
    if point is None:
        return importlib.import_module(_built_in(kind)[name]).MODE
    try:
        mode = point.load()
    except Exception as error:
        raise ForeignPackageError(
            f"{_label(kind, point)}: expected {point.value} to be imported, got "
            f"{type(error).__name__}: {error}; install a version that works, or uninstall it"
        ) from error
    if isinstance(mode, type):
        raise ForeignPackageError(
            f"{_label(kind, point)}: expected a value, got the class {mode.__name__}; offer an "
            f"instance of it: MODE = {mode.__name__}()"
        )
    lacking = sorted(part for part in _parts(kind) if not hasattr(mode, part))
    if lacking:
        raise ForeignPackageError(
            f"{_label(kind, point)}: expected all that {KINDS[kind].contract} in "
            f"{KINDS[kind].package} has, got {point.value} without {', '.join(lacking)}; install a "
            "version made for this release"
        )
    return mode


@contextlib.contextmanager
def at_work(kind: str, name: str) -> Iterator[None]:
    """Around a mode's code: what another package's mode raises is told with its name.

    Errors of the tree and the machine's (a full disk, no memory) pass as they are. Raises
    ForeignPackageError.
    """
    try:
        yield
    except (GradualDiffError, OSError, MemoryError):
        raise
    except Exception as error:
        point = _foreign(kind, name)
        if point is None:
            raise
        raise ForeignPackageError(
            f"{_label(kind, point)}: expected {point.value} to work, got {type(error).__name__}: "
            f"{error}; report it to its makers, or mend it and go on: nothing recorded is lost"
        ) from error


def origin(kind: str, name: str) -> Origin | None:
    """Where the mode comes from; None for a built-in one. Imports none.

    Raises ConfigError and ForeignPackageError as :func:`get` does.
    """
    point = _foreign(kind, name)
    if point is None or point.dist is None:
        return None
    return Origin(kind=kind, name=name, version=point.dist.version, distribution=point.dist.name)


def is_built_in(kind: str, name: str) -> bool:
    """Whether this release brings the mode itself."""
    return name in _built_in(kind)


def origins(config: BaseModel) -> tuple[Origin, ...]:
    """Where the modes that these settings name come from, without the built-in ones.

    Each is imported: one that does not work is told before a run begins with it. Raises as
    :func:`get` does.
    """
    found: dict[Origin, None] = {}
    for kind, about in KINDS.items():
        for setting in filter(None, (about.setting, about.also)):
            table, field = setting.split(".")
            name = getattr(getattr(config, table), field)
            where = None if (setting, name) == (about.also, WHOLE) else origin(kind, name)
            if where is not None:
                get(kind, name)
                found[where] = None
    return tuple(found)


def lack(wanted: Origin) -> str:
    """What this installation lacks of a mode on record, and what to do; empty: nothing."""
    remedy = f"install {wanted.distribution}=={wanted.version} here"
    try:
        here = origin(wanted.kind, wanted.name) if wanted.kind in KINDS else None
    except ConfigError:
        here = None
    except ForeignPackageError as error:
        return str(error)
    if here is None:
        return f"{wanted} is not installed; {remedy}"
    return "" if here == wanted else f"expected {wanted}, got {here}; {remedy}"


def require(wanted: Iterable[Origin], whose: str) -> None:
    """Raises MissingPackageError that names every mode that is missing or of another version."""
    lacking = [said for said in map(lack, wanted) if said]
    if lacking:
        raise MissingPackageError(f"{whose}: {'; '.join(lacking)}")


@functools.cache
def _built_in(kind: str) -> dict[str, str]:
    """Name and module of each mode that this project brings."""
    package = KINDS[kind].package
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    modules = (module.name for module in pkgutil.iter_modules(folders or ()))
    return {name.replace("_", "-"): f"{package}.{name}" for name in modules}


@functools.cache
def _installed(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """What other packages offer, by name."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - a command's help needs none

    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=f"gradualdiff.{kind}"):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _foreign(kind: str, name: str) -> EntryPoint | None:
    """The entry point of this name; None for a built-in mode.

    Raises ConfigError for an unknown name, ForeignPackageError for one that is taken twice.
    """
    built_in, offered = name in _built_in(kind), _installed(kind).get(name, ())
    if built_in + len(offered) > 1:
        others = " and ".join(_label(kind, point) for point in offered)
        also = " too, which is built in" if built_in else ""
        raise ForeignPackageError(
            f"{KINDS[kind].setting}: expected one mode called {name!r}, got {others}{also}; "
            "uninstall the package, or ask its makers for another name"
        )
    if offered:
        return offered[0]
    if not built_in:
        known = names(kind)
        raise ConfigError(
            f"{KINDS[kind].setting}: expected one of {', '.join(known)}, got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    return None


def _label(kind: str, point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "a package"
    return f"{package} (entry point {point.name!r} of gradualdiff.{kind})"


def _parts(kind: str) -> set[str]:
    """The public names of a kind's contract."""
    contract = getattr(importlib.import_module(KINDS[kind].package), KINDS[kind].contract)
    found = {*dir(contract), *getattr(contract, "__annotations__", ())}
    return {part for part in found if not part.startswith("_")}
