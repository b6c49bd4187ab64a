"""One text file for each participant: the demo's conversations by person, or the user's own file.

Text is written to files and shown nowhere. The same source gives the same bytes, so that a second
run of the demo finds what the first one trained on.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shared.config import DataSection, canonical_json
from shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from participant.data.examples import Example

# Characters in a message. Shorter ones are greetings, longer ones pasted text.
SHORTEST, LONGEST = 15, 200
# A site needs two conversations: one to train on and one to hold out.
FEWEST_CONVERSATIONS = 2


@dataclass(frozen=True)
class SiteFile:
    """One participant's text. ``columns`` are the mapping of its ``[data]``: setting -> column."""

    name: str
    path: Path
    pairs: int
    conversations: int
    columns: Mapping[str, str] = field(
        default_factory=lambda: {"prompt": "prompt", "answer": "answer", "group": "conversation"}
    )


@dataclass(frozen=True)
class OwnData:
    """A user's own file, split. ``dropped`` rows hold nothing to learn."""

    sites: list[SiteFile]
    dropped: int


@dataclass(frozen=True, slots=True)
class _Exchange:
    conversation: str
    sender: str
    prompt: str
    answer: str


def prepare_chitchat(
    source: Path, folder: Path, participants: int, max_pairs: int | None
) -> list[SiteFile]:
    """The ``participants`` people with most replies, one file each: natural, not IID.

    A pair is what another person said and what this one replied, 15 to 200 characters each. A
    conversation of two of the chosen goes to the one with fewer pairs, whole: otherwise one
    site's prompt would be another's private reply. ``max_pairs`` keeps that many pairs of each,
    drawn over all conversations. Raises ConfigError for counts below 1, DataError for a file of
    another kind or more participants than people with two conversations.
    """
    _require_positive("participants", participants)
    if max_pairs is not None:
        _require_positive("pairs", max_pairs)
    pairs = _read_pairs(source)
    totals = Counter(pair.sender for pair in pairs)
    chosen = sorted(totals, key=lambda sender: (-totals[sender], sender))[:participants]
    owned = _owned(pairs, chosen)
    kept = [_draw(owned[sender], max_pairs) for sender in chosen]
    talks = [len({pair.conversation for pair in pairs}) for pairs in kept]
    enough = sum(n >= FEWEST_CONVERSATIONS for n in talks)
    if enough < participants:
        raise DataError(
            f"{source}: participants = {participants}: expected as many people with "
            f"{FEWEST_CONVERSATIONS} conversations, got {enough}; "
            "ask for fewer participants or more pairs"
        )
    files: list[SiteFile] = []
    for number, (own, count) in enumerate(zip(kept, talks, strict=True), start=1):
        path = folder / f"site-{number}.jsonl"
        write_rows(
            path,
            ({"prompt": p.prompt, "answer": p.answer, "conversation": p.conversation} for p in own),
        )
        files.append(SiteFile(path.stem, path, len(own), count))
    return files


def split_own_data(
    source: Path,
    folder: Path,
    participants: int,
    columns: Mapping[str, str] | None = None,
    group: str | None = None,
    seed: int = 1,
) -> OwnData:
    """A user's file (JSONL, CSV, Parquet, ``datasets`` folder) dealt out to the participants.

    ``columns`` maps ``messages``, ``prompt`` and ``answer``, or ``text`` to column names; None
    takes columns of those names. With a ``group`` column, whole groups are dealt, the largest
    first, each to whom has least; without one, examples in an order drawn from ``seed``, copies
    together. Raises ConfigError for ``participants`` below 1 or a mapping that is none, DataError
    for a file that cannot be read or has fewer groups or examples than participants.
    """
    from participant.data.examples import map_rows
    from participant.data.reading import read_table

    _require_positive("participants", participants)
    table = read_table(source, "auto")
    mapping = dict(columns) if columns is not None else _detected(source, table.columns)
    if group is not None:
        mapping["group"] = group
    try:
        config = DataSection.model_validate({"path": str(source), **mapping})
    except ValueError:
        raise ConfigError(
            f"{source}: expected one mapping (messages; prompt and answer; or text), "
            f"got {', '.join(sorted(mapping)) or 'none'}; name the columns of exactly one"
        ) from None
    examples, dropped = map_rows(table, config)
    dealt = _deal(examples, participants, None if group else seed, source)
    sites = [
        _write_own(folder / f"site-{number}.jsonl", hand, grouped=group is not None)
        for number, hand in enumerate(dealt, start=1)
    ]
    return OwnData(sites, len(dropped))


