"""What the documentation says is there is there, and the other way round."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import shutil
import subprocess
import tomllib
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from gradualdiff.cli.kits import METRICS_KEPT
from shared import errors
from shared.config import (
    AcceptSection,
    BrokerSection,
    FederationConfig,
    OperatedBrokerSection,
    SiteConfig,
    load_federation,
    load_site,
)

ROOT = Path(__file__).parent.parent
FOLDERS = ("shared", "coordinator", "participant", "gradualdiff", "benchmarks", "docs", "deploy")
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.toml"))
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Explained(BaseModel):
    size: int
    """Bytes."""


class Unexplained(BaseModel):
    name: str
    """``Its own``."""
    size: int


def tree() -> list[str]:
    """Every folder in the README's tree, as often as it is listed."""
    block = (ROOT / "README.md").read_text().split("```")[1]
    paths, folders = [], []
    for line in block.strip("\n").splitlines():
        name, depth = line.split("#")[0].strip(), (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def tracked() -> set[str]:
    """Every file that git knows; where there is no git (a source archive), every file there is."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            names = listed.stdout.split("\0")
            return {name for name in names if name and (ROOT / name).exists()}
    return walked()


def walked() -> set[str]:
    """Every file of the product's folders and the tests, caches left out."""
    found = set()
    for folder in (*FOLDERS, "tests"):
        for parent, names, files in os.walk(ROOT / folder):
            names[:] = [name for name in names if name != "__pycache__"]
            found |= {str((Path(parent) / f).relative_to(ROOT)) for f in files}
    return found


def test_the_tree_lists_every_folder_once():
    """Missing, listed twice, not there: each is noticed. The top folders and their packages."""
    parts = [path.split("/") for path in tracked()]
    folders = {f"{path[0]}/" for path in parts if len(path) > 1 and not path[0].startswith(".")}
    packages = {f"{p[0]}/{p[1]}/" for p in parts if p[2:] == ["__init__.py"] and p[0] != "tests"}
    assert sorted(tree()) == sorted(folders | packages)


def test_every_module_has_its_line_on_the_page_of_files():
    """Each module once, under its folder; of tests that a folder holds, the folder."""
    text = (ROOT / "docs" / "reference" / "files.md").read_text()
    listed = []
    for part in text.split("\n## ")[1:]:
        folder = part.splitlines()[0]
        names = re.findall(r"^\| `(\S+\.py)`", part, flags=re.MULTILINE)
        listed += [folder, *(folder + name for name in names)]
    modules = {p for p in tracked() if p.endswith(".py") and "/" in p}
    in_folders = {p for p in modules if p.startswith("tests/") and p.count("/") > 1}
    quiet = {p for p in modules if p.endswith(("/__init__.py", "/conftest.py"))}
    folders = {f"{Path(p).parent}/" for p in modules}
    assert sorted(folders - set(listed)) == []
    files = [path for path in listed if path.endswith(".py")]
    assert sorted(files) == sorted(modules - in_folders - quiet)


def test_the_readme_stays_short():
    """It is read from top to bottom; what does not fit belongs to a page of docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_index_names_every_page_once():
    """A page that is not in docs/index.md is not found; one that is there twice is asked for."""
    named = re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text())
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*/*.md")]
    assert sorted(named) == sorted(pages)


def test_without_git_the_same_files_are_found():
    """A source archive is held to the same list."""
    folders = tuple(f"{folder}/" for folder in (*FOLDERS, "tests"))
    assert {path for path in tracked() if path.startswith(folders)} <= walked()


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_resolve(path):
    """A moved page breaks here and not at the reader's."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_reference_is_what_the_code_says(monkeypatch):
    """Settings, events, records and errors are generated; run docs/generate_reference.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["pages"]()
    stale = [path.name for path, text in pages.items() if path.read_text() != text]
    assert stale == []


def test_a_field_without_a_meaning_is_an_error(monkeypatch):
    """What a base class says of it counts, and what the same name means elsewhere."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    from meanings import by_name, meanings

    assert meanings(OperatedBrokerSection, {})["url"] == meanings(BrokerSection, {})["url"]
    assert METRICS_KEPT in meanings(AcceptSection, {})["send_metrics"]
    with pytest.raises(KeyError, match=r"Unexplained\.size: expected what it means"):
        meanings(Unexplained, {})
    assert meanings(Unexplained, by_name([Explained])) == {"name": "`Its own`.", "size": "Bytes."}


def test_the_table_of_exit_codes_is_the_tree_of_errors():
    """Every class of shared.errors with its code, and no other."""
    text = (ROOT / "docs" / "reference" / "errors.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (yes|) \| (.+) \|$", text, flags=re.MULTILINE)
    table = {name: (int(code), retryable == "yes") for code, name, retryable, _ in rows}
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.GradualDiffError)
    ]
    assert table == {kind.__name__: (kind.exit_code, kind.retryable) for kind in kinds}


