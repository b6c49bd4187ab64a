"""The seed paper's averaging (Algorithm 2): the mean of the deltas, value by value."""

from __future__ import annotations

from shared.methods.averaging import Averaging

MODE = Averaging()
