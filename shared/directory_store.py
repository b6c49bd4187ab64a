"""The object store in a directory: the ``ObjectStore`` and ``Transfer`` ports without a server.

``<root>/<key>`` is the object, ``<root>/.tmp`` holds what is being written. Invariants:

- An object is an immutable inode, mode 0444. Every write makes another inode and moves it into
  place, so that hard links stand in for copies (``put_file``, ``fetch_file``, ``compose`` of one
  part) and an open reader never sees a change.
- A file is on disk before its name is, and its name before the call returns (both fsynced).
- ``create`` is link(2): the file system lets one win, between threads and processes alike.
- The etag is inode, mtime and size. Each write stamps its mtime in nanoseconds, since the kernel's
  own stamp is a few milliseconds coarse and a freed inode is soon used again.

Stricter than the port: no key begins with ``.tmp/``, and where ``a`` is an object there can be no
``a/b``. Signed URLs are good only within the process that signed them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from shared.directory_grant import Grants
from shared.errors import (
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.store import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

BUFFER_BYTES = 1_048_576
STALE_SECONDS = 3600.0
TEMPORARY = ".tmp"

_PART = re.compile(r"[A-Za-z0-9._-]+")
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space there and start again",
    errno.EDQUOT: "the disk quota is used up; free space there or have it raised, and start again",
    errno.EROFS: "the file system is read-only; mount it writable and start again",
    errno.EACCES: "no permission; give this user the right to write there and start again",
    errno.EPERM: "not permitted; use a file system with hard links that this user may write to",
}