def test_the_exit_codes_of_the_how_to_are_real():
    """A code that is explained to an operator is one that the command ends with."""
    text = (ROOT / "docs" / "how-to" / "resume-a-run.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    known = {k.exit_code for k in vars(errors).values() if hasattr(k, "exit_code")}
    assert codes - known == {137}  # a kill: no process chooses that


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_loads(path):
    """An example with a misspelt setting is no example."""
    load = load_site if "site" in path.stem else load_federation
    assert load(path)


@pytest.mark.parametrize(
    ("name", "model"), [("federation.toml", FederationConfig), ("site.toml", SiteConfig)]
)
def test_the_examples_show_every_setting(name, model):
    """Given or, where it has no default or excludes another, behind a # with its name."""
    text = (ROOT / "docs" / "examples" / name).read_text()
    shown, table = set(), ""
    for line in text.splitlines():
        if head := re.match(r"(?:# )?\[(\w+)\]", line):
            table = head[1]
        elif setting := re.match(r"(?:# )?(\w+) = ", line):
            shown.add(f"{table}.{setting[1]}")
    wanted = {
        f"{table}.{key}"
        for table, field in model.model_fields.items()
        for key in section(field.annotation).model_fields
    }
    assert shown == wanted


def section(annotation):
    """The section's class, also where the whole section may be left out."""
    return next(iter(typing.get_args(annotation)), annotation)


@pytest.mark.parametrize("name", ["README.md", *(str(p.relative_to(ROOT)) for p in MARKDOWN[2:])])
def test_every_command_in_the_pages_exists(name):
    """``gradualdiff NOUN VERB --option`` as written is one that the command line knows."""
    import typer

    from gradualdiff.cli.main import app

    root = typer.main.get_command(app)
    text = (ROOT / name).read_text()
    unknown = []
    for line in re.findall(r"(?:^    |`)gradualdiff ([^`\n#&;]+)", text, flags=re.MULTILINE):
        command, words = root, line.split()
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {o for p in command.params for o in p.opts} | {"--help"}
        given = [word.split("=")[0] for word in words if word.startswith("--")]
        if command is root and not given:
            unknown.append(line)
        unknown += [f"{line}: {option}" for option in given if option not in options]
    assert unknown == []


def test_every_dependency_has_its_reason():
    """docs/decisions/dependencies.md names every package of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    names = {re.split(r"[\[>=<]", name)[0] for name in project["dependencies"] + extras}
    text = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    assert [name for name in sorted(names - {"gradualdiff-fed"}) if name not in text] == []


def test_the_project_speaks_of_no_machine():
    """No absolute path of a developer's machine in anything that is shipped."""
    text = "".join(p.read_text() for p in (*MARKDOWN, *EXAMPLES, ROOT / "CHANGELOG.md"))
    assert re.findall(r"(?<![\w.])/(?:work|root|home)/\S*", text) == []
