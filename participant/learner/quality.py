"""How good replies are, in figures that can be compared: loss per byte, BLEU, chrF, copying.

No text is kept in a result, only figures. ``answer_loss`` needs a model; everything else is a pure
function of texts. BLEU and chrF are sacrebleu's (extra ``reproduce``).
"""

from __future__ import annotations

import importlib
import math
import re
from importlib import util
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from participant.data.examples import Example, Message, Unusable
from participant.data.tokenising import tokenise
from participant.learner.evaluation import evaluate_held_out
from shared.errors import DataError, MissingPackageError
from shared.protocol.manifest import Schema

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from participant.data import TokenisedExample
    from participant.learner.port import Progress
    from participant.model import LocalModel

# A reply that repeats so many characters of the training text counts as copied. Carlini et al.
# (arXiv:2202.07646) ask for 50 tokens; whole answers are often shorter than that.
COPIED_CHARACTERS = 50
_BOUNDARY = "\x00"
_WORD = re.compile(r"\w+")

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class AnswerLoss(Schema):
    """Loss on reference answers.

    ``nll``: nats per answer token, weighted by token, the end-of-turn token included.
    ``perplexity``: exp(nll); none where that is no float. ``nll_per_byte``: the same nats by UTF-8
    bytes of answer text, which is comparable between tokenizers. ``cut`` examples were longer than
    the limits, ``dropped`` ones had no answer that can be scored.
    """

    nll: float
    perplexity: float | None
    nll_per_byte: float
    tokens: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1)]
    cut: Count
    dropped: Count


class Copying(Schema):
    """Longest run of each reply that also stands in one training text: mean and maximum.

    In characters (exact) and in words (case and punctuation ignored). ``copied``: the share of
    replies with a run of at least ``COPIED_CHARACTERS`` characters.
    """

    mean_characters: float
    max_characters: Count
    mean_words: float
    max_words: Count
    copied: Share


class ReplyScores(Schema):
    """Replies against one reference each.

    ``bleu`` and ``chrf`` are corpus scores from 0 to 100, with sacrebleu's signature beside each;
    ``bleu_unit`` is ``bleu / 100``, the scale of the paper's table, whose tokenisation and
    smoothing are not given.
    """

    replies: Annotated[int, Field(ge=1)]
    bleu: float
    bleu_unit: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    copied: Copying


def answer_loss(
    model: LocalModel,
    pairs: Sequence[tuple[str, str]],
    max_prompt_tokens: int,
    max_answer_tokens: int,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[Progress], None] = lambda _: None,
) -> AnswerLoss:
    """Loss of the adapter in ``model`` on the answers of (prompt, reference answer) pairs.

    Tokenised as for training. Raises DataError if no answer can be scored, and as
    ``evaluate_held_out`` does.
    """
    kept: list[TokenisedExample] = []
    size = cut = 0
    for prompt, answer in pairs:
        example = Example((Message("user", prompt.strip()),), answer.strip(), "", "")
        result = tokenise(example, model.tokenizer, max_prompt_tokens, max_answer_tokens)
        if isinstance(result, Unusable):
            continue
        tokenised, is_cut = result
        kept.append(tokenised)
        cut += is_cut
        whole = len(example.answer.encode())
        size += min(whole, _scored_bytes(model.tokenizer, tokenised)) if is_cut else whole
    if not size:
        raise DataError(
            f"evaluation: expected at least one answer with text, got none of {len(pairs)} pairs; "
            "give pairs of a prompt and a reference answer"
        )
    loss = evaluate_held_out(model, kept, should_stop, report)
    return AnswerLoss(
        nll=loss.nll,
        perplexity=math.exp(loss.nll) if loss.nll < 700 else None,
        nll_per_byte=loss.nll * loss.tokens / size,
        tokens=loss.tokens,
        bytes=size,
        examples=loss.examples,
        cut=cut,
        dropped=len(pairs) - len(kept),
    )


def score_replies(
    replies: Sequence[str], references: Sequence[str], training_texts: Sequence[str]
) -> ReplyScores:
    """Every figure of ``ReplyScores``; ``references[i]`` is the wanted answer of ``replies[i]``.

    ``training_texts``: the answers (and prompts, if wanted) that were trained on. Raises DataError
    without replies or with another number of references, MissingPackageError without sacrebleu.
    """
    if not replies or len(replies) != len(references):
        raise DataError(
            f"replies: expected at least one, and one reference for each, got {len(replies)} "
            f"replies and {len(references)} references; give a prompt with its answer each"
        )
    bleu, bleu_signature = _corpus_score("BLEU", replies, references)
    chrf, chrf_signature = _corpus_score("CHRF", replies, references)
    return ReplyScores(
        replies=len(replies),
        bleu=bleu,
        bleu_unit=bleu / 100,
        bleu_signature=bleu_signature,
        chrf=chrf,
        chrf_signature=chrf_signature,
        copied=copying(replies, training_texts),
    )


def copying(texts: Sequence[str], training_texts: Sequence[str]) -> Copying:
    """How much of each text stands in one of the training texts, word for word.

    Takes about 0.6 s for each 1e9 of (characters of ``texts``) x (characters of training text).
    Raises DataError without texts.
    """
    if not texts:
        raise DataError("copying: expected at least one text, got none")
    characters = _BOUNDARY.join(training_texts)
    words = f" {_BOUNDARY} ".join(" ".join(_words(text)) for text in training_texts)
    by_character = [_longest_run([*text], "", characters) for text in texts]
    by_word = [_longest_run(_words(text), " ", f" {words} ") for text in texts]
    return Copying(
        mean_characters=sum(by_character) / len(texts),
        max_characters=max(by_character),
        mean_words=sum(by_word) / len(texts),
        max_words=max(by_word),
        copied=sum(length >= COPIED_CHARACTERS for length in by_character) / len(texts),
    )


def _longest_run(units: Sequence[str], between: str, source: str) -> int:
    """Most neighbouring ``units`` whose text, with ``between`` around each, is in ``source``.

    From each beginning only a longer run than the best so far is looked for: two searches for
    each unit, each linear in the source and done in C.
    """
    best = 0
    for start, unit in enumerate(units):
        if unit == _BOUNDARY:
            continue
        while start + best < len(units):
            run = units[start : start + best + 1]
            if _BOUNDARY in run or between + between.join(run) + between not in source:
                break
            best += 1
    return best


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _scored_bytes(tokenizer: Any, example: TokenisedExample) -> int:
    """UTF-8 bytes of the text that the scored tokens of a cut answer spell."""
    tokens = list(example.input_ids[example.answer_start :])
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    # A cut may split a character; what remains of it spells no text.
    return len(text.rstrip("\ufffd").encode())


def _corpus_score(
    metric: str, replies: Sequence[str], references: Sequence[str]
) -> tuple[float, str]:
    if util.find_spec("sacrebleu") is None:
        raise MissingPackageError(
            "scores: expected the package sacrebleu, which is not installed; "
            "pip install 'gradualdiff-fed[reproduce]'"
        )
    scorer: Any = getattr(importlib.import_module("sacrebleu.metrics"), metric)()
    score = float(scorer.corpus_score(list(replies), [list(references)]).score)
    return score, str(scorer.get_signature())
