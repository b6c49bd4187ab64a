"""A federation without its ledger: sites train in turn, a codec takes what they send.

For comparing arms in the least time. The training, the codecs, the first adapter and every seed are
those of a run. What a run has beside them is left out: records, messages, checks, clipping to the
median norm, server optimisers, weights of the sites.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Self

import numpy as np

from gradualdiff.tuning.wire import Channel
from participant.data import load_site_data
from participant.learner.evaluation import evaluate_held_out
from participant.learner.optimizer_state import save_optimizer
from participant.learner.training import Beginning, RoundPlace, train_round
from shared.config import load_site
from shared.seeds import derive_seed
from shared.tensors.arithmetic import difference
from shared.tensors.genesis import draw_adapter
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradualdiff.tuning.arms import Arm
    from gradualdiff.tuning.wire import Values
    from participant.data import TokenisedExample
    from participant.model import LocalModel
    from shared.config import FederationConfig
    from shared.protocol.manifest import Manifest


@dataclass(frozen=True)
class SiteText:
    """A site's text as token ids."""

    site: str
    train: tuple[TokenisedExample, ...]
    held_out: tuple[TokenisedExample, ...]


def read_texts(config: FederationConfig, folder: Path, model: LocalModel) -> list[SiteText]:
    """The text of ``simulation.sites``. Raises ConfigError, DataError."""
    texts = []
    for name in config.simulation.sites:
        path = folder / name
        site = load_site(path)
        limits = config.training.max_prompt_tokens, config.training.max_answer_tokens
        data = load_site_data(site.data, path.resolve().parent, model.tokenizer, *limits)
        texts.append(SiteText(site.site.name, data.train, data.held_out))
    return texts


class Trial:
    """One arm's federation, round by round. ``done``: rounds so far. ``values``: an adapter's.

    ``ways``: by site what its deltas go through. ``model`` is borrowed with the arm's settings
    wherever it is given, and ``manifest`` is its.
    """

    def __init__(
        self, config: FederationConfig, arm: Arm, texts: Sequence[SiteText], manifest: Manifest
    ) -> None:
        self._config, self._texts = config, texts
        self._scratch = tempfile.TemporaryDirectory(prefix="gradualdiff-tune-")
        self.done = 0
        self.values = sum(spec.elements for spec in manifest.tensors)
        first = Path(self._scratch.name) / "first"
        self._whole = draw_adapter(manifest, config.run.seed, first).size
        with TensorFile(first) as file:
            self._exact: Values = {
                spec.name: np.array(file.read(spec.name)) for spec in manifest.tensors
            }
        self._held = self._exact
        packed = config.codec.packed
        self.ways = {
            text.site: Channel(manifest, arm.up, feedback=arm.feedback, packed=packed)
            for text in texts
        }
        self._down = Channel(manifest, arm.down, packed=packed) if arm.down is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    @property
    def up(self) -> float:
        """Bytes of a delta, mean over sites and rounds."""
        return mean([size for channel in self.ways.values() for size in channel.sizes] or [0])

    @property
    def down(self) -> float:
        """Bytes of what each site fetches in a round, mean over rounds."""
        return mean(self._down.sizes or [0]) if self._down is not None else self._whole

    def round(self, model: LocalModel, should_stop: Callable[[], bool]) -> None:
        """Every site trains, every delta arrives, the mean is added, the update goes out.

        Raises DivergedError, and InterruptedRunError when ``should_stop()`` turns true.
        """
        self.done += 1
        seed = derive_seed(self._config.run.seed, "round", self.done)
        total: Values = {}
        for text in self._texts:
            delta = self._train(model, text, seed, should_stop)
            own = derive_seed(seed, text.site, self.done, "codec")
            for name, values in self.ways[text.site].send(delta, own).items():
                total[name] = total[name] + values if name in total else values
        share = np.float32(1 / len(self._texts))
        self._exact = {name: exact + share * total[name] for name, exact in self._exact.items()}
        if self._down is None:
            self._held = self._exact
            return
        behind = {name: exact - self._held[name] for name, exact in self._exact.items()}
        update = self._down.send(behind, derive_seed(seed, "down"))
        self._held = {name: held + update[name] for name, held in self._held.items()}

    def loss(
        self,
        model: LocalModel,
        examples: Sequence[TokenisedExample],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Nats per answer token of ``examples`` with the adapter that the sites hold now.

        Raises as :func:`participant.learner.evaluation.evaluate_held_out` does.
        """
        model.load_adapter(self._held.__getitem__)
        return evaluate_held_out(model, examples, should_stop, lambda _: None).nll

    def _train(
        self, model: LocalModel, text: SiteText, seed: int, should_stop: Callable[[], bool]
    ) -> Values:
        """What a site's training changed."""
        training, rounds = self._config.training, self._config.run.rounds
        begin, end = (self.done - 1) / rounds, self.done / rounds
        state = Path(self._scratch.name) / f"{text.site}.optimizer"
        keeps = training.optimizer_state == "keep"
        model.load_adapter(self._held.__getitem__)
        result = train_round(
            model,
            text.train,
            training,
            RoundPlace(text.site, self.done, seed, begin, end),
            begin=Beginning(
                state=state if keeps and state.exists() else None, source=self._held.__getitem__
            ),
            should_stop=should_stop,
            report=lambda _: None,
        )
        if keeps and result.optimizer is not None:
            save_optimizer(result.optimizer, model.parameters, state)
        return {name: difference(model.read(name), held) for name, held in self._held.items()}
