"""One sha256 that says whether two sites hold the same base model.

Made from what both can read: the source weights' files, what turns text into tokens, and how the
weights are quantised. Never from quantised bytes, which differ between devices and releases.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from shared.base_model import TOKENIZER_FILES
from shared.config import canonical_json
from shared.disk.files import digest_file
from shared.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# Written by whoever saved the model; they change no number.
_WRITERS_OWN = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in name order.

    Raises ModelError if there are none: other formats are pickles, which are never opened here.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: expected a weight_map of file names: {error}") from None
        paths = [folder / name for name in names]
    else:
        paths = [folder / WEIGHTS_FILE]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(
            f"base.model: {folder} lacks {', '.join(missing)}; expected weights as safetensors "
            "(load the model with transformers and save_pretrained it once to convert)"
        )
    return paths


def fingerprint_of(folder: Path, quantisation: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of everything above; reads every weight file once."""
    facts = {
        "weights": [digest_file(path)[0] for path in weight_files(folder)],
        "config": _architecture(folder / "config.json"),
        "tokenizer": {
            name: digest_file(folder / name)[0]
            for name in TOKENIZER_FILES
            if (folder / name).is_file()
        },
        "quantisation": quantisation,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _architecture(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in _WRITERS_OWN}
