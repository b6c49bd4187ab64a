"""Damage to bytes, drawn from a seed: flipped, cut, doubled, spliced, or made extreme."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

EXTREMES = [b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"1e999", b"NaN", b"-1", b"[" * 300]
EXTREMES += [b"null", b"99999999999999999999", b"\xc1", b"\xdf\xff\xff\xff\xff", b'"', b"\x1b]52;"]


def damaged(draw: Random, data: bytes) -> bytes:
    """One to four things are done to ``data``; never more than twice as long and a bit."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, to = sorted((draw.randint(0, len(made)), draw.randint(0, len(made))))
        match draw.randrange(5):
            case 0 if made:
                made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
            case 1:
                del made[at:to]
            case 2:
                made[at:at] = made[at : min(to, at + len(data) // 4)]
            case 3:
                made[at : at + draw.randint(0, 8)] = draw.choice(EXTREMES)
            case _:
                made[at : at + draw.randint(0, 8)] = draw.randbytes(draw.randint(0, 8))
    return bytes(made)
