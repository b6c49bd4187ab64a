"""The text of a reproduction as files: three sides, and a part for each participant and seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Self

from gradualdiff.reproduction.arms import ALL_TEXT, site_names
from gradualdiff.reproduction.partition import Policy, parse_policy, partition
from gradualdiff.reproduction.questions import digest_of, write_examples
from gradualdiff.reproduction.splits import Split, split, subset
from gradualdiff.reproduction.tables import ResultTable
from gradualdiff.reproduction.unlikeness import measure
from gradualdiff.reproduction.wordnet import load_questions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradualdiff.reproduction.partition import Partition
    from gradualdiff.reproduction.presets import ReproduceSection


class Source:
    """The questions that were drawn, split by the preset's seed, dealt out by each run's."""

    def __init__(self, section: ReproduceSection, sides: Split, root: Path) -> None:
        self._section = section
        self._sides = sides
        self._root = root
        self.dealt(1)  # too little text is said before anything is trained

    @classmethod
    def prepare(cls, section: ReproduceSection, data: Path | None, root: Path) -> Self:
        """Read, draw and split. Raises DataError, ConfigError."""
        questions = load_questions(data).questions
        fields = section.fields if any(q.label for q in questions) else None
        chosen = [q for q in questions if fields is None or q.label in fields]
        if section.examples is not None:
            chosen = subset(questions, section.examples, section.split_seed, fields)
        return cls(section, split(chosen, section.split_seed), root)

    @property
    def digest(self) -> str:
        """sha256 of the three sides."""
        sides = (self._sides.train, self._sides.dev, self._sides.test)
        return hashlib.sha256("".join(map(digest_of, sides)).encode()).hexdigest()

    def folder(self, seed: int, alpha: float | None = None) -> Path:
        """The folder of a seed's files: train, dev, test, central, one for each participant.

        ``alpha``: dealt by a Dirichlet distribution, whatever the preset says.
        """
        folder = self._root / f"seed-{seed}"
        if alpha is not None:
            folder = self._root / f"seed-{seed}-alpha-{alpha:g}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {"train": self._sides.train, "dev": self._sides.dev, "test": self._sides.test}
        files[ALL_TEXT] = self._sides.train
        files |= dict(
            zip(site_names(self._section.participants), self.dealt(seed, alpha).parts, strict=True)
        )
        for name, questions in files.items():
            write_examples(folder / f"{name}.jsonl", questions)
        return folder

    def dealt(self, seed: int, alpha: float | None = None) -> Partition:
        """Who trains on what. Raises DataError, ConfigError."""
        section = self._section
        policy = parse_policy(section.partition) if alpha is None else Policy("dirichlet", alpha)
        fewest = max(section.batch_sizes)
        return partition(self._sides.train, section.participants, policy, seed, fewest)

    def distance(self, seed: int, alpha: float | None = None) -> float | None:
        """How far the participants' words are apart: 0 alike, 1 nothing in common."""
        return measure(self.dealt(seed, alpha)).words

    def tables(self, seeds: Sequence[int]) -> list[ResultTable]:
        """Sizes of the sides, and of the participants' parts under each seed."""
        sides = self._sides
        said = ", ".join(
            f"{name} {len(side)}"
            for name, side in (("train", sides.train), ("dev", sides.dev), ("test", sides.test))
        )
        rows: list[tuple[str, ...]] = []
        for seed in seeds:
            found = measure(self.dealt(seed))
            for part in found.parts:
                share = "-" if part.share is None else f"{part.share:.2f}"
                largest = part.largest_label or "-"
                numbers = (part.participant, part.questions, part.answer_words, part.labels)
                rows.append((str(seed), *map(str, numbers), largest, share))
            distances = (found.words, found.words_if_iid, found.labels)
            cells = ("-" if one is None else f"{one:.3f}" for one in distances)
            rows.append((str(seed), "distance", *cells, "", ""))
        columns = ("seed", "participant", "questions", "words of answers", "labels")
        return [
            ResultTable(
                f"Text: {self._section.partition}",
                (*columns, "largest label", "its share"),
                rows,
                f"Questions: {said}, split by seed {sides.seed}; {sides.duplicates} asked twice. "
                "The lines of distances (Jensen-Shannon, 0 alike, 1 nothing in common): of the "
                "participants' words, of the same sizes dealt by chance, of their labels.",
                keys=2,
            )
        ]
