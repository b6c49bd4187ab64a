"""Numbers as people read them, on the command line and on the dashboard. None stays None."""

from __future__ import annotations


def fixed(value: float | None, digits: int) -> str | None:
    """A number with so many decimals."""
    return None if value is None else f"{value:.{digits}f}"


def megabytes(count: int | None) -> str | None:
    """Bytes as MB (10^6)."""
    return None if count is None else f"{count / 1e6:.1f}"


def octets(count: float | None) -> str | None:
    """Bytes in the unit that fits, of three figures."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
