"""``python -m gradualdiff``: the command."""

from gradualdiff.entry import main

main()
