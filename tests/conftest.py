"""For all tests: where they write, in what order, what stands on another disk, and no logs.

A test that is about logs configures or captures its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
import structlog

from tests.servers.fixtures_s3 import s3_server  # noqa: F401 - a fixture for all tests
from tests.servers.rabbitmq import rabbit_server, vhost  # noqa: F401

MEMORY = Path("/dev/shm")
ROOM = 6 * 2**30


def pytest_configure(config):
    """Temporary folders lie in memory, if there is room and programs may run there.

    A synced file costs a disk's milliseconds, a small federation has a hundred of them, and what is
    killed here are processes: the disk's cache outlives them as memory does.
    """
    runs = MEMORY.is_dir() and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    if runs and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    # A shell without jobs starts what runs beside it with Ctrl-C ignored; all below it would too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Files with the most slow tests come first, so that no process is left alone with one."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def _drop(logger, method, event) -> NoReturn:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def _quiet_logs():
    # By a processor, not by level: capture_logs replaces processors and still sees everything.
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another file system than ``tmp_path``."""
    others = (MEMORY, Path("/var/tmp"))
    other = next(place for place in others if place.stat().st_dev != tmp_path.stat().st_dev)
    with tempfile.TemporaryDirectory(dir=other) as folder:
        yield Path(folder)
