"""A site's text: what is learnt from it, what is held out, and what an error may say."""

from __future__ import annotations

import csv
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from participant.data import SiteData, TokenisedExample, load_site_data
from shared.config import DataSection
from shared.errors import DataError, MissingPackageError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Stands for text that may appear in no message. Every bad file below holds it.
PRIVATE = "zanzibar"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIR: dict[str, Any] = {"prompt": "prompt", "answer": "answer"}


def make_tokenizer(template: str | None = CHATML, **special: str | None) -> Any:
    """One token a byte, so that every expected id list can be read off the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{k: v for k, v in names.items() if v is not None}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(n: int) -> list[dict[str, object]]:
    return [{"prompt": f"what is {i}?", "answer": f"it is {i}", "talk": i // 4} for i in range(n)]


def load(path: Path, tokenizer: Any, limits: tuple[int, int] = (99, 99), **fields: Any) -> SiteData:
    config = DataSection.model_validate({"path": path.name, "held_out_fraction": 0.0, **fields})
    return load_site_data(config, path.parent, tokenizer, *limits)


def texts(tokenizer: Any, example: TokenisedExample) -> tuple[str, str]:
    start = example.answer_start
    return tokenizer.decode(example.input_ids[:start]), tokenizer.decode(example.input_ids[start:])


# What is learnt


def test_a_chat_template_puts_the_end_of_turn_and_nothing_more_into_the_answer(
    tmp_path: Path, tokenizer: Any
) -> None:
    """The boundary is where generation starts; the line break after the turn is not learnt."""
    data = load(write_jsonl(tmp_path / "d.jsonl", pairs(1)), tokenizer, **PAIR)
    assert texts(tokenizer, data.train[0]) == (
        "<|im_start|>user\nwhat is 0?<|im_end|>\n<|im_start|>assistant\n",
        "it is 0<|im_end|>",
    )
    assert data.train[0].input_ids[-1] == tokenizer.eos_token_id
    assert (data.truncated, data.dropped) == (0, 0)


def test_the_last_assistant_message_is_the_answer_and_what_follows_it_is_left(
    tmp_path: Path, tokenizer: Any
) -> None:
    said = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", " D ")]
    chat = [{"role": role, "content": content} for role, content in [*said, ("user", "E")]]
    path = write_jsonl(tmp_path / "d.jsonl", [{"chat": chat}])
    prompt, answer = texts(tokenizer, load(path, tokenizer, messages="chat").train[0])
    assert prompt == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == "D<|im_end|>"


def test_plain_text_is_all_answer_after_one_start_token(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"t": " keep the blanks \n"}])
    example = load(path, tokenizer, text="t").train[0]
    assert texts(tokenizer, example) == ("<|im_start|>", " keep the blanks \n<|im_end|>")


def test_without_a_bos_token_plain_text_starts_with_the_eos_token(tmp_path: Path) -> None:
    bare = make_tokenizer(bos_token=None)
    example = load(write_jsonl(tmp_path / "d.jsonl", [{"t": "x"}]), bare, text="t").train[0]
    assert texts(bare, example) == ("<|im_end|>", "x<|im_end|>")


def test_a_tokenizer_without_template_gets_the_documented_plain_form(tmp_path: Path) -> None:
    plain = make_tokenizer(None)
    example = load(write_jsonl(tmp_path / "d.jsonl", pairs(1)), plain, **PAIR).train[0]
    assert texts(plain, example) == (
        "<|im_start|>User: what is 0?\nAssistant:",
        " it is 0<|im_end|>",
    )


def test_a_template_that_closes_no_turn_still_teaches_to_stop(tmp_path: Path) -> None:
    open_ended = make_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    example = load(write_jsonl(tmp_path / "d.jsonl", pairs(1)), open_ended, **PAIR).train[0]
    assert texts(open_ended, example) == ("what is 0?\n", "it is 0<|im_end|>")


def test_cut_prompts_keep_their_end_and_cut_answers_their_start(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", pairs(1))
    data = load(path, tokenizer, (4, 3), **PAIR)
    assert texts(tokenizer, data.train[0]) == ("ant\n", "it ")
    assert data.truncated == 1
    exact = load(path, tokenizer, (99, len("it is 0") + 1), **PAIR)
    assert exact.truncated == 0


def test_rows_with_nothing_to_learn_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    bad: list[object] = [
        {"prompt": " ", "answer": "a", "talk": 1},
        {"prompt": "p", "answer": "\n", "talk": 1},
        {"prompt": "p", "answer": 7, "talk": 1},
        {"prompt": "p", "talk": 1},
        {"prompt": "p", "answer": "a", "talk": None},
        {"prompt": "p", "answer": "a"},
        {"prompt": "half \ud83d a pair", "answer": "a", "talk": 1},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [*pairs(2), *bad])
    data = load(path, tokenizer, group="talk", **PAIR)
    assert (len(data.train), data.dropped) == (2, len(bad))


@pytest.mark.parametrize(
    "cell",
    [
        "text",
        [],
        ["text"],
        [{"role": "user", "content": "A"}],
        [{"role": "assistant", "content": "A"}],
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "A"}],
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": " "}],
    ],
)
def test_chats_without_a_prompt_and_an_answer_are_dropped(
    tmp_path: Path, tokenizer: Any, cell: object
) -> None:
    good = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    path = write_jsonl(tmp_path / "d.jsonl", [{"chat": good}, {"chat": cell}])
    data = load(path, tokenizer, messages="chat")
    assert (len(data.train), data.dropped) == (1, 1)


def test_a_chat_that_the_template_refuses_is_dropped(tmp_path: Path) -> None:
    strict = make_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    end = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    rows = [{"chat": end}, {"chat": [{"role": "system", "content": "S"}, *end]}]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), strict, messages="chat")
    assert (len(data.train), data.dropped) == (1, 1)


# Formats


def test_all_formats_give_the_same_examples(tmp_path: Path, tokenizer: Any) -> None:
    """JSONL, CSV, Parquet and a saved dataset of one table are one data set, groups included."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = pairs(12)
    write_jsonl(tmp_path / "d.jsonl", rows)
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    loaded = [
        load(tmp_path / name, tokenizer, group="talk", held_out_fraction=0.3, **PAIR)
        for name in ("d.jsonl", "d.csv", "d.parquet", "saved")
    ]
    assert len(loaded[0].train) + len(loaded[0].held_out) == 12
    assert all(data == loaded[0] for data in loaded)


