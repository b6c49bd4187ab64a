"""How long one waits before another try."""

from __future__ import annotations

from shared.backoff import Backoff, pause_after


def test_pauses_double_up_to_the_longest_and_begin_anew(monkeypatch):
    """However often it fails: no number of failures is too many."""
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    pauses = Backoff()
    assert [pauses.next() for _ in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    pauses.reset()
    assert pauses.next() == 0.5
    assert pause_after(10**9, first=1.0, longest=60.0) == 60.0


def test_pauses_are_spread():
    """A thousand sites that lost one broker do not come back in the same moment."""
    drawn = {pause_after(3) for _ in range(100)}
    assert len(drawn) > 50
    assert min(drawn) >= 1.0
    assert max(drawn) <= 3.0
