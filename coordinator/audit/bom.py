"""What is installed here, as a CycloneDX 1.6 list of components."""

from __future__ import annotations

import platform
import re
from importlib.metadata import distributions, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import Distribution

OWN = "gradualdiff-fed"
_MOST_LICENSE = 100  # characters; some declare the whole text


def bill_of_materials() -> dict[str, Any]:
    """Every distribution that is installed, by name: version, purl, and license if declared.

    https://cyclonedx.org/docs/1.6/json/; without a time or a serial number, so that equal
    installations give equal lists.
    """
    found = {_name(one): one for one in distributions() if one.metadata["Name"]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "name": OWN, "version": version(OWN)},
            "properties": [
                {"name": "python", "value": platform.python_version()},
                {"name": "implementation", "value": platform.python_implementation()},
                {"name": "platform", "value": platform.platform()},
            ],
        },
        "components": [_component(name, one) for name, one in sorted(found.items())],
    }


def _name(one: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()


def _component(name: str, one: Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{one.version}"
    component: dict[str, Any] = {
        "type": "library", "name": name, "version": one.version, "purl": purl, "bom-ref": purl,
    }  # fmt: skip
    declared = one.metadata.json
    expression, text = declared.get("license_expression"), str(declared.get("license", ""))
    if expression:
        component["licenses"] = [{"expression": expression}]
    elif text and len(text) <= _MOST_LICENSE and text.isprintable():
        component["licenses"] = [{"license": {"name": text}}]
    return component