def test_chats_come_out_of_parquet_too(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    pq.write_table(pa.Table.from_pylist([{"chat": chat, "n": 1}]), tmp_path / "d.parquet")
    data = load(tmp_path / "d.parquet", tokenizer, messages="chat")
    assert texts(tokenizer, data.train[0])[1] == "B<|im_end|>"


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes('\ufeffprompt,answer\r\n"a, ""b""\r\nc",d\r\n\r\n'.encode())
    prompt, answer = texts(tokenizer, load(path, tokenizer, **PAIR).train[0])
    assert 'a, "b"\r\nc<|im_end|>' in prompt
    assert answer == "d<|im_end|>"


# Train and held-out (the split itself: test_splitting.py)


def test_a_copy_of_a_held_out_example_is_not_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    """Copies differ in case and white space only; used or unused held-out makes no difference."""
    rows = [{"prompt": "Same  question", "answer": "Same answer", "talk": i} for i in range(6)]
    rows[3] |= {"prompt": "same question ", "answer": "SAME ANSWER"}
    rows.append({"prompt": "another", "answer": "other", "talk": 6})
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = load(path, tokenizer, group="talk", held_out_fraction=0.3, max_held_out=1, **PAIR)
    assert [texts(tokenizer, e)[1] for e in data.train] == ["other<|im_end|>"]
    assert len(data.held_out) == 1
    assert data.dropped == 3  # seven groups of one, three of them held out


def test_without_a_group_column_every_different_example_is_its_own_group(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", pairs(20))
    data = load(path, tokenizer, held_out_fraction=0.25, **PAIR)
    assert (len(data.train), len(data.held_out)) == (15, 5)


# Files that cannot be used

ROW = f'{{"prompt": "{PRIVATE}", "answer": "{PRIVATE}"}}\n'
BAD_FILES: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("d.jsonl", b"", PAIR, "expected rows, got an empty file"),
    ("d.jsonl", b"\n\n", PAIR, "expected rows, got none"),
    ("d.csv", b"prompt,answer\n", PAIR, "expected rows, got none"),
    ("d.jsonl", f"{ROW}{{{PRIVATE}\n".encode(), PAIR, r"line 2, column 2: expected one JSON"),
    ("d.jsonl", f'["{PRIVATE}"]\n'.encode(), PAIR, "line 1: expected a JSON object, got list"),
    ("d.jsonl", ROW.encode() + b"\xff\n", PAIR, "expected UTF-8, got byte 0xff"),
    (
        "d.jsonl",
        ROW.encode(),
        {"prompt": "question", "answer": "answer"},
        "data.prompt = 'question': expected a column of that name, got prompt, answer; correct",
    ),
    ("d.jsonl", ROW.encode(), {**PAIR, "group": "talk"}, "data.group = 'talk': expected a column"),
    (
        "d.csv",
        f"{PRIVATE} is far,{PRIVATE} is near\n1,2\n".encode(),
        PAIR,
        "got 2 whose name is not shown",
    ),
    ("d.csv", f"prompt,answer\n{PRIVATE},b,c\n".encode(), PAIR, "line 2: expected 2 cells, got 3"),
    ("d.csv", f'prompt,answer\n"{PRIVATE}'.encode(), PAIR, "expected CSV, got: unexpected end"),
    ("d.csv", f"prompt,prompt\n{PRIVATE},b\n".encode(), PAIR, "got the same one twice"),
    ("d.csv", f"chat\n{PRIVATE}\n".encode(), {"messages": "chat"}, "got csv, whose cells hold no"),
    ("d.parquet", PRIVATE.encode(), PAIR, "expected Parquet, got ArrowInvalid"),
    ("d.txt", PRIVATE.encode(), PAIR, "a name that ends in .jsonl, .*, got .txt; set data.format"),
    ("d.jsonl", ROW.encode(), {**PAIR, "format": "datasets"}, "expected a folder, got a file"),
    (
        "d.jsonl",
        f'{{"prompt": " ", "answer": "{PRIVATE}"}}\n{{"prompt": "p", "answer": 1}}'.encode(),
        PAIR,
        r"got none of 2 rows \(1 with a blank prompt or answer; 1 with a cell that is not text\)",
    ),
]


@pytest.mark.parametrize(("name", "content", "fields", "message"), BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_and_its_text_is_not(
    tmp_path: Path, name: str, content: bytes, fields: dict[str, Any], message: str
) -> None:
    """The message says which file, what was expected and what came; no error keeps the text."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name, make_tokenizer(), **fields)
    assert str(tmp_path / name) in str(caught.value)
    assert PRIVATE not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: data\.path: .* got nothing there"):
        load(tmp_path / "nowhere.jsonl", tokenizer, **PAIR)


def test_an_unreadable_file_is_named(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", pairs(1))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"d\.jsonl: cannot be read: Permission denied"):
        load(path, tokenizer, **PAIR)


def test_a_folder_that_is_no_dataset_says_which_one_to_name(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "several" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="expected a folder written by save_to_disk"):
        load(tmp_path / "several", tokenizer, **PAIR)
    (tmp_path / "several" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="name one of them: train"):
        load(tmp_path / "several", tokenizer, **PAIR)
    (tmp_path / "several" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="from its reader; save it again"):
        load(tmp_path / "several" / "train", tokenizer, **PAIR)


def test_nothing_left_to_train_on_says_what_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": PRIVATE, "answer": PRIVATE, "talk": i} for i in range(2)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        DataError, match=r"1 of 2 rows are held out .*lower data\.held_out"
    ) as caught:
        load(path, tokenizer, group="talk", held_out_fraction=0.5, **PAIR)
    assert PRIVATE not in str(caught.value)


def test_a_format_whose_package_is_missing_names_the_command(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gradualdiff-fed\[participant\]'"):
        load(tmp_path / "d.parquet", tokenizer, **PAIR)


def test_a_template_that_writes_prompt_and_whole_differently_is_refused(tmp_path: Path) -> None:
    """Its boundary could only be guessed."""
    odd = make_tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(ModelError, match="continues its generation prompt"):
        load(write_jsonl(tmp_path / "d.jsonl", pairs(1)), odd, **PAIR)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = make_tokenizer(None, eos_token=None)
    with pytest.raises(ModelError, match="an eos token"):
        load(write_jsonl(tmp_path / "d.jsonl", pairs(1)), endless, **PAIR)
