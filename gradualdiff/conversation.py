"""A conversation with what a run has learnt: round by round, and beside the base model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradualdiff.adapter import missing_package
from shared.base_model import located
from shared.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradualdiff.run import Run
    from participant.data import Message
    from participant.model import Sampling, Talker

BASE = "base"


@dataclass
class Side:
    """One who answers. ``adapter``: None is the base. ``messages``: what both sides said."""

    name: str
    adapter: str | None
    messages: list[Message] = field(default_factory=list)


class Conversation:
    """``sides``: who answers each word, in this order.

    ``number``: the round, None for the last one. ``beside_base``: the base answers too. ``model``:
    where the base model is here, if not where the run's settings say. Raises RunNotFoundError for
    a round without a result, ModelError for a base that is another, MissingPackageError.
    """

    def __init__(
        self,
        run: Run,
        sampling: Sampling,
        *,
        number: int | None = None,
        beside_base: bool = False,
        model: str | None = None,
    ) -> None:
        self._run = run
        self._sampling = sampling
        self._turn = 0
        adapter = run.adapter(number)
        self._talker = _load(run, model)
        self._attached: set[str] = set()
        self.sides = [Side("", None)]
        if beside_base:
            self.sides.insert(0, Side(BASE, None))
        self.turn_to(adapter.round)

    def turn_to(self, number: int) -> None:
        """Have the adapter of another round answer from now on. Raises RunNotFoundError."""
        adapter, side = self._run.adapter(number), self.sides[-1]
        name = f"{self._run.name}@{number}"
        if name not in self._attached:
            self._talker.network = adapter.load_into(self._talker.network)
            self._attached.add(name)
        side.name, side.adapter = f"round {number}", name

    def say(self, words: str, hear: Callable[[str, str], None] = lambda *_: None) -> dict[str, str]:
        """What each side answers, by its name. ``hear(side, text)`` is told it as it comes."""
        from participant.data import Message

        answers = {}
        seed = (self._sampling.seed + self._turn) % 2**63  # said twice, it is answered anew
        for side in self.sides:
            asked = [*side.messages, Message("user", words)]
            answer = self._talker.reply(
                asked,
                side.adapter,
                replace(self._sampling, seed=seed),
                partial(hear, side.name),
            )
            side.messages = [*asked, Message("assistant", answer)]
            answers[side.name] = answer
        self._turn += 1
        return answers

    def forget(self) -> None:
        """Begin anew."""
        self._turn = 0
        for side in self.sides:
            side.messages = []


def _load(run: Run, model: str | None) -> Talker:
    try:
        from participant.model import Talker, pick_device
    except ImportError as error:
        raise missing_package("a conversation", error) from None
    base = run.config.base
    found = located(model, Path.cwd()) if model else located(base.model, _folder(run))
    talker = Talker(base.model_copy(update={"model": found}), pick_device("auto"))
    expected = next(iter(run.history.members.values())).fingerprint
    if talker.fingerprint != expected:
        raise ModelError(
            f"base.model: expected fingerprint {expected}, which the run was trained over, got "
            f"{talker.fingerprint} of {found}; name the folder or hub id of that model by --model"
        )
    return talker


def _folder(run: Run) -> Path:
    """What a path in the run's settings is relative to, as in ``Adapter.save``."""
    return run.path.resolve().parent
