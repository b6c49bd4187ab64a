"""The code of ``docs/tutorials/from-python.md``, run in its order over a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gradualdiff as gd
from tests.tiny_model import make_tiny_model, write_federation

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorials" / "from-python.md"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # third-party loading code
def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Every block, one after the other, in a folder that holds what the page says is there."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model(tmp_path / "model")
    for folder, name, rounds in (("gradualdiff-demo", "demo-1", 3), ("mine", "mine", 5)):
        path = write_federation(tmp_path / folder, model, quantisation="none", rounds=rounds)
        path.write_text(path.read_text().replace('name = "tiny"', f'name = "{name}"'))
    gd.simulate("gradualdiff-demo/federation.toml")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert names["model"].active_adapter == "demo-1@1"
    assert names["found"].findings == []
    assert (names["mine"].summary.state, names["mine"].summary.rounds) == ("finished", 2)
    said = capsys.readouterr().out
    assert "no store at nowhere" in said
    assert "finished" in said
    assert names["axes"].get_title() == "Five sites, one adapter"
    plt.close("all")


def test_a_plot_takes_ten_lines():
    """The page's first block, from the import to a file."""
    first = PAGE.read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in first.splitlines() if line]) <= 10
