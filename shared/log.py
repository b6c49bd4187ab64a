"""Log set-up: one line per event, ``noun.verb-past``, fields instead of prose.

Whatever is bound by ``structlog.contextvars`` (run, round, participant) is in every line of that
thread. Invariant: no signed URL leaves through a log line, in whatever field, exception text or
object it hides, and nothing that a terminal would act on; :func:`redact` stands last before the
renderer, on rendered values only. What is logged may be a stranger's: it takes time in proportion
to its length, and its length has an end.

structlog takes a tenth of a second to import (it pulls rich and asyncio), so it is imported when
the first line is written and not with this module.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

from shared.errors import ConfigError
from shared.printing import cut, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from structlog.typing import FilteringBoundLogger, Processor

REDACTED = "redacted"
LEVELS = ("debug", "info", "warning", "error", "critical")

_URL_FIELDS = frozenset({"get_url", "put_url", "signed_url", "url", "urls", "signature"})
_SIGNS = ("signature=", "x-amz-signature", "x-amz-credential", "x-amz-security-token")
_WORD = re.compile(r"\S+")
_MOST_CHARACTERS = 20_000  # of one text; a traceback has fewer


def configure(stream: TextIO | None = None, json: bool | None = None, level: str = "info") -> None:
    """Send log lines of ``level`` and above to ``stream`` (standard error if None).

    ``json`` None means JSON unless ``stream`` is a terminal. May be called again; loggers already
    handed out follow. Raises ConfigError for a level that is not in ``LEVELS``.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level: expected one of {', '.join(LEVELS)}, got {level!r}")
    import structlog  # noqa: PLC0415 - see the module's docstring

    out = sys.stderr if stream is None else stream
    as_json = not out.isatty() if json is None else json
    renderer: Processor
    if as_json:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        # rich's traceback prints local variables, and with them URLs and training text
        renderer = structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )


def get_logger() -> FilteringBoundLogger:
    """A logger under the current configuration; without one it drops every line.

    A script that imports this project has set up nothing, and its standard output is its own.
    """
    import structlog  # noqa: PLC0415 - see the module's docstring

    logger: FilteringBoundLogger = structlog.get_logger()
    if not structlog.is_configured():
        logger = structlog.wrap_logger(None, processors=[_drop])
    return logger


def _drop(_logger: object, _method: str, _event_dict: object) -> NoReturn:
    import structlog  # noqa: PLC0415 - see the module's docstring

    raise structlog.DropEvent


def redact(
    _logger: object, _method: str, event_dict: MutableMapping[str, object]
) -> Mapping[str, object]:
    """The structlog processor that replaces anything like a signed URL by ``redacted``."""
    return {key: _clean(key, value) for key, value in event_dict.items()}


def _clean(key: object, value: object) -> object:
    if isinstance(key, str) and key.lower() in _URL_FIELDS and value is not None:
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {_text(str(inner)): _clean(inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(None, item) for item in value]
    # Objects become text here, since a renderer would call repr() on them behind our back.
    text = value if isinstance(value, str) else str(value)
    return _text(text, lines=key == "exception")


def _text(text: str, *, lines: bool = False) -> str:
    """Cut first: a parameter stands before its secret, so a cut may part it from nothing else."""
    return printable(_WORD.sub(_word, cut(text, _MOST_CHARACTERS)), lines=lines)


def _word(match: re.Match[str]) -> str:
    """The whole word around a signature goes: key and expiry beside it help to guess it."""
    word = match[0]
    return REDACTED if any(sign in word.lower() for sign in _SIGNS) else word
