"""Figures about replies: each against a hand count or an independent computation."""

from __future__ import annotations

import math
import random
import time

import pytest

torch = pytest.importorskip("torch")

from participant.data import load_site_data  # noqa: E402
from participant.learner import quality  # noqa: E402  # after the skip
from participant.learner.evaluation import evaluate_held_out  # noqa: E402
from participant.learner.quality import answer_loss, copying, score_replies  # noqa: E402
from participant.model import LocalModel, settle_threads  # noqa: E402
from shared.config import BaseSection, DataSection, LoraSection  # noqa: E402
from shared.errors import DataError, MissingPackageError  # noqa: E402

pytestmark = pytest.mark.model

PAIRS = [("What is a bank?", "Sloping land beside water."), ("And é?", "Ein Laut: é."), ("x", "y")]


@pytest.fixture(scope="module")
def model(tiny_model, draw):
    settle_threads(1)
    base = BaseSection(model=str(tiny_model), quantisation="none", compute_dtype="float32")
    loaded = LocalModel(base, LoraSection(rank=4), torch.device("cpu"))
    loaded.load_adapter(draw(loaded.manifest()))
    return loaded


def test_loss_is_that_of_training_by_token_and_by_byte(model, tmp_path):
    """Against the site's own path from a file to a held-out loss."""
    lines = "".join(f'{{"q": "{asked}", "a": "{said}"}}\n' for asked, said in PAIRS)
    (tmp_path / "d.jsonl").write_text(lines)
    config = DataSection(path="d.jsonl", prompt="q", answer="a")
    data = load_site_data(config, tmp_path, model.tokenizer, 64, 64)
    wanted = evaluate_held_out(model, [*data.train, *data.held_out], lambda: False, lambda _: None)
    found = answer_loss(model, PAIRS, 64, 64)
    assert (found.tokens, found.examples) == (wanted.tokens, 3)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(wanted.nll), rel=1e-5)
    # 26 + 13 + 1 bytes; a byte tokenizer has as many tokens, and an end of turn for each answer.
    assert (found.bytes, found.tokens, found.cut, found.dropped) == (40, 43, 0, 0)
    assert found.nll_per_byte == pytest.approx(found.nll * 43 / 40, rel=1e-9)


def test_a_cut_answer_counts_the_bytes_that_are_scored(model):
    """Ten of 26 letters, without an end of turn; half of a two-byte letter is no text."""
    found = answer_loss(model, PAIRS[:1], 64, 10)
    assert (found.bytes, found.tokens, found.cut) == (10, 10, 1)
    found = answer_loss(model, [("x", "aé")], 64, 2)
    assert (found.bytes, found.tokens, found.cut) == (1, 2, 1)


def test_pairs_without_an_answer_are_dropped_and_nothing_else_is_an_error(model):
    assert answer_loss(model, [*PAIRS, ("x", " ")], 64, 64).dropped == 1
    with pytest.raises(DataError, match="none of 1 pairs"):
        answer_loss(model, [("x", " ")], 64, 64)


def test_bleu_and_chrf_are_sacrebleus_and_say_how_they_were_computed():
    """BLEU by hand: precisions 8/9, 6/7, 4/5, 3/4, brevity 1."""
    scores = score_replies(
        ["the cat sat on the mat now", "a dog"], ["the cat sat on the mat", "a dog ran"], ["none"]
    )
    by_hand = (8 / 9 * 6 / 7 * 4 / 5 * 3 / 4) ** 0.25
    assert scores.bleu == pytest.approx(100 * by_hand, rel=1e-6)
    assert scores.bleu_unit == pytest.approx(by_hand, rel=1e-6)
    assert scores.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert 0 < scores.chrf < 100
    assert scores.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")
    assert type(scores).model_validate_json(scores.model_dump_json()) == scores
    assert score_replies(["same text here now"], ["same text here now"], []).bleu == pytest.approx(
        100
    )
    assert score_replies(["", ""], ["a b", "c d"], []).bleu == 0


def test_replies_without_references_are_refused():
    for replies, references in ([], []), (["a"], []), (["a"], ["a", "b"]):
        with pytest.raises(DataError, match="one reference for each"):
            score_replies(replies, references, [])
    with pytest.raises(DataError, match="at least one text"):
        copying([], ["x"])


def test_without_sacrebleu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(quality.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"gradualdiff-fed\[reproduce\]"):
        score_replies(["a"], ["a"], [])


def test_copied_runs_by_hand():
    """The longest run within one training text; words without case and punctuation."""
    training = ["The quick brown fox", "jumps over the dog."]
    found = copying(["a quick brown cat", "THE DOG, quick"], training)
    # " quick brown " has 13 characters, " quick" and "k" none longer than 6.
    assert (found.max_characters, found.mean_characters) == (13, (13 + 6) / 2)
    assert (found.max_words, found.mean_words) == (2, 2)
    assert found.copied == 0
    # Not across two texts, nor over a boundary that a reply spells itself.
    assert copying(["foxjumps"], training).max_characters == len("jumps")
    assert copying(["fox\x00jumps"], training).max_characters == len("jumps")
    assert copying(["fox jumps"], training).max_words == 1
    assert copying(["ox"], ["a fox"]).max_words == 0
    assert copying([""], training).max_characters == 0
    assert copying(["abc"], []).max_characters == 0


def test_the_share_of_copied_replies_begins_at_50_characters():
    text = "".join(random.Random(5).choices("abcdefgh ", k=400))
    replies = [text[7:57], text[7:56] + "Z", "Q" + text[100:160] + "Q", "Q"]
    assert copying(replies, ["other", text]).copied == 0.5


def test_longest_copies_equal_those_of_a_table():
    """Against the textbook's quadratic table, over small alphabets that repeat a lot."""

    def by_table(reply, source):
        best, row = 0, [0] * (len(source) + 1)
        for unit in reply:
            row = [0, *(row[i] + 1 if source[i] == unit else 0 for i in range(len(source)))]
            best = max(best, *row)
        return best

    stream = random.Random(11)
    for _ in range(200):
        training = ["".join(stream.choices("ab c", k=stream.randint(0, 30))) for _ in range(3)]
        reply = "".join(stream.choices("ab c", k=stream.randint(0, 20)))
        found = copying([reply], training)
        assert found.max_characters == max(by_table(reply, text) for text in training)
        assert found.max_words == max(
            by_table(reply.split(), text.split()) if text.split() else 0 for text in training
        )


def test_copying_is_quick_on_as_much_text_as_the_paper_has():
    """64 replies of 150 characters against 500,000: about 100,000 tokens."""
    stream = random.Random(2)
    words = ["".join(stream.choices("etaoinshr", k=stream.randint(2, 9))) for _ in range(3000)]
    training = [" ".join(stream.choices(words, k=90)) for _ in range(900)]
    replies = [" ".join(stream.choices(words, k=25))[:150] for _ in range(64)]
    began = time.monotonic()
    found = copying(replies, training)
    assert time.monotonic() - began < 60
    assert 0 < found.mean_characters < 50
