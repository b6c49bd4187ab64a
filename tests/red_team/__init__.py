"""Attacks that were tried on the product, as tests that really try them."""
