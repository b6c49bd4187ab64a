"""The text of a reproduction as files: three sides, and a shard for each participant and seed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Self

from cli.reproduction.arms import ALL_TEXT, site_names
from cli.reproduction.partition import Sides, deal, distance, draw, split, words
from cli.reproduction.questions import labels_of, read_questions
from cli.reproduction.tables import ResultTable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cli.reproduction.presets import ReproduceSection
    from cli.reproduction.questions import Question


class Source:
    """The questions that were drawn, split by the preset's seed, dealt out by each run's."""

    def __init__(self, section: ReproduceSection, sides: Sides, root: Path) -> None:
        self._section = section
        self._sides = sides
        self._root = root

    @classmethod
    def prepare(cls, section: ReproduceSection, data: Path | None, root: Path) -> Self:
        """Read, draw and split. Raises DataError."""
        questions = draw(read_questions(data), section)
        least = section.participants * min(section.batch_sizes)
        return cls(section, split(questions, section.split_seed, least), root)

    @property
    def digest(self) -> str:
        """sha256 of all sides."""
        whole = hashlib.sha256()
        for side in self._sides:
            whole.update(_lines(side).encode() + b"\0")
        return whole.hexdigest()

    def folder(self, seed: int, alpha: float | None = None) -> Path:
        """The folder of a seed's files: train, dev, test, central, one for each participant."""
        folder = self._root / f"seed-{seed}"
        if alpha is not None:
            folder = self._root / f"seed-{seed}-alpha-{alpha:g}"
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(zip(("train", "dev", "test"), self._sides, strict=True))
        files[ALL_TEXT] = self._sides.train
        names = site_names(self._section.participants)
        files |= dict(zip(names, self._shards(seed, alpha), strict=True))
        for name, side in files.items():
            text = _lines(side)
            path = folder / f"{name}.jsonl"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
        return folder

    def distance(self, seed: int, alpha: float | None = None) -> float:
        """How far the participants' texts are from each other: 0 equal, 1 without a common word."""
        return distance([words(shard) for shard in self._shards(seed, alpha)])

    def tables(self, seeds: Sequence[int]) -> list[ResultTable]:
        """Sizes of the sides and, with the first seed, of the shards."""
        shards = self._shards(seeds[0])
        labels = labels_of(self._sides.train)
        names = ("train", "dev", "test", *site_names(len(shards)))
        rows: list[tuple[str, ...]] = []
        for name, side in zip(names, (*self._sides, *shards), strict=True):
            answers = sum(len(one.answer.split()) for one in side)
            by_label = [sum(one.label == label for one in side) for label in labels]
            rows.append((name, str(len(side)), str(answers), *map(str, by_label)))
        distances = ", ".join(f"{self.distance(seed):.3f}" for seed in seeds)
        by_labels = distance([[one.label for one in shard] for shard in shards])
        return [
            ResultTable(
                f"Text, participants of seed {seeds[0]} ({self._section.partition})",
                ("side", "questions", "words of answers", *(label or "-" for label in labels)),
                rows,
                "Jensen-Shannon distance of the participants' words (0 equal, 1 none in common), "
                f"by seed: {distances}; of their labels: {by_labels:.3f}.",
            )
        ]

    def _shards(self, seed: int, alpha: float | None = None) -> list[list[Question]]:
        return deal(self._sides.train, self._section, seed, alpha)


def _lines(side: Sequence[Question]) -> str:
    rows = ({"prompt": one.prompt, "answer": one.answer, "label": one.label} for one in side)
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
