"""What a run may choose by name: a folder per kind, a file per mode."""
