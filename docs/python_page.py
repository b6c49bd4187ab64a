"""The page of the Python API: every name with its types, as its code and docstrings say."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from gradualdiff import api

if TYPE_CHECKING:
    from collections.abc import Iterator

# What has a page of its own, or is no class and no function.
ELSEWHERE = {
    "Event": "`SiteMoved | RunMoved | Said`",
    "FederationConfig": "The settings of a run, by section: see [config.md](config.md).",
    "errors": "The module of all errors: see [errors.md](errors.md).",
}


def python_page(note: str) -> str:
    """Every name of ``import gradualdiff``. ``note``: that the page is generated."""
    parts = [
        "# The Python API\n",
        note,
        "All of `import gradualdiff as gd`; see [from-python.md](../tutorials/from-python.md).\n",
    ]
    for name in sorted(api.__all__, key=str.lower):
        parts.append(f"## {name}\n")
        value = getattr(api, name)
        parts += [ELSEWHERE[name] + "\n"] if name in ELSEWHERE else _told(name, value)
    return "\n".join(parts)


def _told(name: str, value: Any) -> Iterator[str]:
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if isinstance(node, ast.FunctionDef):
        yield f"    {_signature(name, node)}\n"
        yield f"{_prose(node)}\n"
        return
    assert isinstance(node, ast.ClassDef)
    yield f"{_prose(node)}\n"
    fields = [f"    {ast.unparse(part)}" for part in node.body if isinstance(part, ast.AnnAssign)]
    if fields:
        yield "\n".join([*fields, ""])
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
            kinds = {ast.unparse(decorator) for decorator in part.decorator_list}
            is_value = bool(kinds & {"property", "cached_property"})
            shown = f"{part.name}: {_returned(part)}" if is_value else _signature(part.name, part)
            yield f"    {shown}\n"
            yield f"{_prose(part)}\n"


def _signature(name: str, node: ast.FunctionDef) -> str:
    arguments = (
        ast.unparse(node.args).replace("=", " = ").removeprefix("self, ").removeprefix("cls, ")
    )
    return f"{name}({'' if arguments == 'self' else arguments}) -> {_returned(node)}"


def _returned(node: ast.FunctionDef) -> str:
    return "None" if node.returns is None else ast.unparse(node.returns)


def _prose(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").replace("``", "`")
