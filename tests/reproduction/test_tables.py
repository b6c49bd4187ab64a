"""What the tables, the CSV and the picture say of given findings: no training is run."""

import csv
import io
import math

import pytest

from gradualdiff.reproduction.experiment import Chosen, Findings, worth_of
from gradualdiff.reproduction.figures import ArmFigures, RoundFigures, mean_and_sd, slowest_and_sum
from gradualdiff.reproduction.picture import draw_losses
from gradualdiff.reproduction.tables import ResultTable, as_csv, make_tables
from participant.learner.quality import AnswerLoss, Copying, ReplyScores
from shared.errors import ConfigError

SECONDS = dict.fromkeys(("load", "train", "encode", "transfer", "aggregate", "evaluate"), 1.0)


def one_loss(nll, perplexity):
    return AnswerLoss(
        nll=nll,
        perplexity=perplexity,
        nll_per_byte=nll,
        tokens=10,
        bytes=10,
        examples=2,
        cut=0,
        dropped=0,
    )


def scores(longest=7):
    copied = Copying(
        mean_characters=3.0, max_characters=longest, mean_words=1.0, max_words=2, copied=0.0
    )
    return ReplyScores(
        replies=2,
        bleu=1.0,
        bleu_unit=0.01,
        bleu_signature="nrefs:1|",
        chrf=2.0,
        chrf_signature="nrefs:1|",
        copied=copied,
    )


class Adapter:
    """Stands where a measured adapter does."""

    def __init__(self, nll, perplexity, longest):
        self._loss, self._scores = one_loss(nll, perplexity), scores(longest)

    def loss(self, name):
        return self._loss

    def replies(self, name):
        return self._scores


def figures(arm="federated", seed=1, size=4, adapters=None, tokens=100):
    losses, replies = worth_of(adapters or [Adapter(2.0, math.exp(2.0), 7)])
    rounds = ()
    if arm not in ("base", "fedavg"):
        rounds = (RoundFigures(1, 2.5, tokens, SECONDS, SECONDS, test_nll=2.0),)
    return ArmFigures(arm, seed, size, 0.1, rounds, losses, replies, 1000.0, 2000.0)


def cells(tables, title):
    table = next(table for table in tables if title in table.title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_a_cell_of_the_csv_says_which_batch_it_is_of():
    found = Findings([figures(size=4), figures(size=8)])
    rows = list(csv.DictReader(io.StringIO(as_csv(make_tables(found, 10)))))
    named = [(row["table"], row["row"], row["column"]) for row in rows]
    assert len(set(named)) == len(named)
    assert ("Table II: loss", "arm=GradualDiff-Fed, batch=8", "held-out") in named


def test_the_longest_copy_of_several_participants_is_the_longest_of_any():
    adapters = [Adapter(2.0, 7.4, longest) for longest in (1, 60, 2)]
    row = cells(make_tables(Findings([figures("local", adapters=adapters)]), 10), "Longest")[0]
    assert row["held-out: longest"] == "60"


def test_a_perplexity_that_is_no_float_is_a_dash():
    row = cells(make_tables(Findings([figures(adapters=[Adapter(800.0, None, 1)])]), 10), "III")[0]
    assert row["perplexity"] == "-"


def test_trained_tokens_are_shown_for_each_arm():
    found = Findings([figures(tokens=100), figures("central-steps", tokens=104)])
    rows = cells(make_tables(found, 10), "II: loss")
    assert {row["arm"]: row["tokens trained on"] for row in rows} == {
        "GradualDiff-Fed": "100",
        "central, K times the steps": "104",
    }


def test_fedavg_is_only_spoken_of_where_it_was_computed():
    alone = make_tables(Findings([figures(), figures("base")]), 10)
    both = make_tables(Findings([figures(), figures("fedavg")], differences={"run": 1e-9}), 10)
    assert not any("same trainings" in table.note for table in alone)
    assert any("same trainings" in table.note and "1e-09" in table.note for table in both)


def test_a_table_without_rows_is_left_out():
    assert all(table.rows for table in make_tables(Findings([figures("base")]), 10))


def test_a_learning_rate_that_diverged_says_so():
    found = Findings([figures()], {"b4 federated": Chosen(0.1, {0.1: 2.0, 1.0: None}, False)})
    row = cells(make_tables(found, 10), "Learning rates")[0]
    assert row["tried: loss on dev"] == "0.1: 2.000, 1: diverged"


def test_a_cell_with_a_bar_or_a_line_break_stays_one_cell():
    table = ResultTable("t", ("label",), [("a|b\nc",)])
    assert "| a\\|b c |" in table.markdown().splitlines()


def test_side_by_side_is_what_the_slowest_participant_takes():
    """Not the sum of each phase's slowest: no participant took so long."""
    one, other = {"load": 1.0, "train": 5.0}, {"load": 4.0, "train": 1.0}
    parallel, in_turn = slowest_and_sum([one, other], [2.0])
    assert math.fsum(parallel.values()) == 8.0
    assert (parallel["load"], parallel["train"], parallel["aggregate"]) == (1.0, 5.0, 2.0)
    assert math.fsum(in_turn.values()) == 13.0


def test_of_separate_runs_each_has_its_own_aggregation():
    parallel, in_turn = slowest_and_sum([{"train": 1.0}, {"train": 2.0}], [3.0, 0.5])
    assert (parallel["train"], parallel["aggregate"]) == (1.0, 3.0)
    assert in_turn["aggregate"] == 3.5


def test_the_deviation_is_the_samples():
    assert mean_and_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_sd([1.0]) == (1.0, None)


def test_a_picture_without_a_curve_is_drawn_silently(tmp_path):
    draw_losses([figures("base")], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_a_line(tmp_path):
    with pytest.raises(ConfigError, match="none"):
        draw_losses([figures()], tmp_path / "none" / "figure.png")
