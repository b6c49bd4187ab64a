"""Suites that every adapter of a port runs under, and the embedded adapters under them."""
