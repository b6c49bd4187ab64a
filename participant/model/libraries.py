"""The one place that imports transformers, peft and bitsandbytes, and makes them keep quiet.

Importing them must touch no network. bitsandbytes is the reason that order matters here: on CPUs
with AVX512-BF16 its import asks the ``kernels`` package for a kernel from a hub repository, a
download that nobody asked for, and warns where that package is missing. Everything else in this
package takes the libraries from here, so that they are never imported in any other way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Make ``import kernels`` fail inside the block, and drop the warning that follows from it."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missing = object()
    before: object = sys.modules.get("kernels", missing)
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own way to forbid an import
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


# Read by huggingface_hub at each request, not at import.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True

with _without_hub_kernels():
    import bitsandbytes

import peft  # noqa: E402  # after bitsandbytes, which it imports
import transformers  # noqa: E402

# It says so at each multiplication that bfloat16 becomes float16 before int8.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def adapting() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5 in a way that the latter calls deprecated: not inside this."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        yield


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No library asks the hub for anything inside the block, whatever file it looks for."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    variable = os.environ.get("HF_HUB_OFFLINE")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # peft reads the variable itself
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable


__all__ = ["bitsandbytes", "huggingface_hub", "offline", "peft", "transformers"]
