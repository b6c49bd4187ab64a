"""What the stand's parts are called."""

from __future__ import annotations

SITES = ("a", "b", "c")
COORDINATORS = ("coordinator-1", "coordinator-2")
VHOST = BUCKET = "chaos"
PASSWORD = "for-tests"
TRACE = "trace.txt"  # in a site's folder
LOST = "lost"  # the stage of a site whose workspace was taken away
