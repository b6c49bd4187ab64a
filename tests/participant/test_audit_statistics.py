"""The audit's arithmetic against known values, and what it takes for personal data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from participant.audit.binomial import at_least, upper_bound
from participant.audit.canaries import epsilon_lower, guessed_rightly, make_canaries
from participant.audit.extraction import Cut, cut_record, find_hits, longest_run
from participant.audit.membership import area_under_curve, found_at, min_k
from participant.audit.patterns import Patterns, read_names
from participant.audit.verdict import judge
from participant.data import TokenisedExample
from shared.config import SitePrivacySection
from shared.errors import ConfigError
from shared.protocol.manifest import AuditFigures

ALL = ("email", "phone", "date", "id")


@pytest.mark.parametrize(
    ("hits", "records", "percent"),
    [(0, 256, 1.2), (1, 256, 1.8), (2, 256, 2.4), (3, 256, 3.0), (0, 128, 2.3), (0, 512, 0.6)],
)
def test_the_bound_is_that_of_clopper_and_pearson(hits, records, percent):
    """The usual table; and with no hit its closed form, 1 - 0.05^(1/n)."""
    bound = upper_bound(hits, records)
    assert round(100 * bound, 1) == percent
    assert at_least(hits + 1, records, bound) == pytest.approx(0.95)
    if hits == 0:
        assert bound == pytest.approx(1 - 0.05 ** (1 / records))


def test_the_bound_of_nothing_and_of_everything_is_one():
    """No trial says nothing."""
    assert upper_bound(0, 0) == upper_bound(7, 7) == 1.0


def test_the_tail_is_that_of_the_binomial():
    """Three tosses of a fair coin."""
    assert [at_least(k, 3, 0.5) for k in range(5)] == pytest.approx([1, 7 / 8, 1 / 2, 1 / 8, 0])


def test_area_under_the_curve_counts_pairs():
    """Every pair counts; equal scores count half."""
    assert area_under_curve([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert area_under_curve([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert area_under_curve([1.0, 1.0], [1.0, 1.0, 1.0]) == 0.5
    assert area_under_curve([1.0, 3.0], [2.0, 3.0]) == (0 + 0 + 1 + 0.5) / 4
    draw = np.random.default_rng(1)
    members, others = draw.integers(0, 9, 40).tolist(), draw.integers(0, 9, 30).tolist()
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert area_under_curve(members, others) == pytest.approx(np.mean(pairs))


def test_members_found_at_a_rate_of_false_alarms():
    """Of 200 others two may be above the threshold, of 99 none."""
    others = [float(i) for i in range(200)]
    assert found_at([197.5, 198.5, 199.5], others, 0.01) == 1.0
    assert found_at([197.0, 198.0], others, 0.01) == 0.5
    assert found_at([98.0, 98.5], others[:99], 0.01) == 0.5


@pytest.mark.parametrize(
    ("right", "count", "epsilon"),
    [(51, 64, 0.83), (58, 64, 1.54), (64, 64, 3.04), (102, 128, 0.99), (128, 128, 3.74)],
)
def test_right_guesses_bound_epsilon(right, count, epsilon):
    """Of 64 and 128 canaries, 80, 90 and 100 %; by chance half of the guesses hold, for nothing."""
    assert round(epsilon_lower(right, count), 2) == epsilon
    assert epsilon_lower(count // 2, count) == 0.0


def test_a_coin_decides_which_canaries_are_trained_on_and_the_upper_half_is_guessed():
    """The same canaries for the same seed; of the guesses, those that hold are counted."""
    first = make_canaries(64, range(5, 90), 3, 100, 100)
    assert first == make_canaries(64, range(5, 90), 3, 100, 100)
    assert first != make_canaries(64, range(5, 90), 4, 100, 100)
    assert len(first.inside) + len(first.outside) == 64
    assert 16 < len(first.inside) < 48
    tokens = {token for one in first.inside for token in one.input_ids}
    assert tokens <= set(range(5, 90))
    assert guessed_rightly([3.0, 4.0], [1.0, 2.0]) == 4
    assert guessed_rightly([1.0, 4.0], [3.0, 2.0]) == 2


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to Jo.Doe+x@mail.example.org today", "email"),
        ("call +49 (30) 1234-5678 now", "phone"),
        ("call 030 12345678", "phone"),
        ("born 1956-03-12 in", "date"),
        ("born 12.03.1956", "date"),
        ("born 12 March 1956", "date"),
        ("born March 12, 1956", "date"),
        ("IBAN DE89 3704 0044 0532 0130 00", "id"),
        ("SSN 078-05-1120", "id"),
        ("record MRN 00482913", "id"),
    ],
)
def test_personal_data_is_known_by_its_form(text, kind):
    """Each kind is found, as that kind alone, and only where it is looked for."""
    assert [found.kind for found in Patterns(ALL).find(text)] == [kind]
    assert Patterns([other for other in ALL if other != kind]).find(text) == []


@pytest.mark.parametrize(
    "text", ["120/80 mmHg", "in 1956 and 2026", "5 x 100 mg", "version 1.2.3", "a@b", "pH 7.4"]
)
def test_what_is_no_personal_data_is_left_alone(text):
    """Figures of a letter are none."""
    assert Patterns(ALL).find(text) == []


def test_names_come_from_the_sites_list(tmp_path):
    """One a line, of one word or several, in any case; a list that is not there is named."""
    path = tmp_path / "names.txt"
    path.write_text("# of the ward\nMeyer\nAnna Maria Koch\n\n", encoding="utf-8")
    patterns = Patterns((), read_names(path))
    found = patterns.find("MEYER saw anna maria koch, not Anna Maria")
    assert [(one.kind, one.text) for one in found] == [
        ("name", "meyer"),
        ("name", "anna maria koch"),
    ]
    with pytest.raises(ConfigError, match=r"privacy\.names_file: expected .*nowhere"):
        read_names(tmp_path / "nowhere")


def test_a_record_is_cut_at_its_half_but_never_inside_its_prompt():
    """What is not learnt is given; an end token ends the rest; what is too short is left out."""

    def cut(length, answer_start, ends=(), personal=False):
        example = TokenisedExample(tuple(range(length)), answer_start)
        return cut_record(0, example, ends, lambda _: personal)

    assert len(cut(40, 4).prefix) == 20
    assert len(cut(40, 30).prefix) == 30
    assert cut(40, 4, ends=(35,)).suffix == tuple(range(20, 35))
    assert len(cut(400, 4).suffix) == 50
    assert cut(18, 2) is None
    assert cut(18, 2, personal=True).suffix == tuple(range(10, 18))
    assert cut(10, 2, personal=True) is None


def test_the_longest_run_is_found_wherever_it_stands():
    """Also behind a token that differs, and shifted."""
    assert longest_run([1, 2, 3, 4], [9, 2, 3, 4]) == (1, 3)
    assert longest_run([1, 2, 3, 4], [2, 3, 9]) == (1, 2)
    assert longest_run([1], [2]) == (0, 0)


def said(text):
    return [ord(letter) for letter in text]


def reproduced(suffix, tuned, base="", prefix="Dear Dr Who, ", kinds=ALL):
    """The hits of one record whose tokens are letters."""
    return find_hits(
        [Cut(4, tuple(said(prefix)), tuple(said(suffix)))],
        lambda rows: [said(tuned) for _ in rows],
        lambda rows: [said(base) for _ in rows],
        lambda tokens: "".join(map(chr, tokens)),
        Patterns(kinds),
    )


LONG = "the lamp is on the river bank"


def test_twenty_tokens_in_a_row_are_a_hit_and_what_the_base_writes_is_none():
    """Word for word, or behind a slip; not 19 tokens, and not what was known before."""
    (hit,) = reproduced(LONG, LONG)
    assert (hit.index, hit.text, hit.is_long, hit.personal) == (4, LONG, True, ())
    assert len(reproduced(LONG, "XYZ" + LONG[3:])) == 1
    assert reproduced(LONG, LONG[:19]) == []
    assert len(reproduced(LONG, LONG[:20])) == 1
    assert reproduced(LONG, LONG, base=LONG) == []
    assert len(reproduced("short words", "short words")) == 1
    assert reproduced("short words", "short word!") == []


def test_a_number_that_was_not_given_is_a_hit_however_short():
    """Unless the prompt has it, the base writes it, or nobody looks for it."""
    (hit,) = reproduced("call 030 12345678", "xx 030 12345678 yy")
    assert (hit.is_long, [one.text for one in hit.personal]) == (False, ["030 12345678"])
    assert reproduced("call 030 12345678", "030 12345678", prefix="030 12345678 is") == []
    assert reproduced("call 030 12345678", "030 12345678", base="030 12345678") == []
    assert reproduced("call 030 12345678", "030 12345678", kinds=()) == []
    assert reproduced("on 12.03.1956", "12.03.1956") == []  # a date may come by chance


def verdict(**figures):
    limits = SitePrivacySection(audit="gate", canaries=64, epsilon_block=1.0)
    found = judge(AuditFigures(verdict="passed", records=256, **figures), limits)
    return found.verdict, found.crossed


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ({"hits": 0, "auc": 0.6, "tpr": 0.1}, ("passed", ())),
        ({"hits": 1}, ("warned", ("hits_warn",))),
        ({"hits": 2, "auc": 0.61}, ("warned", ("hits_warn", "auc_warn"))),
        ({"hits": 3}, ("blocked", ("hits_block", "hits_warn"))),
        ({"hits": 6, "controls": 256, "control_hits": 3}, ("warned", ("hits_warn",))),
        (
            {"hits": 7, "controls": 256, "control_hits": 3},
            ("blocked", ("hits_block", "hits_warn")),
        ),
        ({"hits": 1, "personal": 1}, ("blocked", ("personal_block", "hits_warn"))),
        ({"hits": 0, "auc": 0.76}, ("blocked", ("auc_block", "auc_warn"))),
        ({"hits": 0, "auc": 0.75, "tpr": 0.11}, ("warned", ("auc_warn", "tpr_warn"))),
        ({"hits": 0, "epsilon_lower": 1.1}, ("blocked", ("epsilon_block",))),
    ],
)
def test_each_limit_has_its_word(figures, wanted):
    """Beyond it, it is named. Held-out records that are reproduced as often excuse the others."""
    assert verdict(**figures) == wanted


def test_a_warning_stands_at_or_below_its_block():
    """And a bound of epsilon needs canaries."""
    with pytest.raises(ValueError, match=r"auc_warn: expected at most auc_block \(0\.55\)"):
        SitePrivacySection(auc_block=0.55)
    with pytest.raises(ValueError, match="epsilon_block: expected canaries"):
        SitePrivacySection(epsilon_block=1.0)


def test_min_k_of_a_softmax_worked_out_by_hand():
    """Of p = (1/2, 1/4, 1/4): mean -1.5 ln 2, standard deviation ln 2 / 2, so z = 1 or -1.

    And p = (1/3, 1/3, 1/3, 0) and (1, 0, 0, 0): nothing is more likely than the rest, z = 0.
    """
    torch = pytest.importorskip("torch")
    from participant.model.surprise import surprises

    third, never = -math.log(3), -math.inf
    halves = [math.log(1 / 2), math.log(1 / 4), math.log(1 / 4), never]
    logits = torch.tensor([halves, halves, [third] * 3 + [never], [0.0, never, never, never]]) + 7
    nats, deviations = surprises(logits, torch.tensor([0, 1, 2, 0])).numpy()
    assert nats == pytest.approx([math.log(2), math.log(4), math.log(3), 0.0], abs=1e-6)
    assert deviations == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=0.02)


def test_min_k_is_the_mean_of_the_lowest_fifth():
    """Of eleven tokens two, of four one."""
    assert min_k(np.array([3, -4, 9, 9, 9, 9, 9, 9, 9, 9, 1.0], np.float32)) == -1.5
    assert min_k(np.array([3, 2, 1, 4.0], np.float32)) == 1.0
