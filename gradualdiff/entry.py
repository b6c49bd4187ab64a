"""The console script: sees to it that this project's own packages are imported, then runs them.

Others have a ``shared`` too: a folder on PYTHONPATH or beside ``python -m``, or a distribution in
the same environment. Nothing of this project is imported before that is known, so this module
stands alone, under a name of its own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("shared", "coordinator", "participant")
MARK = b"GradualDiff-Fed"  # in the first line of each package
FOREIGN_PACKAGE = 15  # ForeignPackageError's exit code; its class may not be there to be imported


def main() -> None:
    """Run the command, or end with one line on a package that is somebody else's."""
    found = foreign_package()
    if found is not None:
        sys.stderr.write(f"error: {found}\n")
        sys.exit(FOREIGN_PACKAGE)
    from gradualdiff.cli.main import main as run  # not before its packages are known

    run()


def foreign_package() -> str | None:
    """What is wrong with the first package that is somebody else's, and what to do about it."""
    here = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        found = _foreign(name)
        if found is not None:
            return (
                f"{name}: expected this project's package in {here}, got {found}; install "
                "gradualdiff-fed into a virtual environment of its own, unset PYTHONPATH, and "
                "start it from a folder that holds no such package"
            )
    return None


def _foreign(name: str) -> str | None:
    """Where a package of this name comes from, unless it is this project's."""
    own = Path(__file__).resolve().parents[1] / name / "__init__.py"
    spec = find_spec(name)
    if spec is None:
        return "none"
    if spec.origin is None or Path(spec.origin).resolve() != own:
        return spec.origin or f"the folder {next(iter(spec.submodule_search_locations or ()), '?')}"
    with own.open("rb") as file:  # another distribution may have been installed over it
        return None if MARK in file.readline() else str(own)


if __name__ == "__main__":
    main()
