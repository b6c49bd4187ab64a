"""Secure sum: the coordinator learns what many sites' vectors add up to, and nothing else. Pure."""
