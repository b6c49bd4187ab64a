"""Answers from the I/O thread to the threads that wait for them."""

from __future__ import annotations

import contextlib
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any

from shared.brokers.rabbitmq.translation import translate

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from shared.credentials import BrokerAddress


def answer(future: Future[Any], result: object) -> None:
    """Answer, unless an error came first."""
    with contextlib.suppress(InvalidStateError):  # another thread was first
        future.set_result(result)


def fail(future: Future[Any], error: BaseException) -> None:
    """Fail, unless it was answered."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def guarded(future: Future[Any], address: BrokerAddress, call: Callable[[], object]) -> None:
    """Make ``call``; its error goes to whoever waits."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - every error belongs to the one who asked
        fail(future, translate(error, address))
