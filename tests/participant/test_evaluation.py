"""Held-out loss is weighted by token and repeatable; replies are greedy and stop by themselves."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from participant.data import TokenisedExample  # noqa: E402
from participant.learner.evaluation import evaluate_held_out  # noqa: E402
from participant.model import (  # noqa: E402
    LocalModel,
    batches,
    settle_threads,
)
from shared.config import BaseSection, LoraSection  # noqa: E402
from shared.errors import DataError, InterruptedRunError, ModelError  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(tiny_model, draw):
    settle_threads(1)
    base = BaseSection(model=str(tiny_model), quantisation="none", compute_dtype="float32")
    loaded = LocalModel(base, LoraSection(rank=4, dropout=0.5), torch.device("cpu"))
    loaded.load_adapter(draw(loaded.manifest()))
    return loaded


def examples(count=9):
    stream = random.Random(3)
    lengths = [(stream.randint(1, 9), stream.randint(1, 20)) for _ in range(count)]
    return [
        TokenisedExample(tuple(stream.randrange(256) for _ in range(prompt + answer)), prompt)
        for prompt, answer in lengths
    ]


def loss(model, data, **settings):
    told = []
    result = evaluate_held_out(model, data, settings.get("should_stop", lambda: False), told.append)
    return result, told


def generate_reply(model, prompt, count):
    return model.replies([prompt], count)[0]


def test_every_token_weighs_the_same_whatever_the_batches(model, monkeypatch):
    """Sum over tokens, however they are cut into rectangles; never a mean of batch means."""
    data = examples()
    one_by_one = [loss(model, [example])[0] for example in data]
    tokens = sum(part.tokens for part in one_by_one)
    expected = sum(part.nll * part.tokens for part in one_by_one) / tokens
    for limit in (2048, 60, 1):
        monkeypatch.setattr(batches, "_BATCH_TOKENS", limit)
        whole, _ = loss(model, data)
        assert whole.nll == pytest.approx(expected, rel=1e-5)
        assert (whole.tokens, whole.examples) == (tokens, len(data))


def test_no_dropout_and_no_order_in_a_held_out_loss(model):
    """The same examples give the same number, bit for bit, also when they come in other order."""
    data = examples()
    first = loss(model, data)[0]
    assert loss(model, data)[0] == first
    assert loss(model, data[::-1])[0].nll == pytest.approx(first.nll, rel=1e-6)


def test_evaluation_tells_how_far_it_is(model, monkeypatch):
    """Examples done, up to all of them."""
    monkeypatch.setattr(batches, "_BATCH_TOKENS", 40)
    told = loss(model, examples())[1]
    assert [p.done for p in told] == sorted(p.done for p in told)
    assert (told[-1].activity, told[-1].done, told[-1].total) == ("evaluate", 9, 9)
    assert len(told) > 2


def test_evaluation_stops_between_batches(model):
    """A person who presses Ctrl-C does not wait for all of it."""
    with pytest.raises(InterruptedRunError):
        loss(model, examples(), should_stop=lambda: True)


def test_nothing_to_evaluate_and_a_broken_adapter_are_errors(model, draw):
    """No token has no mean; NaN is not a loss."""
    with pytest.raises(DataError, match="held-out"):
        loss(model, [])
    good = draw(model.manifest())
    model.load_adapter(lambda name: good(name) * float("nan"))
    with pytest.raises(ModelError, match="nats per token"):
        loss(model, examples())
    model.load_adapter(good)


def test_a_reply_is_the_one_that_transformers_generates_greedily(model):
    """The loop of our own (no settings that come with a model) against the library's."""
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        known = model._network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            use_cache=True,
        )
    wanted = model.tokenizer.decode(known[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert generate_reply(model, "hello", 12) == wanted
    assert wanted


def test_a_base_without_a_chat_template_is_asked_as_it_was_trained(model, monkeypatch):
    """One that never saw a chat has none: line by line, as a site's text is put."""
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    asked = model.tokenizer.encode("User: hello\nAssistant:", add_special_tokens=False)
    (tokens,) = model.continuations([asked], 5)
    said = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert generate_reply(model, "hello", 5) == said


def test_a_reply_ends_at_the_end_token(model, monkeypatch):
    """Any of the model's end tokens ends it, and is not shown: here every byte is one."""
    assert generate_reply(model, "hello", 12)
    monkeypatch.setattr(model._network.generation_config, "eos_token_id", list(range(256)))
    assert generate_reply(model, "hello", 12) == ""


def test_many_replies_at_once_are_those_of_one_after_the_other(model):
    """Prompts of all lengths, some ended early, in the order that was asked; all batch sizes."""
    stream = random.Random(8)
    prompts = ["".join(stream.choices("abcdef ", k=stream.randint(1, 40))) for _ in range(13)]
    alone = [generate_reply(model, prompt, 9) for prompt in prompts]
    assert len(set(alone)) > 6
    for size in (1, 2, 5, 13, 64):
        assert model.replies(prompts, 9, size) == alone
    assert model.replies([], 9, 4) == []
    assert model.replies(prompts[:2], 0, 4) == ["", ""]


def test_replies_of_a_batch_end_each_at_its_own_end_token(model, monkeypatch):
    """One that ended stays as it was while its neighbours go on."""
    prompts = [f"{'x' * n} hello" for n in range(8)]
    ids = model.tokenizer.encode(generate_reply(model, prompts[0], 9), add_special_tokens=False)
    monkeypatch.setattr(model._network.generation_config, "eos_token_id", [ids[3], ids[5]])
    alone = [generate_reply(model, prompt, 9) for prompt in prompts]
    assert len({len(text) for text in alone}) > 1
    assert model.replies(prompts, 9, 8) == alone
