"""Tests of the coordinator's role."""
