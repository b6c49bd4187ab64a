"""``runs compare`` over embedded runs: facts, warnings, tables, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image

from coordinator.history import read_history
from coordinator.runs.comparison import CLOSING, WAITING, gather, phases, warnings
from gradualdiff.cli.comparing import gather_all
from shared import errors
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, ClosedRecord, ClosingRecord, OpenedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.command_line import gradualdiff
from tests.coordinator.test_controls import when
from tests.steering import ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two stores: runs ``three`` and ``five`` in one, another ``three`` in ``other/store``."""
    folder = tmp_path_factory.mktemp("compare")
    federations.run(federations.config(name="three", rounds=2), folder)
    federations.run(federations.config("abcde", 3, "five"), folder)
    federations.run(federations.config(name="three", run={"seed": 9}), folder / "other")
    return folder


def facts_of(folder, run="three"):
    return gather(read_history(DirectoryStore(folder / "store"), run), run)


def records(folder, run, kind):
    history = Ledger(DirectoryStore(folder / "store"), run, "t", lambda: 0.0).history()
    return [record for record in history if isinstance(record, kind)]


def test_every_fact_is_one_of_the_records(folder):
    """Loss, bytes and cosines by round, added up here from the records by hand."""
    facts = facts_of(folder)
    accepted = records(folder, "three", AcceptedRecord)
    closed = {r.round: r for r in records(folder, "three", ClosedRecord)}
    assert [r.round for r in facts.rounds] == [0, 1, 2]
    for number, at in enumerate(facts.rounds):
        sizes = [r.size for r in accepted if r.round <= number]
        assert at.uploaded == sum(sizes) / 3
        if number < 2:  # the last adapter's loss is not in an accepted record
            nlls = {r.site: r.metrics.held_out.nll for r in accepted if r.round == number + 1}
            assert at.by_site == nlls
            assert at.held_out_nll == pytest.approx(sum(nlls.values()) / 3)
        if number:
            cosines = closed[number].cosines.values()
            assert at.cosine == pytest.approx(sum(cosines) / 3)
            assert at.lowest_cosine == min(cosines)
    assert facts.last.held_out_nll < facts.rounds[0].held_out_nll
    assert facts.rounds[0].uploaded == 0
    assert facts.rounds[0].cosine is None


def test_seconds_stack_up_to_the_time_from_opening_to_opening(folder):
    """Slowest site, rest and closing: together what the clock said."""
    facts = facts_of(folder)
    opened = {r.round: r.time for r in records(folder, "three", OpenedRecord)}
    closing = {r.round: r.time for r in records(folder, "three", ClosingRecord)}
    first = facts.rounds[1].slowest
    assert sum(first.values()) == pytest.approx(opened[2] - opened[1], abs=1e-6)
    assert first[CLOSING] == pytest.approx(opened[2] - closing[1], abs=1e-6)
    assert list(facts.seconds()) == ["fetch", "train", WAITING, CLOSING]
    assert facts.rounds[1].in_turn["fetch"] >= first["fetch"]


def test_the_slowest_site_is_one_site(tmp_path):
    """Not the longest of each phase, which no site took; less than no time counts as none."""
    federations.run(federations.config(rounds=1), tmp_path)
    history = read_history(DirectoryStore(tmp_path / "store"), "test")
    said = {
        "a": {"load": 5.0, "train": 1.0},
        "b": {"load": 1.0, "train": 6.0, "odd": -3.0},
        "c": {},
    }
    history.rounds[1].accepted = {
        site: r.model_copy(update={"metrics": r.metrics.model_copy(update={"seconds": said[site]})})
        for site, r in history.rounds[1].accepted.items()
    }
    at = gather(history, "x").rounds[1]
    assert {k: at.slowest[k] for k in ("load", "train", "odd")} == {"load": 1, "train": 6, "odd": 0}
    assert at.in_turn == {"load": 6, "train": 7, "odd": 0}
    assert phases([at.slowest]) == ["load", "train", "odd", WAITING, CLOSING]


def test_a_pause_is_no_work(tmp_path):
    """The time between pause and resume is in no phase."""
    sites = when(federations.config(), 1, lambda: ask(tmp_path, "pause", "lunch"))
    with pytest.raises(errors.RunStuckError):
        federations.run(federations.config(), tmp_path, sites)
    store = ("--store", tmp_path / "store")
    assert gradualdiff("runs", "resume", "test", *store).returncode == 0
    federations.run(federations.config(), tmp_path)
    rounds = facts_of(tmp_path, "test").rounds
    assert CLOSING not in rounds[1].slowest
    assert CLOSING in rounds[2].slowest


def test_runs_of_other_text_or_another_base_are_told_apart(folder):
    """A site more, other held-out text at one site, another base; equal ones are not doubted."""
    three, five = facts_of(folder), facts_of(folder, "five")
    assert warnings([three, replace(three, label="again")]) == []
    [sites] = warnings([three, five])
    assert "not of the same text: measured at a, b, c in one and at a, b, c, d, e" in sites
    other = replace(three, label="other", held_out={**three.held_out, "b": (1, 11)})
    [text] = warnings([three, other])
    assert "another number of held-out examples or tokens at b" in text
    [base] = warnings([three, replace(three, label="other", base="e" * 64)])
    assert "the base is none (ffffffffffff) in one and none (eeeeeeeeeeee) in the other" in base


