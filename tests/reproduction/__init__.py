"""Tests of the paper's tables, over a tiny model."""
