"""The model card of an exported adapter: what it is, how it was made, how to use it, its losses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from coordinator.runs.audits import card_section
from coordinator.runs.inspection import perplexity, privacy_of
from shared.adapters import kind_of
from shared.base_model import hub_id
from shared.methods.averaging import get_averaging
from shared.methods.rules import get_rule
from shared.methods.server_optimizers import get_server_optimizer
from shared.protocol.manifest import pool_held_out

if TYPE_CHECKING:
    from coordinator.history import History
    from shared.adapters import AdapterSettings
    from shared.config import FederationConfig


def model_card(
    history: History,
    number: int,
    sha: str,
    settings: AdapterSettings,
    base: str,
    *,
    merged: bool = False,
) -> str:
    """The README.md of round ``number``'s adapter. ``base``: by what name one loads its base model.

    ``merged``: the adapter is part of a model's weights, which lie beside the card.
    """
    config = history.config
    return "\n".join(
        [
            "---",
            f"library_name: {'transformers' if merged else 'peft'}",
            *([f"base_model: {hub_id(base)}"] if hub_id(base) else []),
            f"tags: [{kind_of(settings).name}, federated-learning, gradualdiff-fed]",
            "---",
            "",
            f"# {history.run}, round {number}",
            "",
            (
                f"{'A model with a merged' if merged else 'A'} "
                f"{kind_of(settings).describe(settings)} trained by "
                f"{len(history.members)} participants with GradualDiff-Fed (arXiv:2506.19164). "
                f"No text left its site; {_joined(config)}."
            ),
            "",
            f"- Adapter sha256: `{sha}`",
            f"- Config digest: `{history.federation.digest}`",
            (
                f"- Base model: `{base}` ({config.base.quantisation} while "
                f"training), fingerprint `{next(iter(history.members.values())).fingerprint}`"
            ),
            (
                f"- Rounds: {number} of {history.total_rounds}; "
                f"weights: {config.aggregation.weights}; "
                f"averaging: {config.aggregation.averaging}; "
                f"codec: {config.codec.name}; seed: {config.run.seed}"
            ),
            "",
            *_privacy(history, number),
            "## Use",
            "",
            (
                "Run this in this folder, or name the folder in place of the dot. The losses below "
                f"are of a base held in {config.base.quantisation}."
            ),
            "",
            "```python",
            *_usage(base, merged=merged),
            "```",
            "",
            *_losses(history, number),
            "",
            *card_section(history, number),
        ]
    )


def _joined(config: FederationConfig) -> str:
    joined = get_averaging(config.aggregation.averaging).joined
    if joined:
        return joined
    taken, optimizer = get_rule(config.aggregation.rule).taken, config.server.optimizer
    steps = get_server_optimizer(optimizer).rows > 0
    step = taken if not steps else f"the step that {optimizer} makes of {taken}"
    return f"each round's global adapter is the one before plus {step}"


def _privacy(history: History, number: int) -> list[str]:
    """By site: never an epsilon without delta, unit, sampling and steps."""
    if history.config.privacy is None:
        return []
    return [
        "## Differential privacy",
        "",
        (
            "By each site's own word; held-out text, counts and times have no noise. What this "
            "means: docs/explanation/privacy.md of GradualDiff-Fed."
        ),
        "",
        *(f"- {site}: {spent.words()}" for site, spent in privacy_of(history, number).items()),
        *_not_of(history),
        "",
    ]


def _not_of(history: History) -> list[str]:
    """What no epsilon of a branch speaks of."""
    if history.origin is None:
        return []
    began = history.origin.label
    return ["", f"Not of what it began with: the adapter of {began}, whatever that gives away."]


def _losses(history: History, number: int) -> list[str]:
    losses = {n: pool_held_out(history.held_out(n).values()) for n in range(number + 1)}
    return [
        "## Held-out loss",
        "",
        (
            "Held-out loss of the global adapter, nats per answer token over all "
            "participants' held-out text (round 0 is the base model):"
        ),
        "",
        "| round | loss | perplexity | tokens |",
        "|---:|---:|---:|---:|",
        *(
            f"| {n} | {loss.nll:.4f} | {perplexity(loss):.2f} | {loss.tokens} |"
            for n, loss in losses.items()
            if loss is not None
        ),
    ]


def _usage(base: str, *, merged: bool) -> list[str]:
    """A program that answers a question; ``tests/federation/test_simulate.py`` runs it as it is."""
    load = f"AutoModelForCausalLM.from_pretrained({json.dumps('.' if merged else base)})"
    if merged:
        loading = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = {load}",
        ]
    else:
        loading = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {load}",
            'model = PeftModel.from_pretrained(base, ".")',
        ]
    return [
        *loading,
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps('.' if merged else base)})",
        'chat = [{"role": "user", "content": "How was your week?"}]',
        "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)",
        'asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids',
        "answer = model.generate(input_ids=asked, max_new_tokens=40)[0, asked.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
