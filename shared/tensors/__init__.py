"""Adapters and deltas as files of named tensors, and the arithmetic on them."""
