"""A packaged GGUF becomes a model folder: once, whole or not at all, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import TYPE_CHECKING

import pytest

from gradualdiff.demo.packages import SMOLLM2, find_packaged
from participant.model import LocalModel, packaged, pick_device, settle_threads
from participant.model.packaged import RECORD, TOTAL, convert_gguf
from shared.config import BaseSection, LoraSection
from shared.errors import ModelError
from tests.patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.model

# What transformers 5.23, torch 2.13 and gguf 0.19 write.
WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
CONTENT = b"invented content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def ignore(_done: int, _total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "invented.gguf"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.slow
def test_the_real_package_converts_to_known_weights_with_a_chat_template(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fingerprint hashes these bytes: another digest means another base model."""
    told: list[int] = []
    source = find_packaged(SMOLLM2)
    folder = convert_gguf(source, SMOLLM2.sha256, tmp_path, lambda done, _total: told.append(done))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, TOTAL)
    assert len(set(told)) > 10
    assert capfd.readouterr() == ("", "")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    versions = json.loads((folder / RECORD).read_text())["versions"]
    assert weights == WEIGHTS, versions
    assert (folder / "chat_template.jinja").is_file()
    assert not list(tmp_path.glob(".*unfinished"))


@pytest.mark.slow
def test_the_real_model_answers_many_prompts_at_once_as_one_after_the_other(tmp_path: Path) -> None:
    """In float32, short and long prompts in one batch, padded on the left."""
    folder = convert_gguf(find_packaged(SMOLLM2), SMOLLM2.sha256, tmp_path, ignore)
    settle_threads(1)
    base = BaseSection(model=str(folder), quantisation="none", compute_dtype="float32")
    model = LocalModel(base, LoraSection(rank=4), pick_device("cpu"))
    prompts = ["What is gneiss?", "Hi", "What is a bank, in one sentence about rivers?", "2 + 2?"]
    alone = model.replies(prompts, 8)
    assert model.replies(prompts, 8, batch_size=4) == alone
    assert len(set(alone)) == 4
    assert all(alone)


def test_a_second_call_converts_nothing(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(packaged, "_write_model", lambda _gguf, folder, _: calls.append(folder))
    folder = convert_gguf(gguf, SHA256, tmp_path / "cache", ignore)
    gguf.unlink()
    assert convert_gguf(gguf, SHA256, tmp_path / "cache", ignore) == folder
    assert folder.name == f"{SHA256[:12]}-bf16"
    assert len(calls) == 1


def test_who_comes_during_a_conversion_waits_for_it(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second caller starts while the first one writes, and takes what that one wrote."""
    calls: list[Path] = []
    got: list[Path] = []

    def convert() -> None:
        got.append(convert_gguf(gguf, SHA256, tmp_path, ignore))

    second = threading.Thread(target=convert)

    def write(_gguf: Path, folder: Path, _: object) -> None:
        calls.append(folder)
        if len(calls) == 1:
            second.start()
            second.join(timeout=0.2)

    monkeypatch.setattr(packaged, "_write_model", write)
    convert()
    second.join(timeout=PATIENCE_SECONDS)
    assert len(calls) == 1
    assert got[0] == got[1]


def test_a_conversion_that_was_killed_leaves_nothing_half(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_gguf: Path, folder: Path, _: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_write_model", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(gguf, SHA256, tmp_path / "cache", ignore)
    assert not (tmp_path / "cache" / f"{SHA256[:12]}-bf16").exists()
    monkeypatch.setattr(packaged, "_write_model", lambda *_: None)
    folder = convert_gguf(gguf, SHA256, tmp_path / "cache", ignore)
    assert [path.name for path in folder.iterdir()] == [RECORD]


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(ModelError, match=f"expected sha256 {'0' * 64}, got {SHA256}"):
        convert_gguf(gguf, "0" * 64, tmp_path / "cache", ignore)
    with pytest.raises(ModelError, match="expected a GGUF file, got No such file"):
        convert_gguf(tmp_path / "none.gguf", SHA256, tmp_path / "cache", ignore)


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(ModelError, match=r"invented\.gguf: expected a GGUF that transformers"):
        convert_gguf(gguf, SHA256, tmp_path / "cache", ignore)


def test_a_folder_of_another_source_is_not_taken(tmp_path: Path, gguf: Path) -> None:
    folder = tmp_path / f"{SHA256[:12]}-bf16"
    folder.mkdir()
    with pytest.raises(ModelError, match="got no record; delete that folder"):
        convert_gguf(gguf, SHA256, tmp_path, ignore)
