"""Where a base model lies: in a folder, or on the hub under an id. Opens none of its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How huggingface_hub names the folder of a model that it keeps: owner, then name.
_IN_ITS_CACHE: Final = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)")
TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def located(model: str, folder: Path) -> str:
    """``base.model`` as one may open it: a path is relative to ``folder``, a hub id stays.

    ``owner/name`` is a path where there is such a folder, and a hub id where there is none. A path
    comes back absolute, so that nobody takes the one for the other again.
    """
    path = (folder / Path(model).expanduser()).absolute()
    return model if HUB_ID.fullmatch(model) and not path.is_dir() else str(path)


def hub_id(model: str) -> str | None:
    """The id of a model on the hub, also where ``model`` is its folder in the hub's own cache."""
    if HUB_ID.fullmatch(model):
        return model
    kept = [_IN_ITS_CACHE.fullmatch(part) for part in Path(model).parts]
    return next((f"{found[1]}/{found[2]}" for found in kept if found), None)
