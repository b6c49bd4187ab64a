"""Modes that another package brings, in whole federations."""
