"""What somebody else wrote, made safe to show: for every table, log line and page.

A site may put into its words what a terminal acts on: codes that move the cursor, set the title or
the clipboard, turn the direction of writing around, or begin another line. One function takes all
of that away; it stands where a message comes in and again where text is printed, since records
that were written before it did are on disk.
"""

from __future__ import annotations

CUT = " … (cut)"


def printable(text: str, *, lines: bool = False) -> str:
    r"""``text`` with an escape such as ``\\x1b`` for each character that is not plain text.

    ``lines``: line breaks stay, as in an error of ours that lists several mistakes. Twice is once.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else repr(c)[1:-1] for c in text)


def cut(text: str, most: int) -> str:
    """The beginning of ``text`` in at most ``most`` characters, which say that there was more."""
    return text if len(text) <= most else text[: most - len(CUT)] + CUT
