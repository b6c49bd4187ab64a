"""The crash table: each role is killed at every named point."""
