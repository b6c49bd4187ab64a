"""``python -m tests.chaos.site SITE.toml``: a numpy site that also says how far each training got.

Beside ``trained.txt`` it writes ``trace.txt``: process id, stage, run and round, for the stages
begun, trained (the delta is written), committing and committed (the rename). A killed process's
last stage says exactly what the kill may cost.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from participant.workspace import Workspace
from shared.errors import GradualDiffError
from tests.chaos.names import TRACE
from tests.numpy_learner import NumpyLearner
from tests.servers import numpy_site


def trace_the_stages(file: Path) -> None:
    """From now on each stage of a training is a line, in one write."""

    def note(stage: str, run: str, number: int) -> None:
        with file.open("a") as out:
            out.write(f"{os.getpid()} {stage} {run} {number}\n")

    new_round, learn, commit = Workspace.new_round, NumpyLearner.learn, Workspace.commit

    def begun(self, run):
        note("begun", run, 0)  # which round is not known here
        return new_round(self, run)

    def trained(self, task, *rest):
        learned = learn(self, task, *rest)
        note("trained", task.run, task.round)
        return learned

    def committed(self, making, submission, **more):
        note("committing", submission.run, submission.round)
        commit(self, making, submission, **more)
        note("committed", submission.run, submission.round)

    Workspace.new_round = begun  # type: ignore[method-assign]
    NumpyLearner.learn = trained  # type: ignore[method-assign]
    Workspace.commit = committed  # type: ignore[method-assign]


if __name__ == "__main__":
    trace_the_stages(Path(sys.argv[1]).with_name(TRACE))
    try:
        numpy_site.main()
    except GradualDiffError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