def test_runs_of_several_stores_are_told_apart_by_their_store(folder):
    """STORE:RUN; where names repeat, labels hold the part of the path that differs."""
    found = gather_all(["five", "three", f"{folder}/other/store:three"], folder / "store")
    assert [facts.label for facts in found.runs] == ["five", "store:three", "other/store:three"]
    assert [len(facts.rounds) for facts in found.runs] == [4, 3, 4]


def test_tables_and_the_warning_are_printed(folder):
    """Every quantity has its table."""
    done = gradualdiff("runs", "compare", "three", "five", "--store", folder / "store")
    assert done.returncode == 0, done.stderr
    for title in ("Held-out loss", "Perplexity", "MB uploaded", "Cosine", "by site", "Seconds"):
        assert title in done.stdout
    assert "warning: three and five: their losses are not of the same text" in done.stdout
    loss = facts_of(folder).last.held_out_nll
    assert f"{loss:.4f}" in done.stdout


def test_json_holds_what_the_tables_do(folder):
    """The same numbers under the documented names."""
    done = gradualdiff("runs", "compare", "three", "five", "--store", folder / "store", "--json")
    said = json.loads(done.stdout)
    assert [run["label"] for run in said["runs"]] == ["three", "five"]
    last = said["runs"][0]["rounds"][-1]
    assert last["held_out_nll"] == facts_of(folder).last.held_out_nll
    assert set(last) == {
        "round", "held_out_nll", "perplexity", "by_site", "uploaded", "cosine", "lowest_cosine",
        "slowest", "in_turn", "down", "up",
    }  # fmt: skip
    assert len(said["warnings"]) == 1


def coloured(path) -> int:
    """How many pixels are neither white, black nor grey: curves, bars and what names them."""
    rgb = image.imread(path)[:, :, :3]
    return int(np.sum(rgb.max(axis=2) - rgb.min(axis=2) > 0.3))


def test_the_picture_shows_something(folder, tmp_path):
    """A PNG of the size drawn, with every run's colour in it."""
    path = tmp_path / "compared.png"
    done = gradualdiff(
        "runs", "compare", "three", "five", "--store", folder / "store", "--to", path
    )
    assert done.returncode == 0, done.stderr
    assert f"Wrote {path}" in done.stdout.replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert image.imread(path).shape[:2] == (1260, 1800)
    assert coloured(path) > 20_000


def test_the_settings_that_differ_are_shown(folder):
    """Each with its value in either run; not the names, and not what is the same in both."""
    done = gradualdiff("runs", "compare", "three", "five", "--store", folder / "store")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["run.rounds", "2", "3"] in rows
    assert not [row for row in rows if row and row[0] in ("run.name", "lora.rank")]
    names = ("three", f"{folder}/other/store:three")
    done = gradualdiff("runs", "compare", *names, "--store", folder / "store", "--json")
    first, second = (run["settings"] for run in json.loads(done.stdout)["runs"])
    assert (first["run.seed"], second["run.seed"]) != (first["run.seed"],) * 2
    assert second["run.seed"] == 9


def test_a_run_that_has_not_begun_is_compared_too(folder, tmp_path):
    """No round, no loss: dashes and empty axes, no traceback."""
    store = DirectoryStore(tmp_path / "store")
    Ledger(store, "new", "t", lambda: 0.0).begin(federations.config(name="new"))
    names = ("new", f"{folder}/store:three")
    path = tmp_path / "c.png"
    done = gradualdiff("runs", "compare", *names, "--store", tmp_path / "store", "--to", path)
    assert done.returncode == 0, done.stderr
    one = coloured(path)
    done = gradualdiff("runs", "compare", "new", "--store", tmp_path / "store", "--to", path)
    assert done.returncode == 0, done.stderr
    assert coloured(path) == 0
    assert one > 10_000


@pytest.mark.parametrize(
    ("names", "code", "says"),
    [
        (("three", "nobody"), errors.RunNotFoundError.exit_code, "nobody"),
        (("three", "three"), errors.ConfigError.exit_code, "more than once"),
        (("three", "here:"), errors.ConfigError.exit_code, "STORE:RUN"),
        ((":three",), errors.ConfigError.exit_code, "STORE:RUN"),
        (("nowhere:three",), errors.StoreMissingError.exit_code, "nowhere"),
        (("three", "--to", "nowhere/x.png"), errors.ConfigError.exit_code, "--to"),
        (("three", "--to", "picture"), errors.ConfigError.exit_code, ".png"),
        ((), 2, "RUN"),
    ],
)
def test_what_cannot_be_compared_is_named(folder, tmp_path, names, code, says):
    """Its exit code, one line, and nothing is written."""
    store = ("--store", folder / "store")
    done = gradualdiff("runs", "compare", *names, *store, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
