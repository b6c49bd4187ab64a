"""A tiny Llama with random weights and a byte tokenizer: the real code path in seconds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path) -> Path:
    """Two layers of hidden size 64, seeded; saved as any model is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_federation(
    folder: Path,
    model: Path,
    *,
    quantisation: str = "nf4",
    rounds: int = 3,
    extra: str = "",
    run: str = "",
    sites: str = "ab",
) -> Path:
    """A federation of these sites over ``model``; the path of its federation.toml.

    ``run``: further lines of its [run]; ``extra``: further sections.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "federation.toml").write_text(
        f"""
[run]
name = "tiny"
rounds = {rounds}
participants = {json.dumps(list(sites))}
{run}
[base]
model = {json.dumps(str(model))}
quantisation = "{quantisation}"
[lora]
rank = 4
[training]
local_steps = 3
batch_size = 2
learning_rate = 0.01
max_prompt_tokens = 32
max_answer_tokens = 16
cpu_threads = 1
{extra}
[simulation]
sites = {json.dumps([f"{site}.toml" for site in sites])}
"""
    )
    for number, name in enumerate(sites):
        (folder / f"{name}.toml").write_text(
            f'[site]\nname = "{name}"\n[data]\npath = "{name}.jsonl"\nprompt = "prompt"\n'
            'answer = "answer"\nheld_out_fraction = 0.25\n'
        )
        rows = [
            {"prompt": f"count {i} at {name}", "answer": f"{i} and {i + number}"} for i in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "federation.toml"