def columns_for(source: Path, given: str | None) -> dict[str, str]:
    """The ``[data]`` mapping of a file: as ``prompt=COLUMN,answer=COLUMN`` says, or by its names.

    Raises ConfigError for a mapping that is none, DataError for columns that are not there.
    """
    from participant.data.reading import read_table

    table = read_table(source, "auto")
    if given is None:
        return _detected(source, table.columns)
    pairs = [part.partition("=") for part in given.split(",")]
    mapping = {setting.strip(): column.strip() for setting, _, column in pairs}
    unknown = [s for s in mapping if s not in ("messages", "prompt", "answer", "text", "group")]
    if unknown or not all(mapping.values()) or len(mapping) < len(pairs):
        raise ConfigError(
            "--columns: expected SETTING=COLUMN, separated by commas, where SETTING is prompt, "
            f"answer, messages, text or group, got {given!r}"
        )
    table.require({f"--columns: {setting}": column for setting, column in mapping.items()})
    return mapping


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: expected 1 or more, got {value}; give a larger number")


def _read_pairs(source: Path) -> list[_Exchange]:
    try:
        conversations = json.loads(source.read_bytes())
        return [
            pair
            for name, conversation in conversations.items()
            for pair in _pairs_of(name, conversation["messages"])
        ]
    except OSError as error:
        raise DataError(
            f"{source}: expected the chitchat dataset, got {error.strerror}; check the path"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{source}: expected chitchat conversations, got what raises {type(error).__name__}; "
            "give the dataset.json of chitchat-dataset 0.9.0"
        ) from None


def _pairs_of(conversation: str, turns: Sequence[Sequence[Mapping[str, Any]]]) -> list[_Exchange]:
    """A turn is what one person sent in a row, joined by spaces. Alone, a person has no pairs."""
    said = [(turn[0]["sender"], " ".join(m["text"] for m in turn).strip()) for turn in turns]
    return [
        _Exchange(conversation, sender, prompt, answer)
        for (other, prompt), (sender, answer) in pairwise(said)
        if other != sender
        and SHORTEST <= len(prompt) <= LONGEST
        and SHORTEST <= len(answer) <= LONGEST
    ]


def _owned(pairs: Iterable[_Exchange], chosen: Sequence[str]) -> dict[str, list[_Exchange]]:
    """The chosen senders' pairs, each conversation only with the last of ``chosen`` in it."""
    rank = {sender: i for i, sender in enumerate(chosen)}
    owner: dict[str, str] = {}
    known = [pair for pair in pairs if pair.sender in rank]
    for pair in known:
        present = owner.setdefault(pair.conversation, pair.sender)
        owner[pair.conversation] = max(present, pair.sender, key=rank.__getitem__)
    owned: dict[str, list[_Exchange]] = defaultdict(list)
    for pair in known:
        if owner[pair.conversation] == pair.sender:
            owned[pair.sender].append(pair)
    return owned


def _draw(pairs: list[_Exchange], limit: int | None) -> list[_Exchange]:
    """At most ``limit`` pairs, drawn over all conversations, in their own order."""
    order = sorted(
        range(len(pairs)),
        key=lambda i: sha256(canonical_json([pairs[i].conversation, i])).digest(),
    )
    return [pairs[i] for i in sorted(order[:limit])]


def _detected(source: Path, columns: Sequence[str]) -> dict[str, str]:
    from participant.data.reading import shown_columns

    for wanted in (("messages",), ("prompt", "answer"), ("text",)):
        if set(wanted) <= set(columns):
            return {name: name for name in wanted}
    raise DataError(
        f"{source}: expected columns messages, or prompt and answer, or text, "
        f"got {shown_columns(columns)}; rename them, or "
        "name them by --columns prompt=COLUMN,answer=COLUMN"
    )


def _deal(
    examples: Sequence[Example], participants: int, seed: int | None, source: Path
) -> list[list[Example]]:
    """Groups to participants: by size (``seed`` None), or in the seed's order, one each in turn."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    if len(groups) < participants:
        kind = "groups" if seed is None else "different examples"
        raise DataError(
            f"{source}: participants = {participants}: expected as many {kind} or more, "
            f"got {len(groups)}; ask for fewer participants or give more text"
        )
    hands: list[list[Example]] = [[] for _ in range(participants)]
    if seed is None:
        for name in sorted(groups, key=lambda name: (-len(groups[name]), name)):
            min(hands, key=len).extend(groups[name])
        return hands
    order = sorted(groups, key=lambda name: sha256(canonical_json([seed, name])).digest())
    for i, name in enumerate(order):
        hands[i % participants].extend(groups[name])
    return hands


def _write_own(path: Path, examples: Sequence[Example], *, grouped: bool) -> SiteFile:
    # A site that is one group as a whole can only hold out by example.
    groups = len({e.group for e in examples})
    inner = {"group": "conversation"} if grouped and groups > 1 else {}
    column = "messages" if examples[0].prompt else "text"
    rows = [_own_row(e, named=bool(inner)) for e in examples]
    write_rows(path, rows)
    return SiteFile(path.stem, path, len(rows), groups, {column: column, **inner})


def _own_row(example: Example, *, named: bool) -> dict[str, Any]:
    said: dict[str, Any]
    if example.prompt:
        messages = [m._asdict() for m in example.prompt]
        said = {"messages": [*messages, {"role": "assistant", "content": example.answer}]}
    else:
        said = {"text": example.answer}
    return {**said, "conversation": example.group} if named else said


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all: another process may be reading the file of the run before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))
    unfinished.replace(path)
