"""The dashboard as a Starlette application: which address shows which page.

Every page is whole without a script. With one, the page listens to ``changes`` and puts what
differs in its place.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import contextmanager
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from coordinator.liveness import moment
from gradualdiff.dashboard import charts, pages
from gradualdiff.dashboard.guarding import Guard
from gradualdiff.dashboard.recomputing import verifying
from gradualdiff.dashboard.watching import REFRESH_SECONDS, StillReadingError, Watching
from gradualdiff.run import Run
from gradualdiff.units import fixed, octets
from shared.errors import GradualDiffError, RunNotFoundError
from shared.printing import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from starlette.requests import Request

    from gradualdiff.dashboard.watching import Moment
    from shared.stores.port import ObjectStore

NOTHING = "-"
LINES = "(lines)"  # where they go in their page
TURNS = 10  # a second: how often a stream looks whether the server is to end
ALIVE_TURNS = 15  # without news a comment is sent, so that nobody in between drops the connection


class Dashboard:
    """All pages over one store. ``objects``: read only. ``path``: what names that store."""

    def __init__(self, objects: ObjectStore, path: Path, token: str | None = None) -> None:
        self._path = path
        self.is_stopping: Callable[[], bool] = lambda: False  # then streams end by themselves
        self._objects = objects
        self._watching = Watching(objects)
        self._templates = _templates(str(path))
        routed = Starlette(
            routes=[
                Route("/", self.runs),
                Route("/changes", self.changes),
                Route("/runs/{run}", self.run),
                Route("/runs/{run}/changes", self.changes),
                Route("/runs/{run}/sites", self.sites),
                Route("/runs/{run}/verify", self.verify),
                Route("/runs/{run}/rounds/{number:int}", self.round),
                Route("/runs/{run}/records/{name:path}", self.record),
                Route("/runs/{run}/bytes/{name:path}", self.record_bytes),
                Mount("/static", StaticFiles(packages=[("gradualdiff.dashboard", "static")])),
            ],
            exception_handlers=dict.fromkeys(
                (404, GradualDiffError, StillReadingError), self._problem
            ),
        )
        self.application = Guard(routed, token)

    # Pages: each runs in a thread of its own, since a store takes its time. -----------------------

    def runs(self, request: Request) -> Response:
        """Every run."""
        del request
        return self._page("runs.html", pages.runs_page(self._watching))

    def run(self, request: Request) -> Response:
        """One run."""
        with self._looking(request) as seen:
            return self._page("run.html", pages.run_page(seen))

    def round(self, request: Request) -> Response:
        """One round of it."""
        with self._looking(request) as seen:
            context = pages.round_page(seen, request.path_params["number"])
            return self._page("round.html", context)

    def sites(self, request: Request) -> Response:
        """Its sites."""
        with self._looking(request) as seen:
            return self._page("sites.html", pages.sites_page(seen))

    def record(self, request: Request) -> Response:
        """A record, to be read."""
        with self._looking(request) as seen:
            context = pages.record_page(seen, self._objects, request.path_params["name"])
            return self._page("record.html", context)

    def record_bytes(self, request: Request) -> Response:
        """A record, byte by byte: what its sha256 is of."""
        with self._looking(request) as seen:
            key = pages.record_key(seen, request.path_params["name"])
        return Response(pages.read_record(self._objects, key), media_type="application/json")

    def verify(self, request: Request) -> Response:
        """Every round computed again, its lines as they come: no script is needed for that."""
        run = Run(self._objects, request.path_params["run"], self._path)
        context = {"run": run.name, "changes": None, "lines": LINES}
        html = self._templates.get_template("verify.html").render(context)
        before, _, after = html.partition(LINES)
        body = chain([before], (escape(f"{printable(x)}\n") for x in verifying(run)), [after])
        return StreamingResponse(body, media_type="text/html")

    async def changes(self, request: Request) -> Response:
        """A word whenever there is something new to see, and one at once."""
        run = request.path_params.get("run")
        if run is not None:
            await run_in_threadpool(self._watching.run, run)  # 404 where there is none
        stream = self._changes(request, lambda: self._version(run))
        return StreamingResponse(stream, media_type="text/event-stream")

    # What they are made with ----------------------------------------------------------------------

    async def _changes(self, request: Request, version: Callable[[], object]) -> AsyncIterator[str]:
        told: object = None
        turns = 0
        while not (self.is_stopping() or await request.is_disconnected()):
            now = await run_in_threadpool(version)
            turns += 1
            if now != told:
                yield "retry: 1000\ndata: changed\n\n"
                told, turns = now, 0
            elif turns >= ALIVE_TURNS:
                yield ": alive\n\n"
                turns = 0
            for _ in range(TURNS):
                if not self.is_stopping():
                    await asyncio.sleep(REFRESH_SECONDS / TURNS)

    def _version(self, run: str | None) -> object:
        try:
            names = [run] if run is not None else list(self._watching.runs())
        except (StillReadingError, GradualDiffError) as error:
            return str(error)
        return [(name, self._version_of(name)) for name in names]

    def _version_of(self, run: str) -> object:
        try:
            return self._watching.run(run).newest().version
        except StillReadingError as reading:
            return f"{reading.count} read"
        except GradualDiffError as error:
            return str(error)

    @contextmanager
    def _looking(self, request: Request) -> Iterator[Moment]:
        with self._watching.run(request.path_params["run"]).looking() as seen:
            yield seen

    def _page(self, template: str, context: pages.Context, status: int = 200) -> Response:
        html = self._templates.get_template(template).render(context)
        return HTMLResponse(html, status)

    def _problem(self, request: Request, error: Exception) -> Response:
        """Why a page cannot be shown; one that will be says so when it can."""
        del request
        title, text, status, changes = "Nothing to show", str(error), 500, None
        match error:
            case StillReadingError():
                title, status = "Being read", 200
                changes = f"/runs/{error.run}/changes" if error.run else "/changes"
            case RunNotFoundError():
                status = 404
            case GradualDiffError():
                status = 503 if error.retryable else 500
            case _:
                text, status = "there is no such page", 404
        context = {"title": title, "text": text, "changes": changes}
        return self._page("problem.html", context, status)


def _templates(place: str) -> Environment:
    """Every value is escaped, and made printable before: hidden text turns no line around."""

    def shown(value: Any) -> Any:
        if value is None:
            return NOTHING
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return printable(value)

    made = Environment(
        loader=PackageLoader("gradualdiff.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"fixed": fixed, "octets": octets, "moment": moment}
    made.globals |= {"place": place, "box": charts, "version": _version()}
    return made


def _version() -> str:
    """Of the style sheet and the script, so that no browser keeps an old one."""
    static = files("gradualdiff.dashboard") / "static"
    found = sorted(static.iterdir(), key=lambda file: file.name)
    return hashlib.sha256(b"".join(file.read_bytes() for file in found)).hexdigest()[:12]
