"""What an adapter is worth: its loss on the evaluation's texts, and what it answers.

An adapter is known by its sha256, so what was measured once is measured for every arm and every
later start of the command.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gradualdiff.reproduction.kept import read_kept
from participant.learner.quality import AnswerLoss, ReplyScores, answer_loss, score_replies
from shared import topology
from shared.disk.files import digest_file, write_atomically
from shared.errors import DataError
from shared.tensors.genesis import draw_adapter
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from gradualdiff.reproduction.running import Laboratory
    from participant.model import LocalModel
    from shared.config import FederationConfig

SETS = ("train", "dev", "test")
REPLIES_AT_ONCE = 64


class Measurements:
    """Losses and replies of adapters, kept in ``folder/measured``. ``data``: folder of SETS."""

    def __init__(self, laboratory: Laboratory, data: Path) -> None:
        self._laboratory = laboratory
        self._data = data
        self._folder = laboratory.folder / "measured"
        self._folder.mkdir(exist_ok=True)

    def of_run(self, run: str, sha: str, config: FederationConfig) -> Measured:
        """The adapter ``sha`` of a run in the store."""
        path = self._folder / "adapter.safetensors"
        key = topology.adapter_key(run, sha)

        def fetch() -> Path:
            if not path.exists() or digest_file(path)[0] != sha:
                path.unlink(missing_ok=True)
                self._laboratory.store.fetch_file(key, path)
            return path

        return Measured(self, sha, config, fetch)

    def of_file(self, path: Path, config: FederationConfig) -> Measured:
        """An adapter that is no run's."""
        return Measured(self, digest_file(path)[0], config, lambda: path)

    def of_base(self, config: FederationConfig) -> Measured:
        """The adapter that every arm begins with: it changes nothing."""
        path = self._folder / f"base-{config.run.seed}.safetensors"
        if not path.exists():
            with self._borrowed(config) as model:
                draw_adapter(model.manifest(), config.run.seed, path)
        return self.of_file(path, config)

    def known(self, sha: str) -> dict[str, Any]:
        """What is on file of an adapter; a file that is none of ours is measured again."""
        with contextlib.suppress(DataError):
            return read_kept(self._folder / f"{sha}.json")
        return {}

    def keep(self, sha: str, name: str, value: object) -> None:
        """Put one measurement on file."""
        values = self.known(sha) | {name: value}
        data = json.dumps(values, indent=1, sort_keys=True).encode()
        write_atomically(self._folder / f"{sha}.json", data)

    def loss(self, path: Path, name: str, config: FederationConfig) -> AnswerLoss:
        """Measure an adapter on one of SETS."""
        laboratory, training = self._laboratory, config.training
        pairs = [(row["prompt"], row["answer"]) for row in self.rows(name)]
        with self._borrowed(config) as model, TensorFile(path) as adapter:
            model.load_adapter(adapter.read)
            return answer_loss(
                model,
                pairs,
                training.max_prompt_tokens,
                training.max_answer_tokens,
                laboratory.should_stop,
                lambda step: laboratory.display.report(f"loss on {name}", None, step),
            )

    def replies(self, path: Path, name: str, config: FederationConfig) -> ReplyScores:
        """What the adapter answers to prompts of one of SETS, scored against their answers."""
        sizes = self._laboratory.preset.reproduce
        rows = self.rows(name)[: sizes.prompts]
        prompts = [row["prompt"] for row in rows]
        with self._borrowed(config) as model, TensorFile(path) as adapter:
            model.load_adapter(adapter.read)
            self._laboratory.display.say(f"replies to {len(prompts)} prompts of {name}")
            replies = model.replies(
                prompts, sizes.reply_tokens, REPLIES_AT_ONCE, self._laboratory.should_stop
            )
        training = [row["answer"] for row in self.rows("train")]
        return score_replies(replies, [row["answer"] for row in rows], training)

    def rows(self, name: str) -> Sequence[dict[str, str]]:
        """The rows of one of SETS, in an order that says nothing."""
        # Lines end in \n alone: text may hold other characters that split lines, as U+2028.
        with (self._data / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
            return [json.loads(line) for line in lines]

    def _borrowed(self, config: FederationConfig) -> AbstractContextManager[LocalModel]:
        return self._laboratory.pool.borrow(config.base, config.lora, config.training.cpu_threads)


@dataclass
class Measured:
    """One adapter; what is asked of it is looked up, or measured and kept."""

    _all: Measurements
    sha: str
    _config: FederationConfig
    _fetch: Callable[[], Path]

    def loss(self, name: str) -> AnswerLoss:
        """Its loss on one of SETS."""
        key = f"loss on {name}"
        with contextlib.suppress(ValidationError):
            return AnswerLoss.model_validate(self._all.known(self.sha).get(key))
        loss = self._all.loss(self._fetch(), name, self._config)
        self._all.keep(self.sha, key, loss.model_dump(mode="json"))
        return loss

    def replies(self, name: str) -> ReplyScores:
        """The scores of its replies to prompts of one of SETS."""
        key = f"replies to {name}"
        with contextlib.suppress(ValidationError):
            return ReplyScores.model_validate(self._all.known(self.sha).get(key))
        scores = self._all.replies(self._fetch(), name, self._config)
        self._all.keep(self.sha, key, scores.model_dump(mode="json"))
        return scores
