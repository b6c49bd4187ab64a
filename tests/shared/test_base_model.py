"""A base model's name: a path is relative to the file that says it, a hub id stays one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.base_model import hub_id, located


@pytest.mark.parametrize("model", ["./x", "x", "../x", "models/x", "/models/x", "~/x"])
def test_a_path_is_relative_to_its_file(tmp_path, monkeypatch, model):
    """Never to the folder that the command was started in; an absolute one stays."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "mine"
    (folder / "models" / "x").mkdir(parents=True)
    wanted = tmp_path / "home" / "x" if model == "~/x" else folder / model
    assert Path(located(model, folder)) == wanted


def test_a_hub_id_stays_unless_there_is_such_a_folder(tmp_path):
    """As it was read before: what is there wins."""
    assert located("owner/name", tmp_path) == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert located("owner/name", tmp_path) == str(tmp_path / "owner" / "name")


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("owner/name", "owner/name"),
        ("/c/hub/models--Some--a-model.v2/snapshots/12ab", "Some/a-model.v2"),
        ("/models/mine", None),
        ("./owner/name", None),
        ("none", None),
    ],
)
def test_an_id_is_known_from_the_id_or_from_the_hubs_cache(model, known):
    """Only what others can load by that name."""
    assert hub_id(model) == known
