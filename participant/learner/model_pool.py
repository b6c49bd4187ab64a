"""The model pool: lends the one base model in memory to one site at a time.

Several sites of a process share a base (an embedded federation on one machine), and a process has
one device: whoever trains or evaluates holds its lock for as long as it does.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from participant.model import LocalModel, pick_device, settle_threads
from shared.base_model import located

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.adapters import AdapterSettings
    from shared.config import BaseSection

# Of the process and not of a pool: torch's generators and thread count are the process's as well.
_DEVICE_LOCK = threading.RLock()


class ModelPool:
    """Holds the model that was asked for last.

    ``device``: what ``site.toml`` says. ``folder``: of the file whose ``base.model`` may be a path;
    a site that a run is announced to has only its own. None: hub ids only, no folder is looked for.
    """

    def __init__(
        self, device: Literal["auto", "cpu", "cuda"] = "auto", folder: Path | None = Path()
    ) -> None:
        self._device = device
        self._folder = folder
        self._held: tuple[tuple[str, str, int], LocalModel] | None = None

    @contextlib.contextmanager
    def borrow(
        self, base: BaseSection, adapter: AdapterSettings, threads: int, bases: Path | None = None
    ) -> Iterator[LocalModel]:
        """The model for these settings, loaded if it is not the one that is held.

        ``bases``: the file that ``adapter`` names by its sha256, if it does.

        Waits while somebody else of this process computes; then ``threads`` are settled. The
        adapter in it is whatever the last borrower left: load one first. Cleared on return. Raises
        ModelError if the base cannot be loaded, ConfigError if the device is not there.
        """
        with _DEVICE_LOCK:
            settle_threads(threads)
            model = self._load(base, adapter, threads, bases)
            try:
                yield model
            finally:
                model.clear()

    def _load(
        self, base: BaseSection, adapter: AdapterSettings, threads: int, bases: Path | None
    ) -> LocalModel:
        # What is on record and announced stays as it was written: only here is it opened.
        if self._folder is not None:
            base = base.model_copy(update={"model": located(base.model, self._folder)})
        key = (base.model_dump_json(exclude={"fingerprint"}), adapter.model_dump_json(), threads)
        if self._held is None or self._held[0] != key:
            # Let go first: two base models may not fit.
            self._held = None
            self._held = (key, LocalModel(base, adapter, pick_device(self._device), bases))
        return self._held[1]
