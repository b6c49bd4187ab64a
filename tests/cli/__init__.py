"""Tests of the commands, and of the demo's text and packages."""
