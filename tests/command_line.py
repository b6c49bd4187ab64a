"""``gradualdiff`` in this process: as the console script, without the seconds that a start costs.

What is killed, or is to share nothing with the test, gets a process of its own instead.
"""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import structlog

from gradualdiff.cli.main import main


@dataclass(frozen=True)
class Done:
    """What came of it, as of a process."""

    returncode: int
    stdout: str
    stderr: str


def gradualdiff(*arguments: object, cwd=None, stdin="") -> Done:
    """Run the command to its end, in ``cwd``. ``stdin``: what is typed there."""
    words = ["gradualdiff", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code, before = 0, structlog.get_config()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", words))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    structlog.configure(**before)
    return Done(code, out.getvalue(), err.getvalue())
