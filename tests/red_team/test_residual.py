"""What a coordinator can make of a site's residual: nothing leaves, and no word of it is believed.

A residual is the part of a site's deltas that the codec left out: with it, the deltas are exact.
"""

from __future__ import annotations

import pytest

from participant.acceptance import TRAININGS_PER_ROUND
from participant.learner.port import RESIDUAL_FILE
from shared.disk.files import digest_file
from shared.protocol import wire
from shared.protocol.events import DeltaAnswered, RoundClosed, TrainingFailed


def begin(coordinator, **fields):
    """Round 1 under a coarse codec; the source and the delta that came."""
    coordinator.announce()
    source = coordinator.draw(coordinator.manifest)
    coordinator.start(source, codec="uniform4", feedback=True, **fields)
    return source, coordinator.submitted[-1].sha


def answer(coordinator, number, sha, verdict):
    coordinator.tell(DeltaAnswered(run="r", round=number, sha=sha, verdict=verdict))


def go_on(coordinator, source, number, last):
    coordinator.start(source, number, codec="uniform4", feedback=True, last_accepted=last)
    return coordinator.submitted[-1]


def residuals(coordinator):
    return sorted((coordinator.folder / "workspace").glob(f"r/trained/*/{RESIDUAL_FILE}"))


def test_a_residual_never_leaves_its_site(hostile):
    """Neither its bytes nor its digest: what goes up is the delta, and what is said names it."""
    coordinator = hostile()
    source, first = begin(coordinator)
    answer(coordinator, 1, first, "accepted")
    second = go_on(coordinator, source, 2, first)
    assert second.residual == "kept"
    told = b"".join(wire.encode(event, 1.0) for event in coordinator.heard)
    sent = b"".join(coordinator.uploads)
    for path in residuals(coordinator):
        values = path.read_bytes()[-64:]
        assert any(values)
        assert values not in sent
        assert digest_file(path)[0].encode() not in told


def test_the_same_training_with_other_residuals_is_counted(hostile):
    """Deltas of one training that differ in what is added tell more of it than one does."""
    coordinator = hostile()
    source, sha = begin(coordinator)
    for number in range(2, TRAININGS_PER_ROUND + 3):
        answer(coordinator, 1, sha, "refused")
        coordinator.start(source, codec="uniform4", feedback=True, last_accepted=f"{number:064x}")
        sha = coordinator.submitted[-1].sha
    assert len(coordinator.learner.trained) == TRAININGS_PER_ROUND
    assert "trainings" in coordinator.said(TrainingFailed)[-1].reason


def test_an_old_refusal_takes_nothing_from_what_was_accepted_since(hostile):
    """The same bytes may be refused and accepted: a refusal that comes again is an old word."""
    coordinator = hostile()
    source, first = begin(coordinator)
    answer(coordinator, 1, first, "accepted")
    answer(coordinator, 1, first, "refused")
    assert go_on(coordinator, source, 2, first).residual == "kept"


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_a_late_delta_leaves_the_residual_before_it(hostile, told):
    """Round 2 closed without this site, and only then is its delta called late.

    Round 3 starts from what round 1 left out, also if the word that round 1 was accepted got lost.
    """
    coordinator = hostile()
    source, first = begin(coordinator)
    if told:
        answer(coordinator, 1, first, "accepted")
    coordinator.tell(RoundClosed(run="r", round=1, result_sha=source))
    late = go_on(coordinator, source, 2, first)
    coordinator.tell(RoundClosed(run="r", round=2, result_sha=source))
    answer(coordinator, 2, late.sha, "late")
    assert [path.parent.name for path in residuals(coordinator)] == [f"00001-{first}"]
    third = go_on(coordinator, source, 3, first)
    assert third.residual == "kept"
    answer(coordinator, 3, third.sha, "accepted")
    coordinator.tell(RoundClosed(run="r", round=3, result_sha=source))
    assert [path.parent.name[:5] for path in residuals(coordinator)] == ["00003"]


def test_another_run_under_the_name_starts_from_zeros(hostile):
    """Other settings clear the workspace, so that what they owe is not added to the new run."""
    coordinator = hostile()
    source, first = begin(coordinator)
    answer(coordinator, 1, first, "accepted")
    coordinator.announce(config_digest="c" * 64)
    assert residuals(coordinator) == []
    assert go_on(coordinator, source, 2, first).residual == "lost"


def test_a_word_on_a_delta_that_is_not_here_is_a_lost_residual(hostile):
    """Zeros, and said so: a coordinator cannot make a site read another file."""
    coordinator = hostile()
    source, _ = begin(coordinator, last_accepted="e" * 64)
    assert coordinator.submitted[-1].residual == "lost"
    assert go_on(coordinator, source, 2, "d" * 64).residual == "lost"
