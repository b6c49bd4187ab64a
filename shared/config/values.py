"""What a setting may hold: names, hashes, counts, addresses; and the one byte form of JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticKnownError

from shared import modes
from shared.modes import WHOLE
from shared.topology import ANY_RUN, COORDINATOR

NAME_PATTERN: Final = r"^[a-z0-9-]{1,40}$"
SHA256_PATTERN: Final = r"^[0-9a-f]{64}$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]
Positive = Annotated[int, Field(ge=1)]
Module = Annotated[str, StringConstraints(max_length=300)]
StoreUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^/@\\\s]+/?$")]
Transport = Literal["tls", "plaintext"]


def _known(kind: str, name: str, *words: str) -> str:
    """As a Literal of all modes would say it."""
    known = (*words, *modes.names(kind))
    if name not in known:
        expected = ", ".join(map(repr, known))
        raise PydanticKnownError("literal_error", {"expected": expected})
    return name


def _known_or_whole(name: str) -> str:
    return _known("codecs", name, WHOLE)


Word = Annotated[str, StringConstraints(max_length=64)]
AveragingName = Annotated[Word, AfterValidator(partial(_known, "averaging"))]
CodecName = Annotated[Word, AfterValidator(partial(_known, "codecs"))]
DownName = Annotated[Word, AfterValidator(_known_or_whole)]
PolicyName = Annotated[Word, AfterValidator(partial(_known, "policies"))]
RuleName = Annotated[Word, AfterValidator(partial(_known, "rules"))]
ServerOptimizerName = Annotated[Word, AfterValidator(partial(_known, "server_optimizers"))]
RESERVED_NAMES = frozenset({ANY_RUN, COORDINATOR})


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8. Refuses NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
