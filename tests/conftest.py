"""For all tests: logs go nowhere; a test that is about logs configures or captures its own."""

from __future__ import annotations

from typing import NoReturn

import pytest
import structlog

from tests.servers.fixtures_s3 import s3_server  # noqa: F401 - a fixture for all tests
from tests.servers.rabbitmq import rabbit_server, vhost  # noqa: F401


def _drop(logger, method, event) -> NoReturn:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def _quiet_logs():
    # By a processor, not by level: capture_logs replaces processors and still sees everything.
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()
