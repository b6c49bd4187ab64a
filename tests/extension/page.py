"""What ``docs/how-to/extend.md`` shows: the package, its files, and the settings that name each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.extension.installing import install

TEXT = (Path(__file__).parents[2] / "docs" / "how-to" / "extend.md").read_text()
PROJECT = tomllib.loads(re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)[0])["project"]
SECTIONS = {
    section.partition("\n")[0]: section
    for section in TEXT.split("\n## ")[1:]
    if "```python" in section
}


def settings(title: str) -> dict:
    """The tables of ``federation.toml`` that a section shows."""
    return tomllib.loads("".join(re.findall(r"```toml\n(.*?)```", SECTIONS[title], re.DOTALL)))


def install_page(folder: Path, version: str = PROJECT["version"]) -> None:
    """As ``pip install .`` of the page's package would."""
    for section in SECTIONS.values():
        (name,) = re.findall(r"`(toy_\w+\.py)`:", section)
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (folder / name).write_text(code)
    offers = {group.split(".")[1]: given for group, given in PROJECT["entry-points"].items()}
    install(folder, offers, PROJECT["name"], version)
