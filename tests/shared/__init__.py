"""Tests of what both roles speak."""
