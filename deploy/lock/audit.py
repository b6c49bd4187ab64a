"""Look for known holes in everything that the lock files name: ``make audit``.

    audit.py [--if-unreachable fail|say] LOCK ...

pip-audit asks one public database after another: PyPI's, OSV's, ecosyste.ms's. One that cannot be
reached, or that answers about nothing, must not pass for one that found nothing. So each is first
asked about a release whose holes are known to all of them. Exit 0: nothing found. 1: something
found, or not every package could be looked up. 2: no database answered, unless ``say`` allows it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVICES = ("pypi", "osv", "esms")
KNOWN_BAD = "urllib3==1.26.0"  # CVE-2021-33503 and later ones
PIP_AUDIT = (sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off")

Packages = list[dict[str, Any]]


def main() -> int:
    """Ask the first database that answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--if-unreachable", choices=("fail", "say"), default="fail")
    parser.add_argument("locks", nargs="+", type=Path)
    given = parser.parse_args()
    for service in SERVICES:
        packages = about(service, KNOWN_BAD)
        if not any(package.get("vulns") for package in packages):
            say(f"{service}: gave no answer about {KNOWN_BAD}, whose holes are known: not asked")
            continue
        return max(audited(service, lock) for lock in given.locks)
    say("NOT AUDITED: no database of known holes could be asked from here. Try where they can be.")
    return 2 if given.if_unreachable == "fail" else 0


def audited(service: str, lock: Path) -> int:
    """What is known of one lock's packages, printed; 1 when it is more than nothing."""
    packages = about(service, lock.read_text())
    bad = [package for package in packages if package.get("vulns")]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    for package in bad:
        for hole in package["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "nothing yet"
            say(f"{lock}: {package['name']} {package['version']}: {hole['id']}, mended by {fixed}")
    if unknown:
        say(f"{lock}: {service} could not look up {', '.join(unknown)}")
    if not packages:
        say(f"{lock}: {service} gave no answer")
    say(f"{lock}: {service}: {len(packages)} packages, {len(bad)} with known holes")
    return int(bool(bad or unknown or not packages))


def about(service: str, requirements: str) -> Packages:
    """What a database says of each package; nothing where it gave no answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        asked = subprocess.run(
            [
                *(*PIP_AUDIT, "--no-deps", "--disable-pip"),
                *(f"--vulnerability-service={service}", f"--requirement={file.name}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        packages: Packages = json.loads(asked.stdout)["dependencies"]
    except (ValueError, KeyError):
        return []
    return packages


def say(line: str) -> None:
    """On standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
