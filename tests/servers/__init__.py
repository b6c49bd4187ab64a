"""Real servers and processes that tests use."""
