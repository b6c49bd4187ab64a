"""The adapter that a round produced: written as a PEFT directory, or loaded into a model."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.adapters import kind_of
from shared.base_model import TOKENIZER_FILES, hub_id, located
from shared.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradualdiff.recorded import Recorded


@dataclass(frozen=True)
class Saved:
    """What was written where. ``base``: how its files name the base model.

    ``tokenizer``: whether the base model was on this machine, so that its tokenizer came along.
    """

    round: int
    sha: str
    path: Path
    base: str
    tokenizer: bool


@dataclass(frozen=True)
class Adapter:
    """The global adapter after a round, by its sha256."""

    run: Recorded
    round: int
    sha: str

    def save(self, path: Path | str, *, base: str | None = None, merge: bool = False) -> Saved:
        """Write a PEFT directory with a model card that says how to load it.

        ``path``: a new or empty folder. ``base``: under which name others load the base model, such
        as its hub id. ``merge``: write a whole model with the adapter merged into it; needs the
        base model and the participant's packages. Raises ConfigError, LedgerDamagedError.
        """
        from coordinator.runs.export import export_adapter, new_folder

        target = Path(path)
        history, objects = self.run.history, self.run.objects
        given = history.config.base.model
        found = located(given, self.run.path.resolve().parent)
        folder = _kept_folder(found)
        if folder is None and base is not None:
            found = located(base, Path.cwd())
        name = base or hub_id(found) or (given if folder is None else str(folder))
        find = self._find_bases(found if folder is None else str(folder))
        if not merge:
            export_adapter(history, objects, target, self.round, name, find_bases=find)
            return Saved(self.round, self.sha, target, name, _copy_tokenizer(folder, target))
        new_folder(target)
        with tempfile.TemporaryDirectory(prefix="gradualdiff-export-") as scratch:
            source = Path(scratch) / "adapter"
            export_adapter(history, objects, source, self.round, name, merged=True, find_bases=find)
            self._merge(source, target, found if folder is None else str(folder))
        return Saved(self.round, self.sha, target, name, tokenizer=True)

    def load_into(self, model: Any) -> Any:
        """Put the adapter on a model, and use it; the PEFT model.

        ``model``: one of transformers, which is changed in place, or a PEFT model, whose other
        adapters stay. The new adapter's name is ``RUN@ROUND``. Raises ModelError for a model
        that it does not fit, MissingPackageError, LedgerDamagedError.
        """
        from coordinator.runs.export import export_adapter

        try:
            from participant.model import attach_adapter
        except ImportError as error:
            raise missing_package("load_into", error) from None
        with tempfile.TemporaryDirectory(prefix="gradualdiff-adapter-") as scratch:
            folder = Path(scratch) / "adapter"
            found = located(self.run.history.config.base.model, self.run.path.resolve().parent)
            find = self._find_bases(found)
            export_adapter(self.run.history, self.run.objects, folder, self.round, find_bases=find)
            return attach_adapter(model, folder, f"{self.run.name}@{self.round}")

    def _find_bases(self, base: str) -> Callable[[Path], None] | None:
        """What finds a core adapter's bases in the base model; None where none are to be found.

        Raises MissingPackageError.
        """
        history = self.run.history
        lora = history.config.lora
        if not kind_of(lora).has_bases or lora.bases_sha is not None:
            return None
        try:
            from participant.model import write_bases
        except ImportError as error:
            raise missing_package("a core adapter's export", error) from None
        section = history.config.base.model_copy(update={"model": base})
        member = next(iter(history.members.values()))
        known = {one.bases.sha for one in history.members.values() if one.bases}
        return partial(write_bases, section, lora, member.fingerprint, known)

    def _merge(self, adapter: Path, to: Path, base: str) -> None:
        try:
            from participant.model import save_merged
        except ImportError as error:
            raise missing_package("merging", error) from None
        history = self.run.history
        section = history.config.base.model_copy(update={"model": base})
        save_merged(section, next(iter(history.members.values())).fingerprint, adapter, to)
        shutil.copyfile(adapter / "README.md", to / "README.md")


def missing_package(what: str, error: ImportError) -> MissingPackageError:
    """What to say where the participant's packages are not here."""
    return MissingPackageError(
        f"{what} needs the package {error.name}; run: pip install 'gradualdiff-fed[participant]'"
    )


def _kept_folder(model: str) -> Path | None:
    """The base model's folder on this machine; of a hub id the one in the hub's own cache."""
    folder = Path(model)
    if folder.is_absolute() and folder.is_dir():
        return folder
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # it is not there, or no id
        return None


def _copy_tokenizer(base: Path | None, to: Path) -> bool:
    """Whether there was one to copy."""
    found = [] if base is None else [base / n for n in TOKENIZER_FILES if (base / n).is_file()]
    for path in found:
        shutil.copyfile(path, to / path.name)
    return bool(found)
