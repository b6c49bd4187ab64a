"""The checks behind `gradualdiff doctor`, for a federation and for a site."""
