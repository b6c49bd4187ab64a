"""The sites' accounts: what is on record of them, and how the broker is told."""
