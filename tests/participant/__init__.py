"""Tests of text, training and the packaged model."""
