"""Whole runs, with kills and bad input."""
