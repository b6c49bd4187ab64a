"""``python -m tests.servers.numpy_site SITE.toml``: the participant's process without torch.

All of it is the product's but the learner, which takes ``SLOW_SECONDS`` (environment) a round,
makes deltas of ``WIDTH`` (environment, see ``manifest_of``) and writes a line to ``trained.txt``
beside the site's file for each training it finished. ``CLOCK_OFFSET`` (environment): by how many
seconds its clock is wrong.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from gradualdiff.cli.serve import make_context, stopped_by_signal
from participant.daemon import serve, serve_once
from shared.config import load_site
from shared.errors import GradualDiffError, InterruptedRunError
from shared.log import configure
from tests.numpy_learner import NumpyLearner, manifest_of


def main() -> None:
    """As ``gradualdiff participant`` does."""
    configure()
    path = Path(sys.argv[1])
    config, folder = load_site(path), path.resolve().parent
    slow = float(os.environ.get("SLOW_SECONDS", "0"))
    manifest = manifest_of(int(os.environ.get("WIDTH", "8")))
    learner = NumpyLearner(config.site.name, manifest=manifest)
    trained = learner.learn

    def learn(task, source, state, making, should_stop, *others):
        with (folder / "begun.txt").open("a") as file:
            file.write(f"{task.run} {task.round}\n")
        end = time.monotonic() + slow
        while time.monotonic() < end:
            if should_stop():
                raise InterruptedRunError("stopped")
            time.sleep(0.02)
        learned = trained(task, source, state, making, should_stop, *others)
        with (folder / "trained.txt").open("a") as file:
            file.write(f"{task.run} {task.round}\n")
        return learned

    learner.learn = learn  # type: ignore[method-assign]
    stopping = threading.Event()
    with stopped_by_signal(stopping):
        context = make_context(config, folder, learner, stopping)
        offset = float(os.environ.get("CLOCK_OFFSET", "0"))
        context = replace(context, clock=lambda: time.time() + offset)
        if "--once" in sys.argv:
            serve_once(context, 4.0)
        else:
            serve(context)


if __name__ == "__main__":
    try:
        main()
    except GradualDiffError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
