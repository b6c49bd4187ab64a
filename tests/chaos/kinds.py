"""The table of what may go wrong. A further kind of fault is one more line."""

from __future__ import annotations

from tests.chaos import messages, network, processes, servers
from tests.chaos.schedule import Kind

DIED = "the process ended by signal 9"
STOPPED = "the kernel shows the process as stopped"
GONE = "the server process ended by signal 9, and it answers again after its restart"
CUT = "connections that the broker closed"
HIT = "bytes or connections that the proxy hit"
EMPTIED = "its folder had files, and is gone while its process is down"
COPIED = "copies that the broker confirmed"

KINDS = (
    Kind("SIGKILL of the active coordinator", 3.0, (0.2, 2.5), processes.kill_active, DIED),
    Kind("SIGKILL of the standby coordinator", 1.0, (0.2, 2.5), processes.kill_standby, DIED),
    Kind("SIGKILL of a site", 5.0, (0.2, 2.5), processes.kill_site, DIED),
    Kind("SIGKILL of a site as a training ends", 3.0, (0.2, 1.0), processes.kill_late, DIED),
    Kind("SIGKILL of a site, its workspace lost", 2.0, (0.2, 2.5), processes.lose, EMPTIED),
    Kind("active coordinator frozen", 1.5, (12.0, 16.0), processes.freeze_active, STOPPED),
    Kind("standby coordinator frozen", 1.0, (2.0, 8.0), processes.freeze_standby, STOPPED),
    Kind("site frozen", 2.0, (1.0, 5.0), processes.freeze_site, STOPPED),
    Kind("broker killed", 1.5, (0.2, 3.0), servers.kill_broker, GONE),
    Kind("store killed", 1.5, (0.2, 3.0), servers.kill_store, GONE),
    Kind("broker and store killed", 0.7, (0.2, 3.0), servers.kill_both, GONE),
    Kind("broker cuts a site", 3.0, (0.0, 0.0), servers.cut_site, CUT),
    Kind("broker cuts the coordinators", 2.0, (0.0, 0.0), servers.cut_coordinators, CUT),
    Kind(
        "broker wiped, accounts deleted, restored",
        0.7,
        (0.2, 2.0),
        servers.wipe,
        "virtual host and accounts are gone (404)",
    ),
    Kind("messages doubled", 3.0, (0.0, 0.0), messages.double, COPIED),
    Kind("messages repeated in another order", 3.0, (0.0, 0.0), messages.reorder, COPIED),
    Kind("link reset", 3.0, (0.0, 0.0), network.reset, HIT),
    Kind("link reset after some bytes", 3.0, (1.0, 3.0), network.cut_after, HIT),
    Kind("link slow to answer", 2.0, (1.0, 4.0), network.delay, HIT),
    Kind("link narrow", 2.0, (1.0, 4.0), network.throttle, HIT),
    Kind("black hole before the sites", 2.0, (1.0, 5.0), network.hole_sites, HIT),
    Kind("black hole before the coordinators", 1.5, (4.0, 14.0), network.hole_coordinators, HIT),
    Kind("half-open connections", 1.5, (1.0, 8.0), network.half_open, HIT),
    Kind("nothing listens", 1.5, (0.5, 4.0), network.refuse, HIT),
    Kind("store answers 503", 1.5, (1.0, 5.0), network.unavailable, HIT),
)
