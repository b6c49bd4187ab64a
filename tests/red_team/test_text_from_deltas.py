"""A coordinator asks for deltas that give their text away."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from participant.model.adapter import add_adapter, exposed_layers  # noqa: E402  # after the skip
from shared.config import AcceptSection, LoraSection  # noqa: E402
from shared.protocol.events import (  # noqa: E402
    ParticipantReady,
    RunDeclined,
    TrainingFailed,
    UploadRequested,
)
from shared.tensors.delta_file import DeltaFile  # noqa: E402
from tests.red_team.conftest import FITTING  # noqa: E402

pytestmark = pytest.mark.model

SECRETS = [f"patient {i} was given {word} at {i + 3} o'clock" for i, word in enumerate("abcdefgh")]
ONE_STEP = {**FITTING, "local_steps": 1, "batch_size": 1}
HEAD = {"target_modules": ("lm_head",), "rank": 32}
MANY = [f"answer number {i} of the many" for i in range(40)]


def answer_tokens(model_folder, text: str) -> set[int]:
    """What the attacker is after."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return set(tokenizer.encode(text, add_special_tokens=False))


def tokens_in(path, manifest) -> set[int]:
    """Read the answer's tokens from lora_B of the head: their rows go against all the others.

    A row's gradient is the sum of (p - 1[it is the next token]) A h: one sign for every token that
    is no answer, the other one for those that are.
    """
    (spec,) = [spec for spec in manifest.tensors if "lora_B" in spec.name]
    with DeltaFile(path, manifest) as delta:
        signs = np.sign(delta.read(spec))
    usual = np.sign(signs.sum(axis=0))
    return {int(row) for row in np.flatnonzero((signs * usual).mean(axis=1) < 0.6)}


@pytest.mark.parametrize("secret", SECRETS)
def test_without_limits_one_step_of_one_example_gives_its_tokens_away(
    reading, tmp_path, tiny_model, secret
):
    """The attack is real: from the signs of lora_B all tokens of the answer, and few others."""
    attack = reading([secret], None)
    attack.announce(HEAD, training=ONE_STEP)
    attack.start(attack.draw(attack.manifest), training=ONE_STEP)
    assert len(attack.submitted) == 1
    path = tmp_path / "stolen"
    path.write_bytes(attack.uploads[0])
    stolen, wanted = tokens_in(path, attack.manifest), answer_tokens(tiny_model, secret)
    assert wanted <= stolen
    assert len(stolen - wanted) <= 1  # and the end of the turn


@pytest.mark.parametrize(
    ("lora", "training", "texts", "limit"),
    [
        (HEAD, FITTING, MANY, "modules: expected adapters on attention and MLP layers only.*head"),
        ({"target_modules": ("q_proj", "lm_head")}, FITTING, MANY, "modules.*one on lm_head"),
        ({}, {**FITTING, "local_steps": 1}, MANY, "min_steps: expected at least 4, got 1"),
        ({}, {**FITTING, "local_epochs": 1, "local_steps": None}, MANY[:15], "min_examples"),
        ({}, {**FITTING, "batch_size": 1}, MANY, "min_batch: expected at least 4, got 1"),
        ({}, FITTING, [MANY[0]], "min_examples: expected at least 16, got 1"),
        ({}, FITTING, MANY[:1] * 40, "min_examples: expected at least 16, got 1"),
        ({}, {**FITTING, "max_answer_tokens": 1}, MANY, "min_answer_tokens"),
        ({}, {**FITTING, "learning_rate": 1.0, "weight_decay": 1.0}, MANY, "weight_decay"),
    ],
)
def test_with_the_limits_as_they_come_the_site_declines_by_name(
    reading, lora, training, texts, limit
):
    """Nothing leaves: no readiness, no delta, no word on the text."""
    attack = reading(texts, AcceptSection())
    attack.announce(lora, training=training)
    (declined,) = attack.said(RunDeclined)
    assert re.search(f"accept.{limit}|{limit}", declined.reason)
    attack.start("a" * 64, training=training)
    assert attack.heard == [declined]
    assert attack.uploads == attack.urls == []


def test_an_embedding_is_not_adapted_whatever_the_site_accepts(reading):
    """Its rows that moved would be the tokens of prompt and answer."""
    attack = reading(MANY, AcceptSection())
    attack.announce({"target_modules": ("embed_tokens",)})
    assert attack.said(ParticipantReady) == []
    assert len(attack.said(RunDeclined)) == 1


def test_an_announcement_that_is_declined_leaves_none_of_it_to_train(reading):
    """First one that fits, then the head under the same name: a round trains neither."""
    attack = reading(MANY, AcceptSection())
    attack.announce()
    source = attack.draw(attack.manifest)
    attack.announce(HEAD, config_digest="c" * 64)
    assert len(attack.said(RunDeclined)) == 1
    attack.start(source)
    assert attack.said(UploadRequested) == []


def test_a_batch_of_copies_leaves_no_delta_though_the_text_has_enough(reading):
    """40 different texts among 2,000 copies of one: what the steps saw is counted, then dropped."""
    attack = reading([MANY[0]] * 2000 + MANY, AcceptSection())
    attack.announce()
    attack.start(attack.draw(attack.manifest))
    (failed,) = attack.said(TrainingFailed)
    assert "accept.min_examples: expected at least 16 different examples" in failed.reason
    assert attack.uploads == []


def test_what_the_demo_asks_for_is_trained_under_the_limits(reading):
    """All linear layers, four steps of four examples."""
    attack = reading(MANY, AcceptSection())
    attack.announce()
    attack.start(attack.draw(attack.manifest))
    assert len(attack.submitted) == 1


class TestLayers:
    """What is adapted in the loaded model counts, not what it was called."""

    def exposed(self, network, targets) -> tuple[str, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of a tied layer
            wrapped, manifest, _ = add_adapter(network, LoraSection(rank=2, target_modules=targets))
        return exposed_layers(wrapped, manifest)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_head_is_found_tied_or_not(self, tied):
        """By identity of layer and of weight."""
        assert self.exposed(llama(tied), ("lm_head",)) == ("lm_head",)
        assert self.exposed(llama(tied), "all-linear") == ()

    def test_a_head_of_another_name_is_found_though_the_model_does_not_own_up(self):
        """PEFT's all-linear takes a head that the model does not name; it is in no block."""
        network = llama(tied=False)
        network.get_output_embeddings = lambda: None
        assert self.exposed(network, "all-linear") == ("lm_head",)

    def test_a_layer_in_a_block_that_is_as_wide_as_the_vocabulary_is_found(self):
        """A crafted model may put its head where the attention is."""
        network = llama(tied=False)
        network.model.layers[0].mlp.up_proj = torch.nn.Linear(16, VOCABULARY)
        assert self.exposed(network, ("up_proj",)) == ("model.layers.0.mlp.up_proj",)


VOCABULARY = 50


def llama(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)
