"""The storm's own judgement: it sees what must not be, and a seed draws the same again."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from shared.protocol.records import ClosingRecord, Input
from tests.chaos import report, schedule
from tests.chaos.checks import account_for, counted_once, explained, left_over, unforeseen
from tests.chaos.kinds import KINDS
from tests.chaos.stand import Exit
from tests.chaos.storm import Tally


def trace(*attempts: tuple[int, int, int]) -> list[str]:
    """Lines of attempts (process, round, how many of the four stages it came to)."""
    lines = []
    for pid, number, stages in attempts:
        lines.append(f"{pid} begun r 0")
        words = ("trained", "committing", "committed")[: stages - 1]
        lines += [f"{pid} {word} r {number}" for word in words]
    return lines


def drawn(seed, count=60):
    shapes = list(itertools.islice(schedule.runs(seed), count))
    return list(itertools.islice(schedule.faults(seed, KINDS), count)), shapes


def test_the_same_seed_draws_the_same():
    """Faults, pauses, durations and runs; another seed draws others."""
    assert drawn(5) == drawn(5)
    assert drawn(5)[0] != drawn(6)[0]
    assert drawn(5)[1] != drawn(6)[1]


def test_every_kind_comes_up():
    """A weight that keeps a kind from ever being drawn would hide it."""
    assert {fault.kind.name for fault in drawn(1, 600)[0]} == {kind.name for kind in KINDS}


def test_rounds_trained_once_each_are_right():
    """The undisturbed trace, and one with a training that a kill cut short."""
    assert account_for(trace((1, 1, 4), (1, 2, 4)), "r", 2, set()).complaints == []
    cut = account_for(trace((1, 1, 1), (2, 1, 4)), "r", 1, {1})
    assert (cut.complaints, cut.unfinished, cut.again) == ([], 1, 0)


def test_a_kill_before_the_commit_explains_a_second_training():
    """Killed between the delta's last byte and the rename: once more, and it is counted."""
    found = account_for(trace((1, 1, 2), (2, 1, 4)), "r", 1, {1})
    assert (found.complaints, found.again) == ([], 1)


def test_a_kill_in_the_commit_explains_it_either_way():
    """The rename may have happened or not."""
    assert account_for(trace((1, 1, 3)), "r", 1, {1}).complaints == []
    assert account_for(trace((1, 1, 3), (2, 1, 4)), "r", 1, {1}).complaints == []


@pytest.mark.parametrize(
    ("attempts", "killed", "complaint"),
    [
        ([(1, 1, 4), (1, 1, 4)], set(), "trained after it was finished"),
        ([(1, 1, 4), (2, 1, 4)], {1}, "trained after it was finished"),
        ([(1, 1, 2), (2, 1, 4)], set(), "no kill of ours explains it"),
        ([(1, 1, 2), (1, 1, 4)], {1}, "no kill of ours explains it"),
        ([(1, 1, 1), (2, 1, 4)], set(), "no kill of ours explains it"),
        ([(1, 1, 2)], {1}, "never finished"),
        ([], set(), "never finished"),
        ([(1, 1, 4), (1, 2, 4)], set(), "rounds that there are not"),
    ],
)
def test_what_no_kill_explains_is_a_complaint(attempts, killed, complaint):
    """Each with its reason."""
    assert complaint in "\n".join(account_for(trace(*attempts), "r", 1, killed).complaints)


def test_a_lost_workspace_explains_a_second_training():
    """Counted apart; within one workspace nothing changes."""
    first, second = trace((1, 1, 4)), trace((2, 1, 4))
    found = account_for([*first, "0 lost - 0", *second], "r", 1, set())
    assert (found.complaints, found.relearned, found.again) == ([], 1, 0)
    cut = account_for([*first, "0 lost - 0", *second[:2]], "r", 1, {2})
    assert cut.complaints == []
    assert account_for([*first, "0 lost - 0", *second, *second], "r", 1, set()).finished_again == 1
    assert account_for([*first[:2], "0 lost - 0"], "r", 1, {1}).complaints


