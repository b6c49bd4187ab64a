"""Tests of the compose file, on a Docker engine of their own."""
