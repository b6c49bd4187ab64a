"""Damaged inputs by the million: ``python -m tests.fuzz --inputs 1000000``."""
