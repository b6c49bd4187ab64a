"""A site's uploads: asked for by a delta's sha256, granted by URLs, sent in pieces."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from participant.learner.port import Progress
from shared.failpoints import failpoint
from shared.protocol.events import UploadGranted, UploadRequested

if TYPE_CHECKING:
    from collections.abc import Callable

    from participant.site import Site
    from participant.workspace import Submission

REQUEST_SECONDS = 30.0
AT_ONCE = 3  # chunks under way


class Uploads:
    """What was asked for, and what of it arrived. ``publish``: one event."""

    def __init__(self, site: Site, publish: Callable[[UploadRequested], None]) -> None:
        self._site = site
        self._publish = publish
        # By sha, when: the same round is announced again while one is under way.
        self._requested: dict[str, float] = {}
        # The grant in hand and its chunks that arrived: after an outage only the rest is sent.
        self._arrived: tuple[UploadGranted | None, set[int]] = (None, set())

    def request(self, submission: Submission) -> None:
        """Ask for URLs."""
        self._requested[submission.sha] = time.monotonic()
        self._publish(
            UploadRequested(
                run=submission.run,
                round=submission.round,
                sha=submission.sha,
                size=submission.size,
                creates=True,
            )
        )

    def request_once(self, submission: Submission) -> None:
        """Unless that was done a moment ago: notifications are repeated."""
        asked = self._requested.get(submission.sha)
        if asked is None or time.monotonic() - asked > REQUEST_SECONDS:
            self.request(submission)

    def forget(self, sha: str | None = None) -> None:
        """It may be asked for again at once; None: each may."""
        if sha is None:
            self._requested.clear()
        else:
            self._requested.pop(sha, None)

    def send(
        self, grant: UploadGranted, submission: Submission, report: Callable[[Progress], None]
    ) -> None:
        """Send the chunks that are missing. Raises GrantError, StoreUnavailableError."""
        path = self._site.workspace.delta_path(submission)
        if self._arrived[0] is not grant:
            self._arrived = (grant, set())
        arrived = self._arrived[1]

        def send(item: tuple[int, str]) -> None:
            number, url = item
            if number in arrived:
                return
            start = number * grant.chunk_size
            length = min(grant.chunk_size, submission.size - start)
            failpoint("upload.before")
            self._site.transfer.upload(url, path, start, length)
            arrived.add(number)
            failpoint("upload.after")

        report(Progress("upload", 0, len(grant.urls)))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for count, _ in enumerate(pool.map(send, sorted(grant.urls.items())), start=1):
                report(Progress("upload", count, len(grant.urls)))
