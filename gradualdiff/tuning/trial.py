"""A federation without its ledger: sites train in turn, their deltas go through a codec, the mean
is added. For comparing arms, in the least time; the training, the codecs, the first adapter and
every seed are those of a run. What a run has beside them is left out: records, messages, checks,
clipping to the median, a server optimiser.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coordinator.aggregation.genesis import draw_adapter
from gradualdiff.tuning.wire import Channel, Values
from participant.data import load_site_data
from participant.learner.evaluation import evaluate_held_out
from participant.learner.optimizer_state import save_optimizer
from participant.learner.training import Beginning, RoundPlace, train_round
from shared.config import load_site
from shared.seeds import derive_seed
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradualdiff.tuning.arms import Arm
    from participant.data import TokenisedExample
    from participant.model import LocalModel
    from shared.config import FederationConfig


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
        site, place = load_site(folder / name), (folder / name).parent
        limits = config.training.max_prompt_tokens, config.training.max_answer_tokens
        data = load_site_data(site.data, place, model.tokenizer, *limits)
        texts.append(SiteText(site.site.name, data.train, data.held_out))
    return texts


class Trial:
    """One arm's federation, round by round. ``model``: borrowed with the arm's settings.

    ``done``: rounds so far. ``up``, ``down``: bytes of each delta and of each update so far.
    """

    def __init__(self, config: FederationConfig, arm: Arm, texts: Sequence[SiteText]) -> None:
        self._config, self._arm, self._texts = config, arm, texts
        self.done = 0
        self._scratch = tempfile.TemporaryDirectory(prefix="gradualdiff-tune-")
        self._exact: Values = {}
        self._held: Values = {}
        self._ups: dict[str, Channel] = {}
        self._down: Channel | None = None

    @property
    def up(self) -> list[int]:
        """Bytes of every delta."""
        return [size for channel in self._ups.values() for size in channel.sizes]

    @property
    def down(self) -> list[int]:
        """Bytes of every round's update, which each site fetches."""
        if self._down is not None:
            return self._down.sizes
        return [sum(values.nbytes for values in self._held.values())] * self.done

    def round(self, model: LocalModel, should_stop: Callable[[], bool]) -> None:
        """Every site trains, every delta arrives, the mean is added, the update goes out."""
        if not self._exact:
            self._begin(model)
        self.done += 1
        seed = derive_seed(self._config.run.seed, "round", self.done)
        deltas = []
        for text in self._texts:
            delta = self._train(model, text, seed, should_stop)
            own = derive_seed(seed, text.site, self.done, "codec")
            deltas.append(self._ups[text.site].send(delta, own))
        for name, exact in self._exact.items():
            mean = np.mean([delta[name] for delta in deltas], axis=0, dtype=np.float64)
            self._exact[name] = np.add(exact, mean, dtype=np.float32, casting="same_kind")
        if self._down is None:
            self._held = self._exact
            return
        behind = {name: np.subtract(exact, self._held[name]) for name, exact in self._exact.items()}
        update = self._down.send(behind, derive_seed(seed, "down"))
        self._held = {name: np.add(held, update[name]) for name, held in self._held.items()}

    def loss(
        self,
        model: LocalModel,
        examples: Sequence[TokenisedExample],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Nats per answer token of ``examples`` with the adapter that the sites hold now."""
        if not self._exact:
            self._begin(model)
        model.load_adapter(self._held.__getitem__)
        return evaluate_held_out(model, examples, should_stop, lambda _: None).nll

    def _begin(self, model: LocalModel) -> None:
        """The first adapter, which every site has; and the ways that changes to it go."""
        manifest, arm = model.manifest(), self._arm
        path = Path(self._scratch.name) / "first"
        draw_adapter(manifest, self._config.run.seed, path)
        with TensorFile(path) as file:
            self._exact = {spec.name: np.array(file.read(spec.name)) for spec in manifest.tensors}
        self._held = self._exact
        self._ups = {
            text.site: Channel(manifest, arm.up, feedback=arm.feedback) for text in self._texts
        }
        if arm.down is not None:
            self._down = Channel(manifest, arm.down, feedback=False)

    def _train(
        self, model: LocalModel, text: SiteText, seed: int, should_stop: Callable[[], bool]
    ) -> Values:
        """What a site's training changed."""
        training, rounds = self._config.training, self._config.run.rounds
        begin, end = (self.done - 1) / rounds, self.done / rounds
        place = RoundPlace(text.site, self.done, seed, begin, end)
        state = Path(self._scratch.name) / f"{text.site}.optimizer"
        keeps = training.optimizer_state == "keep"
        model.load_adapter(self._held.__getitem__)
        result = train_round(
            model,
            text.train,
            training,
            place,
            begin=Beginning(state=state if keeps and state.exists() else None),
            should_stop=should_stop,
            report=lambda _: None,
        )
        if keeps and result.optimizer is not None:
            save_optimizer(result.optimizer, model.parameters, state)
        return {
            name: np.subtract(model.read(name), held, dtype=np.float32)
            for name, held in self._held.items()
        }
