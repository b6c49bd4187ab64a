"""Local files: whole or absent, on disk when a call returns, and locked while they are used."""
