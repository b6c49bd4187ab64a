"""Every error this project raises on purpose, in one tree.

    GradualDiffError            1   anything of ours that has no class of its own
    |- NoWorkError              3   participant --once: nothing was asked of this site
    |- NotAcceptedError        16   a site does not take part on these terms: its [accept], its base
    |- ConfigError             10   federation.toml, site.toml or a command's argument
    |- DataError               11   a site's text: file, columns, too few examples
    |- ModelError              12   the base model: path, quantisation, fingerprint
    |  `- DivergedError        14   a training or an adapter came to a loss that is not finite
    |- PrivacyBudgetError      17   the record of what a site's privacy was spent on is gone
    |- MissingPackageError     13   a package is not installed, or in another version
    |- ForeignPackageError     15   another project's package takes a name of ours, or its mode
    |                               does not work
    |- LedgerError             20   the run's records
    |  |- LedgerDamagedError   21   an object of the ledger is missing, torn or altered
    |  |- RunExistsError       22   the run already exists (or has another config)
    |  |- RunNotFoundError     23   no such run or round in this store
    |  `- FencedError          24   another coordinator wrote the record first
    |- StoreError              30   the object store
    |  |- StoreUnavailableError 31  cannot be reached, full or read-only (retryable)
    |  |- ObjectMissingError   32   no object at this key
    |  |- ObjectExistsError    33   a conditional create met an existing object
    |  |- ObjectChangedError   34   an object is not the one that was read before
    |  |- IntegrityError       35   bytes do not have the sha256 or size they should
    |  |- GrantError           36   a signed URL is expired, altered or for something else
    |  `- StoreMissingError    37   there is no store in this directory
    |- BrokerError             40   the message broker
    |  |- BrokerUnavailableError 41 the connection is gone (retryable)
    |  |  `- BrokerSilentError 45   connected, but it gave no answer, or broke over it (retryable)
    |  |     `- MessageRejectedError 48  a queue is full: publish it again later (retryable)
    |  |- QueueMissingError    46   there is no such queue yet (retryable)
    |  |- UnroutableError      42   no queue took the message
    |  |- AccessRefusedError   43   this identity may not read or write there
    |  `- StaleDeliveryError   44   the delivery belongs to a closed connection
    |- DecodeError             50   bytes that are no event of ours (it keeps the bytes)
    |- ProtocolError           51   a well-formed event that may not be: sender, run, order
    |  `- SignatureError       53   it is not signed by whom it must be, or was altered
    |- DeltaRefusedError       52   a delta that fails its checks
    |- RunFailedError          60   the run ended without a result
    |- RunStuckError           61   nothing can move until somebody acts
    `- InterruptedRunError    130   stopped by a person; nothing is lost

``exit_code`` is what the process ends with. ``retryable`` says that the same call may go through
later without anybody fixing anything here. Messages name the field or object, what was expected,
what came, and what to do.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Collection


class GradualDiffError(Exception):
    """Root of the tree."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class NoWorkError(GradualDiffError):
    """Nothing was asked of this site in the time it waited."""

    exit_code = 3


class NotAcceptedError(GradualDiffError):
    """A site does not take part on these terms. This text, and no other one, leaves the site."""

    exit_code = 16


class ConfigError(GradualDiffError):
    """A setting is missing, misspelt or out of range."""

    exit_code = 10


class DataError(GradualDiffError):
    """A site's training text cannot be used. Never carries the text itself."""

    exit_code = 11


class ModelError(GradualDiffError):
    """The base model cannot be loaded or is not the one the run asks for."""

    exit_code = 12


class DivergedError(ModelError):
    """A training or an adapter gave a loss that is not a finite number."""

    exit_code = 14


class PrivacyBudgetError(GradualDiffError):
    """What a site spent of its differential privacy is not known any more: it does not train."""

    exit_code = 17


class MissingPackageError(GradualDiffError):
    """A package is needed for this and is not installed, or in another version."""

    exit_code = 13


