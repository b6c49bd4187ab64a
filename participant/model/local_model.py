"""One frozen base model with one adapter in it, which several sites of a process take in turn.

Whatever a site leaves behind would be a leak, so nothing is kept between two uses but the frozen
base: the adapter is copied in whole, gradients are cleared, and the caller seeds the generators.
Knows nothing of rounds, files or schedules.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, cast

import torch

from participant.data import Message, prompt_ids
from participant.model.adapter import (
    add_adapter,
    exposed_layers,
    read_parameter,
    trainable,
    write_parameters,
)
from participant.model.batches import pad, scored_tokens
from participant.model.fingerprint import fingerprint_of
from participant.model.greedy import greedy_tokens
from participant.model.kinds.core import frozen_in
from participant.model.libraries import offline
from participant.model.loading import end_tokens, int8_layers, load_base, quantisation_facts
from participant.model.merging import adapted_layers, merged
from participant.model.numerics import describe_numerics, pick_compute_dtype
from participant.model.surprise import Surprises, surprises

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from participant.data import TokenisedExample
    from shared.adapters import AdapterSettings
    from shared.config import BaseSection
    from shared.protocol.manifest import Manifest, Numerics


class LocalModel:
    """A base model on one device with an adapter whose tensors can be read and replaced.

    ``parameters``: the adapter's float32 parameters by saved name, in name order.
    ``exposed``: its layers that tell tokens. ``tokenizer``: transformers' tokenizer.
    ``base_elements``: weights of the base. ``bases``: of an adapter that has any. Not safe for two
    threads at once; ``ModelPool`` lends it to one at a time. Raises ModelError where the
    base cannot be loaded.
    """

    def __init__(
        self,
        base: BaseSection,
        adapter: AdapterSettings,
        device: torch.device,
        bases: Path | None = None,
    ) -> None:
        self.device = device
        self.compute_dtype = pick_compute_dtype(base.compute_dtype, device)
        loaded = load_base(base, device, self.compute_dtype)
        self.fingerprint: str = fingerprint_of(loaded.folder, quantisation_facts(base))
        self.tokenizer = loaded.tokenizer
        self.base_elements: int = _elements(loaded.network)
        with offline():
            network, self._manifest, self.bases = add_adapter(loaded.network, adapter, bases)
        self._network: Any = network
        self.parameters = trainable(network)
        self.exposed = exposed_layers(network, self._manifest)
        self._head: Any = cast("Any", network).get_output_embeddings()
        self._steady = int8_layers(network) if device.type == "cpu" else []
        self.clear()

    def manifest(self) -> Manifest:
        """What the adapter is made of."""
        return self._manifest

    def numerics(self) -> Numerics:
        """What the bytes of a training depend on beside config and data."""
        return describe_numerics(self.device, self.compute_dtype)

    def load_adapter(self, read: Callable[[str], NDArray[Any]]) -> None:
        """Copy a whole adapter in: ``read(name)`` is float32 of the manifest's shape."""
        self.clear()
        write_parameters(self.parameters, read)

    def check_merges(self) -> None:
        """Raises ModelError if directions cannot be merged into this base."""
        adapted_layers(self._network, self._manifest)

    def merged(
        self, read: Callable[[str], NDArray[Any]]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, ``scale B A`` of ``read(name)`` is part of the base's weights.

        ``read``: float32 factors beside the adapter's own, of any rank. Afterwards the base has
        its own bytes again. Raises ModelError as ``check_merges`` does, and for what does not fit.
        """
        return merged(adapted_layers(self._network, self._manifest), read)

    def read(self, name: str) -> NDArray[np.float32]:
        """One adapter tensor; on the CPU a view, valid until the next change."""
        return read_parameter(self.parameters[name])

    def frozen(self, layer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The bases of one layer: B (outputs, rank), A (rank, inputs)."""
        b, a = frozen_in(self._network.get_submodule(layer))
        return read_parameter(b), read_parameter(a)

    def clear(self) -> None:
        """Forget gradients, and which tensors get any; leave training mode."""
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.requires_grad_(True)
        self._network.eval()
        for layer in self._steady:
            layer.training = True

    @contextlib.contextmanager
    def training(
        self, *, gradient_checkpointing: bool, only: Collection[str] | None = None
    ) -> Iterator[None]:
        """Train mode (dropout) inside the block; cleared afterwards, whatever happened.

        Gradients are taken of the tensors named in ``only``; None: of all.
        """
        if gradient_checkpointing:
            # Re-entrant checkpointing would need inputs with gradients, and the base is frozen.
            self._network.activation_checkpointing_enable({"use_reentrant": False})
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(only is None or name in only)
        self._network.train()
        try:
            yield
        finally:
            if gradient_checkpointing:
                self._network.activation_checkpointing_disable()
            self.clear()

    def answer_nll(self, examples: Sequence[TokenisedExample]) -> torch.Tensor:
        """Sum of -log p over the examples' answer tokens, in nats: a float32 scalar with a graph.

        Logits are computed at answer positions only. No attention mask is needed: padding is on
        the right and attention is causal, so no answer sees it.
        """
        logits, targets = self._answer_logits(examples)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def answer_surprises(self, examples: Sequence[TokenisedExample]) -> list[Surprises]:
        """For each example alone, how surprising each of its answer tokens is."""
        with torch.inference_mode():
            logits, targets = self._answer_logits(examples)
            found = surprises(logits, targets)
        parts = torch.split(found, [scored_tokens(example) for example in examples], dim=1)
        return [Surprises(*part.cpu().numpy()) for part in parts]

    def _answer_logits(
        self, examples: Sequence[TokenisedExample]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """At all answer positions: logits, float32 [n, vocabulary], and tokens, int64 [n]."""
        batch = pad(examples, self.device)
        with self._head_sees(batch.rows), self._autocast():
            logits = self._network(input_ids=batch.input_ids, use_cache=False).logits
        return logits.flatten(0, -2).float(), batch.targets

    def replies(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """The greedy answer to each user message, put as in training.

        ``batch_size`` prompts are decoded together, neighbours in length first; with 1 every
        reply is computed alone, to the same bytes whatever the other prompts are. Raises
        InterruptedRunError when ``should_stop()`` turns true.
        """
        rows = [prompt_ids([Message("user", prompt)], self.tokenizer) for prompt in prompts]
        answers = self.continuations(rows, max_new_tokens, batch_size, should_stop)
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers)
        return [str(text).strip() for text in texts]

    def continuations(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[int]]:
        """What follows each row of token ids, greedily and without an end token; as ``replies``."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        ends = self.end_tokens()
        found: dict[int, list[int]] = {}
        with torch.inference_mode(), self._autocast():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = [rows[index] for index in chosen]
                answers = greedy_tokens(
                    self._network, batch, ends, max_new_tokens, self.device, should_stop
                )
                found.update(zip(chosen, answers, strict=True))
        return [found[index] for index in range(len(rows))]

    def end_tokens(self) -> set[int]:
        """Where a reply ends: any of them."""
        return end_tokens(self._network, self.tokenizer)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        )

    @contextlib.contextmanager
    def _head_sees(self, rows: torch.Tensor) -> Iterator[None]:
        """Give the output layer only ``rows`` (int64 [n]) of its input [batch * length, hidden].

        A hook, because what a model does after its head (scaling, capping) must still be done. It
        saves most of the head's work and of the logits' memory: vocabularies are large.
        """

        def select(
            _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            hidden = inputs[0].flatten(0, 1).index_select(0, rows)
            return (hidden.unsqueeze(0), *inputs[1:])

        hook = self._head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()


def _elements(network: torch.nn.Module) -> int:
    """How many weights a model has; those that are packed count as what they stand for."""
    count = 0
    for parameter in network.parameters():
        packed = getattr(parameter, "quant_state", None)
        count += math.prod(packed.shape) if packed is not None else parameter.numel()
    return count
