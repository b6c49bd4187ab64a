"""From ``[data]`` in a ``site.toml`` to token ids: the four steps in order, and their counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from participant.data.examples import Unusable, columns_of, map_rows
from participant.data.reading import read_table
from participant.data.splitting import split_examples
from participant.data.tokenising import TokenisedExample, tokenise
from shared.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from participant.data.examples import Example
    from participant.data.splitting import Split
    from participant.data.tokenising import ChatTokenizer
    from shared.config import DataSection


# What anybody says who finds it so; the run goes on without this site's loss.
NOTHING_HELD_OUT = (
    "nothing is held out, so that no loss on unseen text is known of this site; raise "
    "data.held_out_fraction, or give more text or groups"
)


@dataclass(frozen=True)
class SiteData:
    """A site's text as token ids.

    ``truncated`` examples of the two sides were cut in prompt or answer; ``dropped`` rows are on
    neither side: not text, blank, without answer or group, or copies of held-out ones. ``records``:
    sha256 of each different example to train on, as text: the same for any tokenizer and limits.
    """

    train: tuple[TokenisedExample, ...]
    held_out: tuple[TokenisedExample, ...]
    truncated: int
    dropped: int
    records: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """sha256 of all tokens on both sides: equal where training and evaluation see the same."""
        whole = hashlib.sha256()
        for side in (self.train, self.held_out):
            whole.update(len(side).to_bytes(8, "little"))
            for example in side:
                row = [len(example.input_ids), example.answer_start, *example.input_ids]
                whole.update(np.array(row, dtype="<i8").tobytes())
        return whole.hexdigest()


def load_site_data(
    config: DataSection,
    folder: Path,
    tokenizer: ChatTokenizer,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> SiteData:
    """Read, split and tokenise a site's text. ``folder`` is what ``config.path`` is relative to.

    The same file, config and tokenizer give the same result. Raises DataError for a file that is
    missing, unreadable or not of its format, for a column that is not there, and where no example
    is usable or none is left to train on; ModelError for a tokenizer that cannot be trained with;
    MissingPackageError where the format needs a package.
    """
    rows, split, unusable = split_text(config, folder)
    dropped = Counter(unusable)
    dropped[Unusable.HELD_OUT] += split.copies
    sides: list[tuple[TokenisedExample, ...]] = []
    truncated = 0
    for side in (split.train, split.held_out):
        kept, cut, lost = _tokenise_all(side, tokenizer, max_prompt_tokens, max_answer_tokens)
        sides.append(kept)
        truncated += cut
        dropped.update(lost)
    train, held_out = sides
    if not train:
        raise _nothing_to_train(folder / config.path, rows, len(held_out), dropped)
    records = frozenset(example.digest for example in split.train)
    return SiteData(train, held_out, truncated, dropped.total(), records)


def split_text(config: DataSection, folder: Path) -> tuple[int, Split, list[Unusable]]:
    """A site's text before it is tokenised: how many rows, both sides, why rows are on neither.

    Raises DataError and MissingPackageError as :func:`load_site_data` does.
    """
    table = read_table(folder / config.path, config.format, set(columns_of(config).values()))
    examples, unusable = map_rows(table, config)
    split = split_examples(
        examples, config.held_out_fraction, config.max_held_out, config.split_seed
    )
    return len(table.rows), split, unusable


def held_out_prompts(config: DataSection, folder: Path, count: int) -> list[str]:
    """What a user said last in so many held-out chats; fewer where there are no more."""
    _, split, _ = split_text(config, folder)
    asked = (example.prompt[-1] for example in split.held_out if example.prompt)
    return [turn.content for turn in asked if turn.role == "user"][:count]


def _tokenise_all(
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> tuple[tuple[TokenisedExample, ...], int, list[Unusable]]:
    kept: list[TokenisedExample] = []
    lost: list[Unusable] = []
    truncated = 0
    for example in examples:
        result = tokenise(example, tokenizer, max_prompt_tokens, max_answer_tokens)
        if isinstance(result, Unusable):
            lost.append(result)
            continue
        kept.append(result[0])
        truncated += result[1]
    return tuple(kept), truncated, lost


def _nothing_to_train(
    path: Path, rows: int, held_out: int, dropped: Counter[Unusable]
) -> DataError:
    reasons = "; ".join(f"{n} with {reason}" for reason, n in sorted(dropped.items()) if n)
    if held_out:
        return DataError(
            f"{path}: expected examples to train on, got none: {held_out} of {rows} rows are held "
            f"out ({reasons or 'none dropped'}); lower data.held_out_fraction or give more text"
        )
    return DataError(
        f"{path}: expected usable examples, got none of {rows} rows ({reasons}); check which "
        "columns hold the text"
    )
