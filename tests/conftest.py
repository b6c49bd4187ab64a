"""For all tests: logs go nowhere; a test that is about logs configures or captures its own."""

from __future__ import annotations

from typing import NoReturn

import pytest
import structlog


def _drop(logger, method, event) -> NoReturn:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def _quiet_logs():
    # By a processor, not by level: capture_logs replaces processors and still sees everything.
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()
