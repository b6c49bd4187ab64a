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

from shared import errors
from shared.config import FederationConfig, SiteConfig, load_federation, load_site

ROOT = Path(__file__).parent.parent
FOLDERS = ("shared", "coordinator", "participant", "cli", "benchmarks", "docs")
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.toml"))
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


def is_test_of_a_folder(path: str) -> bool:
    """Whether the tree names the file's folder and not the file."""
    return path.startswith("tests/") and path.count("/") > 1


def test_every_path_in_the_tree_exists():
    """Nothing is listed that was renamed or removed."""
    assert [path for path in sorted(tree()) if not (ROOT / path).exists()] == []


def test_every_file_stands_in_the_tree():
    """Whoever adds a file says in one line what it is for; of tests, which folder it is in."""
    files = tracked()
    wanted = {path for path in files if not is_test_of_a_folder(path)}
    wanted |= {"/".join(path.split("/")[:2]) + "/" for path in files - wanted}
    assert sorted(wanted - tree()) == []


def test_without_git_the_same_files_are_found():
    """A source archive is held to the same list."""
    folders = tuple(f"{folder}/" for folder in (*FOLDERS, "tests"))
    assert {path for path in tracked() if path.startswith(folders)} <= walked()


def test_every_path_in_the_tree_has_its_comment():
    """A name without a line on what it is for helps nobody."""
    block = (ROOT / "README.md").read_text().split("```")[1]
    lines = block.strip().splitlines()
    assert [line for line in lines if not re.fullmatch(r" *\S+ +# \S.*", line)] == []


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
        if head := re.match(r"\[(\w+)\]", line):
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

    from cli.main import app

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
