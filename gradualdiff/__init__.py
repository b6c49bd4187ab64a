"""GradualDiff-Fed: what a user touches. The Python API, the command line, the embedded federation.

``import gradualdiff`` loads nothing else: each name of ``gradualdiff.api`` is there once it is
asked for, and then these packages are known to be this project's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradualdiff.api import *  # noqa: F403 - the names stand there, once


def __getattr__(name: str) -> Any:
    """A name of the API. Raises ImportError where another project's packages are imported."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from gradualdiff.entry import foreign_package

    found = foreign_package()
    if found is not None:
        raise ImportError(found)
    api = import_module("gradualdiff.api")
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
