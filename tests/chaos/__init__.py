"""Random faults, drawn from a seed, over a whole deployment: ``python -m tests.chaos --help``."""
