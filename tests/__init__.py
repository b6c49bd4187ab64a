"""Names of tests are sentences; their docstrings state the property."""
