"""Pictures of runs as matplotlib's axes: the caller's own, or new ones; no file is written."""

from __future__ import annotations

import sys

import pytest

import gradualdiff as gd
from tests import federations

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two rounds."""
    folder = tmp_path_factory.mktemp("run")
    federations.run(federations.config(rounds=2), folder)
    return gd.open_store(folder / "store").run("test")


@pytest.fixture(autouse=True)
def _no_display(monkeypatch, tmp_path):
    """No window; what is written would lie in this folder."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")
    assert not list(tmp_path.iterdir())


def test_a_run_is_drawn_on_new_axes_that_may_be_restyled(run):
    """A line for each site and one for all text; pyplot has the figure, so a notebook shows it."""
    from matplotlib import pyplot as plt

    axes = run.plot()
    assert axes.figure.number in plt.get_fignums()
    names = [line.get_label() for line in axes.lines]
    assert names == ["a", "b", "c", "pooled"]
    pooled = axes.lines[-1]
    assert list(pooled.get_ydata()) == [row.held_out_nll for row in run.rounds]
    axes.set_title("mine")
    pooled.set_color("red")


def test_a_run_is_drawn_on_the_callers_axes(run):
    """Beside another one; no further figure is made."""
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2)
    assert run.plot(ax=left) is left
    assert left.get_legend() is not None
    assert (len(left.lines), len(right.lines), len(plt.get_fignums())) == (4, 0, 1)


def test_a_comparison_is_drawn_on_four_axes(run, tmp_path_factory):
    """New ones, or the caller's."""
    from matplotlib import pyplot as plt

    folder = tmp_path_factory.mktemp("other")
    federations.run(federations.config(name="other"), folder)
    compared = run.compare(gd.open_store(folder / "store").run("other"))
    loss, *_ = compared.plot()
    assert [line.get_label() for line in loss.lines if not line.get_label().startswith("_")] == [
        "test",
        "other",
    ]
    _, grid = plt.subplots(1, 4)
    assert compared.plot(grid) == tuple(grid)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    """As on the command line."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(gd.errors.MissingPackageError, match="gradualdiff-fed"):
        run.plot()
