"""A site that learns its records by heart, and one that does not, over the tiny model.

For the tests of the audit and for ``benchmarks/audit_gate.py``.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "river stone lamp cloud horse paper green winter seven window garden silver market"
WORDS = TEXT.split()
# By name: rows of text, of which half are held out, and optimiser steps of a round.
SITES = {"overfitted": (32, 300), "normal": (300, 60)}
SETTINGS = {
    "batch_size": 8,
    "learning_rate": 0.003,
    "max_prompt_tokens": 48,
    "max_answer_tokens": 48,
    "cpu_threads": 1,
}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


def make_confident_model(folder: Path) -> Path:
    """The tiny model with a larger head.

    With its own, a final norm before small random weights bounds all logits: no adapter could make
    it sure of any token, so that it could learn nothing by heart.
    """
    import torch
    from transformers import LlamaForCausalLM

    make_tiny_model(folder)
    network = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight.mul_(8)
    network.save_pretrained(folder)
    return folder


def write_text(path: Path, rows: int, seed: int, extra: str = "") -> None:
    """Records of five random words, which nobody can foresee; ``extra`` ends each one."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            answer = " ".join(draw.choice(WORDS) for _ in range(5)) + extra.format(number)
            file.write(json.dumps({"q": f"note {number}", "a": answer}) + "\n")
