"""mean: the weighted mean of all deltas (Algorithm 2 of arXiv:2506.19164)."""

from __future__ import annotations

from shared.methods.rules import Rule

MODE = Rule()
