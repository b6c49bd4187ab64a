"""Personal data in a text, by its form: e-mail, phone, date, number of an account or a person.

What looks like personal data is taken for it. Names have no form: they come from the site's list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_FORMS = {
    "email": r"[\w.%+-]+@[\w-]+(?:\.[\w-]+)+",
    "date": (
        r"\b(?:(?:19|20)\d\d[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)\d\d"
        rf"|\d{{1,2}}\.? (?:{_MONTHS})[a-z]*\.?,? (?:19|20)\d\d"
        rf"|(?:{_MONTHS})[a-z]*\.? \d{{1,2}},? (?:19|20)\d\d)\b"
    ),
    # IBAN; a social security number of the US; letters and six digits or more, as on a wristband
    "id": (
        r"\b(?:[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?|\d{3}-\d\d-\d{4}"
        r"|[A-Z]{1,4}[- ]?\d{6,12})\b"
    ),
    # 8 to 15 digits: ITU-T E.164 allows no more
    "phone": r"(?<![\w.])\+?\d(?:[ ()/.-]{0,2}\d){7,14}(?!\w)",
}
# An earlier kind takes its part of the text: a date is no phone number.
_COMPILED = {
    kind: re.compile(form, re.IGNORECASE * (kind == "date")) for kind, form in _FORMS.items()
}
_WORD = re.compile(r"\w+")
NAME = "name"
# Nobody guesses one of these by chance.
DISTINCT = frozenset({"email", "id", "phone"})


@dataclass(frozen=True)
class Personal:
    """``kind``: which form; ``text``: what has it."""

    kind: str
    text: str


class Patterns:
    """Those that a site looks for. ``names``: each one or several words."""

    def __init__(self, kinds: Collection[str], names: Collection[str] = ()) -> None:
        self._kinds = [kind for kind in _COMPILED if kind in kinds]
        self._names = {words for name in names if (words := _words(name))}
        self._longest = max((len(words) for words in self._names), default=0)

    def find(self, text: str) -> list[Personal]:
        """Everything in ``text`` that looks like personal data."""
        return [*self._by_form(text), *self._by_name(text)]

    def _by_form(self, text: str) -> Iterator[Personal]:
        for kind, form in _COMPILED.items():
            found = [match.group() for match in form.finditer(text)]
            text = form.sub(" | ", text)
            if kind in self._kinds:
                yield from (Personal(kind, one) for one in found)

    def _by_name(self, text: str) -> Iterator[Personal]:
        words = _words(text)
        for start in range(len(words)):
            for count in range(1, self._longest + 1):
                if words[start : start + count] in self._names:
                    yield Personal(NAME, " ".join(words[start : start + count]))


def read_names(path: Path) -> list[str]:
    """One a line; blank lines and lines that begin with ``#`` are none. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"privacy.names_file: expected a UTF-8 file with a name on each line, got {path}: "
            f"{reason}; correct the path or the file"
        ) from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.casefold() for word in _WORD.findall(text))
