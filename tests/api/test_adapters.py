"""The adapter of a round on a model that a notebook holds, or that one talks to."""

from __future__ import annotations

import json

import pytest

import gradualdiff as gd
from tests.command_line import gradualdiff
from tests.tiny_model import make_tiny_model, write_federation

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished run of two rounds over it."""
    folder = tmp_path_factory.mktemp("run")
    path = write_federation(folder, model, quantisation="none", rounds=2)
    done = gradualdiff("simulate", path, "--json")
    assert done.returncode == 0, done.stderr
    return gd.open_store(path).run("tiny")


def logits(network):
    """What it says of some tokens."""
    network.eval()
    with torch.inference_mode():
        return network(input_ids=torch.tensor([[1, 2, 3, 4]])).logits


def test_an_adapter_is_put_on_a_bare_model_and_on_a_peft_model(run, model, tmp_path):
    """Each computes as the saved adapter does, and the adapters stay side by side."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = {}
    for number in (1, 2):
        run.adapter(number).save(tmp_path / str(number))
        base = AutoModelForCausalLM.from_pretrained(model)
        expected[number] = logits(PeftModel.from_pretrained(base, tmp_path / str(number)))
    loaded = run.adapter(1).load_into(AutoModelForCausalLM.from_pretrained(model))
    assert torch.equal(logits(loaded), expected[1])
    assert run.adapter(2).load_into(loaded) is loaded
    assert torch.equal(logits(loaded), expected[2])
    assert not torch.equal(expected[1], expected[2])
    loaded.set_adapter("tiny@1")
    assert torch.equal(logits(loaded), expected[1])


def test_a_model_that_it_does_not_fit_is_refused(run, model):
    """More layers than it has weights for, fewer, or none of those names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for other in (
        {"num_hidden_layers": 3},
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ):
        changed = AutoConfig.from_pretrained(model, **other)
        with pytest.raises(gd.errors.ModelError, match="does not fit this LlamaForCausalLM"):
            run.adapter().load_into(AutoModelForCausalLM.from_config(changed))
    with pytest.raises(gd.errors.ModelError, match="does not fit this Sequential"):
        run.adapter().load_into(torch.nn.Sequential(torch.nn.Linear(2, 2)))


# Talking to it ------------------------------------------------------------------------------


GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 8}


def conversation(run, **options):
    from gradualdiff.conversation import Conversation
    from participant.model import Sampling

    sampling = {key: options.pop(key) for key in (*GREEDY, "seed") if key in options}
    return Conversation(run, Sampling(**sampling), **options)


def test_it_says_what_transformers_and_peft_say(run, model, tmp_path):
    """The base and each round, without any draw; what was said before is said along."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def said(network, *chat):
        roles = ("user", "assistant", "user")
        told = [{"role": role, "content": text} for role, text in zip(roles, chat, strict=False)]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer = network.generate(input_ids=asked, max_new_tokens=8, do_sample=False)[0]
        return tokenizer.decode(answer[asked.shape[1] :], skip_special_tokens=True).strip()

    run.adapter(1).save(tmp_path / "one")
    bare = AutoModelForCausalLM.from_pretrained(model)
    base = said(bare, "hello")
    one = said(PeftModel.from_pretrained(bare, tmp_path / "one"), "hello")
    both = conversation(run, number=1, beside_base=True, **GREEDY)
    heard: list[tuple[str, str]] = []
    assert both.say("hello", lambda *told: heard.append(told)) == {"base": base, "round 1": one}
    for side, whole in (("base", base), ("round 1", one)):
        assert "".join(text for name, text in heard if name == side).strip() == whole
    again = both.say("and then?")
    assert again["round 1"] == said(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "one"),
        "hello",
        one,
        "and then?",
    )


def test_a_seed_draws_the_same_words_and_a_round_may_be_changed(run):
    """Whatever the run; a round that is not there changes nothing."""
    first, same, other = (conversation(run, seed=seed, max_new_tokens=12) for seed in (1, 1, 2))
    drawn = first.say("hello")
    assert drawn == same.say("hello")
    assert drawn != other.say("hello")
    assert first.say("hello") != drawn  # it is another turn
    first.forget()
    assert first.say("hello") == drawn
    with pytest.raises(gd.errors.RunNotFoundError, match="9"):
        first.turn_to(9)
    first.turn_to(1)
    assert list(first.say("hello")) == ["round 1"]


def test_a_long_conversation_keeps_its_end(run):
    """The tiny model sees 256 tokens, each a byte."""
    long = conversation(run, **GREEDY)
    for _ in range(3):
        assert isinstance(long.say("x" * 100)["round 2"], str)
    assert isinstance(long.say("y" * 1000)["round 2"], str)


def test_it_is_talked_to_on_the_command_line(run, tmp_path):
    """By --prompt for scripts, else line by line; a mistake ends no conversation."""
    there = ("chat", "tiny", "--store", run.path, "--most-tokens", "6")
    asked = gradualdiff(*there, "--base", "--json", "--prompt", "hello", "--prompt", "and you?")
    assert asked.returncode == 0, asked.stderr
    told = json.loads(asked.stdout)
    assert [one["prompt"] for one in told] == ["hello", "and you?"]
    assert all(list(one["replies"]) == ["base", "round 2"] for one in told)
    assert gradualdiff(*there, "--prompt", "hello").stdout.startswith("> hello\nround 2: ")
    typed = gradualdiff(*there, stdin="hello\n/round 7\n/round x\n/round 1\nhello\n/clear\n/quit\n")
    assert typed.returncode == 0, typed.stderr
    assert "no result of round 7" in typed.stderr
    assert "/clear" in typed.stdout
    assert "round 1 answers" in typed.stdout
    wrong = gradualdiff(*there, "--temperature", "-1")
    assert wrong.returncode == gd.errors.ConfigError.exit_code
    assert "temperature: expected 0 or more, got -1" in wrong.stderr
    other = make_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    wrong = gradualdiff(*there, "--model", other, "--prompt", "hello")
    assert wrong.returncode == gd.errors.ModelError.exit_code
    assert "--model" in wrong.stderr