class ForeignPackageError(GradualDiffError):
    """Another project's package takes a name of ours, or offers a mode that does not work.

    That a package named shared, coordinator or participant comes first is told by
    ``gradualdiff/entry.py``, which runs before anything of ours can be imported.
    """

    exit_code = 15


class LedgerError(GradualDiffError):
    """The run's records do not allow this."""

    exit_code = 20


class LedgerDamagedError(LedgerError):
    """An object of the ledger is missing, incomplete or altered."""

    exit_code = 21


class RunExistsError(LedgerError):
    """The run already exists."""

    exit_code = 22


class RunNotFoundError(LedgerError):
    """No such run or round in this store."""

    exit_code = 23


class FencedError(LedgerError):
    """Another coordinator wrote this record first: drop the state and rebuild it."""

    exit_code = 24


class StoreError(GradualDiffError):
    """The object store refused or failed."""

    exit_code = 30


class StoreUnavailableError(StoreError):
    """The store cannot be reached, is full or read-only."""

    exit_code = 31
    retryable = True


class ObjectMissingError(StoreError):
    """There is no object at this key."""

    exit_code = 32


class ObjectExistsError(StoreError):
    """A conditional create met an existing object."""

    exit_code = 33


class ObjectChangedError(StoreError):
    """The object is no longer the one whose etag was read."""

    exit_code = 34


class IntegrityError(StoreError):
    """The bytes do not have the sha256 or the size they should."""

    exit_code = 35


class GrantError(StoreError):
    """A signed URL is expired, altered, or for another object or method."""

    exit_code = 36


class StoreMissingError(StoreError):
    """There is no store in this directory."""

    exit_code = 37


class BrokerError(GradualDiffError):
    """The message broker refused or failed."""

    exit_code = 40
    declared_otherwise: str | None = None  # the queue that is there with other arguments


class BrokerUnavailableError(BrokerError):
    """The connection to the broker is gone."""

    exit_code = 41
    retryable = True


class BrokerSilentError(BrokerUnavailableError):
    """The broker was there but did not answer a request, or failed on it (INTERNAL_ERROR).

    So behaves a queue that came back damaged: see ``shared/brokers/rabbitmq/reviving.py``.
    """

    exit_code = 45


class MessageRejectedError(BrokerSilentError):
    """The broker did not take a message: a queue is full, or broken. The connection works."""

    exit_code = 48


class QueueMissingError(BrokerError):
    """There is no such queue: not yet, or its coordinator is just declaring it again."""

    exit_code = 46
    retryable = True


class UnroutableError(BrokerError):
    """No queue took the message."""

    exit_code = 42


class AccessRefusedError(BrokerError):
    """The identity may not read or write there."""

    exit_code = 43


class StaleDeliveryError(BrokerError):
    """The delivery belongs to a connection that is closed; the broker will deliver it again."""

    exit_code = 44


class DecodeError(GradualDiffError):
    """Bytes from outside that are not one of our events. ``data`` keeps them for inspection."""

    exit_code = 50

    def __init__(self, message: str, data: bytes = b"") -> None:
        super().__init__(message)
        self.data = data


class ProtocolError(GradualDiffError):
    """A well-formed event that is not allowed: wrong sender, run or order."""

    exit_code = 51


class SignatureError(ProtocolError):
    """What was said is not signed by the key that it must be signed by, or was altered."""

    exit_code = 53


class DeltaRefusedError(GradualDiffError):
    """A delta fails its checks: digest, names, shapes, dtypes, finite values, norm."""

    exit_code = 52


class RunFailedError(GradualDiffError):
    """The run ended without a result."""

    exit_code = 60


class RunStuckError(GradualDiffError):
    """No progress is possible until somebody acts; the message says who waits for what."""

    exit_code = 61


class InterruptedRunError(GradualDiffError):
    """Stopped by a person. Everything finished is in the ledger."""

    exit_code = 130


def did_you_mean(given: object, known: Collection[str]) -> str:
    """``; did you mean X?`` where ``given`` looks like a known name, else nothing."""
    close = difflib.get_close_matches(str(given), [*known], 1)
    return f"; did you mean {close[0]}?" if close else ""