def test_finished_rounds_trained_again_are_counted():
    """The number in the published table."""
    assert account_for(trace((1, 1, 4), (1, 1, 4)), "r", 1, set()).finished_again == 1


def closing(number, *inputs):
    weight = 1 / len(inputs)
    return ClosingRecord(
        round=number,
        source_sha="0" * 64,
        inputs=tuple(Input(site=s, from_round=n, sha="1" * 64, weight=weight) for s, n in inputs),
    )


def test_what_is_counted_twice_or_not_at_all_is_a_complaint():
    """Within a closing and across closings."""
    good = [closing(1, ("a", 1), ("b", 1)), closing(2, ("a", 2), ("b", 2))]
    assert counted_once(good, ("a", "b")) == []
    assert "counted 2 times" in counted_once([good[0], closing(2, ("a", 1), ("b", 2))], "ab")[-1]
    assert counted_once([closing(1, ("a", 1))], ("a", "b"))


def test_late_deltas_may_count_later_and_no_more_than_once():
    """A round without a site, and one with two deltas of it, are complaints only without carry."""
    late = [closing(1, ("a", 1)), closing(2, ("a", 2), ("b", 1), ("b", 2))]
    assert counted_once(late, "ab", carries=True) == []
    assert counted_once(late, "ab")
    twice = [*late, closing(3, ("a", 3), ("b", 1))]
    assert "counted 2 times" in counted_once(twice, "ab", carries=True)[-1]


def test_with_carry_a_round_may_go_without_a_site_and_no_other_rule_bends():
    """Called off in the middle; but not what was trained, and nothing after it was finished."""
    calm = trace((1, 1, 4), (1, 2, 1), (1, 3, 4))
    assert account_for(calm, "r", 3, set(), carries=True).complaints == []
    assert account_for(calm, "r", 3, set()).complaints
    assert account_for(trace((1, 1, 2), (1, 2, 4)), "r", 2, set(), carries=True).complaints
    assert account_for(trace((1, 1, 4), (1, 1, 4)), "r", 1, set(), carries=True).complaints


def test_a_delta_that_was_in_and_never_counted_is_a_complaint():
    """With carry, where no closing has to name it."""

    def history(accepted_at):
        opened = [SimpleNamespace(opened=SimpleNamespace(time=time)) for time in (10.0, 20.0)]
        accepted = {("b", 1): SimpleNamespace(time=accepted_at)}
        return SimpleNamespace(rounds=dict(enumerate(opened)), accepted=accepted, counted={})

    assert "b: its delta of round 1" in left_over(history(15.0))[0]
    assert left_over(history(25.0)) == []


def test_only_a_wipe_explains_that_a_process_ends_by_itself():
    """And only with the broker's refusal."""
    refused = Exit("a", 43, started=10.0, ended=12.0, said="")
    assert explained([refused], [(9.0, 11.0)]) == []
    assert explained([refused], [(20.0, 21.0)])
    assert explained([refused], [])
    assert explained([Exit("a", 1, 10.0, 12.0, "")], [(9.0, 11.0)])


def test_unforeseen_errors_in_a_log_are_seen():
    """Handlers outlive them; the storm does not."""
    assert unforeseen("x [error    ] handler.crashed event_type=A\nfine\n")
    assert unforeseen("Traceback (most recent call last):\n")
    assert unforeseen("a [info     ] round.trained round=1\n") == []


def test_the_table_goes_between_its_markers(tmp_path):
    """And nothing else of the page changes; written twice it is the same."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- chaos:begin -->\nold\n<!-- chaos:end -->\nafter\n")
    tally = Tally(7, 3, runs=1, digests_equal=1, seconds=[12.0])
    tally.fired["link reset"] = 3
    table = report.markdown(tally)
    for _ in range(2):
        report.write_block("chaos", table, page)
    assert page.read_text() == f"before\n<!-- chaos:begin -->\n{table}<!-- chaos:end -->\nafter\n"
    assert "| link reset | 3 |" in table
