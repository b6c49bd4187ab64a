"""The error tree: what its docstring draws is what is there."""

from __future__ import annotations

import re

import pytest

from shared import errors
from shared.errors import DecodeError, GradualDiffError

LINE = re.compile(
    r"^(?P<stem>[ |`-]*)(?P<name>[A-Z]\w+Error)\s+(?P<code>\d+)(?P<says>.*)$", re.MULTILINE
)


def descendants(kind: type[GradualDiffError]) -> list[type[GradualDiffError]]:
    """``kind`` and all below it, depth first, in the order of definition."""
    found = [kind]
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            found += descendants(child)
    return found


def drawn() -> list[tuple[int, str, int, str]]:
    """Depth, name, exit code and description of each line of the drawing."""
    return [
        ((len(match["stem"]) - 4) // 3, match["name"], int(match["code"]), match["says"])
        for match in LINE.finditer(errors.__doc__ or "")
    ]


def test_the_tree_in_the_docstring_is_the_real_tree():
    """Same classes, same order, same depth, same exit codes."""
    real = [
        (len(kind.__mro__) - 4, kind.__name__, kind.exit_code)
        for kind in descendants(GradualDiffError)
    ]
    assert [(depth, name, code) for depth, name, code, _ in drawn()] == real


def test_every_exit_code_is_its_own():
    """A script can tell each error from its exit status; 0 and 2 (bad usage) are taken."""
    codes = [kind.exit_code for kind in descendants(GradualDiffError)]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 256 and code != 2 for code in codes)


def test_every_class_says_its_own_exit_code():
    """None is inherited by oversight."""
    for kind in descendants(GradualDiffError):
        assert "exit_code" in vars(kind), kind.__name__


def test_retryable_errors_are_marked_in_the_drawing():
    """And nothing else is."""
    marked = {name for _, name, _, says in drawn() if "(retryable)" in says}
    assert marked == {kind.__name__ for kind in descendants(GradualDiffError) if kind.retryable}


@pytest.mark.parametrize("kind", descendants(GradualDiffError))
def test_every_error_is_documented(kind):
    """One docstring each, none inherited."""
    assert vars(kind).get("__doc__")


def test_a_decode_error_keeps_the_bytes_out_of_its_text():
    """Whoever looks can have them; a log line does not."""
    error = DecodeError("no event", b"\x00secret")
    assert error.data == b"\x00secret"
    assert str(error) == "no event"
