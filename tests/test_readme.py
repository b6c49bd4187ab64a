"""What the documentation says is there is there, and the other way round."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

from shared.config import load_federation, load_site

ROOT = Path(__file__).parent.parent
FOLDERS = ("shared", "coordinator", "participant", "cli", "benchmarks")
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tree() -> set[str]:
    """Every path in the README's tree; folders end in a slash."""
    block = (ROOT / "README.md").read_text().split("```")[1]
    paths, folders = set(), []
    for line in block.strip().splitlines():
        name, depth = line.split("#")[0].rstrip(), (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        path = "".join(folders) + name.strip()
        paths.add(path)
        if path.endswith("/"):
            folders.append(name.strip())
    return paths


def test_every_path_in_the_tree_exists():
    """Nothing is listed that was renamed or removed."""
    assert [path for path in sorted(tree()) if not (ROOT / path).exists()] == []


def test_every_file_of_the_product_stands_in_the_tree():
    """Whoever adds a file says in one line what it is for."""
    found = set()
    for folder in FOLDERS:
        for parent, names, files in os.walk(ROOT / folder):
            names[:] = [name for name in names if name != "__pycache__"]
            found |= {str((Path(parent) / f).relative_to(ROOT)) for f in files}
    assert sorted(found - tree()) == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_resolve(path):
    """A moved page breaks here and not at the reader's."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_reference_is_what_the_code_says():
    """Settings, events, records and errors are generated; run docs/generate_reference.py."""
    pages = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["pages"]()
    stale = [path.name for path, text in pages.items() if path.read_text() != text]
    assert stale == []


@pytest.mark.parametrize("path", sorted(ROOT.rglob("docs/**/federation*.toml")), ids=str)
def test_every_example_federation_loads(path):
    """An example with a misspelt setting is no example."""
    assert load_federation(path).run.participants


@pytest.mark.parametrize("path", sorted(ROOT.rglob("docs/**/site*.toml")), ids=str)
def test_every_example_site_loads(path):
    """Likewise for sites."""
    assert load_site(path).site.name


def test_every_dependency_has_its_reason():
    """docs/decisions/dependencies.md names every package of pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    names = {re.split(r"[\[>=<]", name)[0] for name in project["dependencies"] + extras}
    text = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    assert [name for name in sorted(names - {"gradualdiff-fed"}) if name not in text] == []


def test_the_project_speaks_of_no_machine():
    """No absolute path of a developer's machine in anything that is shipped."""
    text = "".join(p.read_text() for p in MARKDOWN)
    assert re.findall(r"(?<![\w.])/(?:work|root|home)/\S*", text) == []
