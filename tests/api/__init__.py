"""`import gradualdiff`, as scripts and notebooks use it."""
