"""How often a site says how far it is."""

from __future__ import annotations

import pytest

from participant.daemon import pause_after_progress


@pytest.mark.parametrize(("seconds", "pause"), [(0, 5), (60, 5), (120, 10), (720, 60), (9e9, 60)])
def test_the_longer_a_training_the_rarer_the_words(seconds, pause):
    assert pause_after_progress(seconds) == pause


def test_an_hours_training_is_told_in_few_words():
    """About 90, where every five seconds would be 720: less than a small core's delta has bytes."""
    words, now = 0, 0.0
    while now < 3600:
        now += pause_after_progress(now)
        words += 1
    assert words < 100
