"""Shamir's secret sharing over GF(2**8), byte by byte (CACM 22(11), 1979).

A secret byte is f(0) of a polynomial of degree threshold - 1 with random coefficients; the share of
holder x (1 to 255) is f(x). Fewer shares than the threshold say nothing. The field is that of AES:
polynomials modulo x**8 + x**4 + x**3 + x + 1.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

MOST_HOLDERS: Final = 255
_MODULUS: Final = 0x11B


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All products, (256, 256), and all inverses, (256,); 0 stands for that of 0."""
    logs, powers, value = [0] * 256, [0] * 255, 1
    for exponent in range(255):
        powers[exponent], logs[value] = value, exponent
        value ^= value << 1  # times 3, which generates the field
        if value > 255:
            value ^= _MODULUS
    log = np.array(logs)
    products = np.array(powers, np.uint8)[(log[:, np.newaxis] + log) % 255]
    products[0], products[:, 0] = 0, 0
    inverses = np.array([0, *(powers[-logs[value] % 255] for value in range(1, 256))], np.uint8)
    return products, inverses


_PRODUCTS, _INVERSES = _tables()


def split(
    secret: bytes, threshold: int, holders: int, draw: Callable[[int], bytes] = os.urandom
) -> list[bytes]:
    """The shares of holders 1 to ``holders``, each as long as the secret.

    ``draw(n)``: n bytes from a cryptographic generator. Raises ValueError for a threshold that
    ``holders`` cannot reach.
    """
    if not 1 <= threshold <= holders <= MOST_HOLDERS:
        raise ValueError(
            f"expected 1 <= threshold <= holders <= {MOST_HOLDERS}, got {threshold} and {holders}"
        )
    size = len(secret)
    random = np.frombuffer(draw(size * (threshold - 1)), np.uint8).reshape(threshold - 1, size)
    coefficients = [*random, np.frombuffer(secret, np.uint8)]  # the highest first
    places = np.arange(1, holders + 1)[:, np.newaxis]
    values = np.zeros((holders, size), np.uint8)
    for coefficient in coefficients:
        values = _PRODUCTS[values, places] ^ coefficient
    return [row.tobytes() for row in values]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from exactly as many shares as the threshold, by holder.

    Whether they are right is not told by them: compare what comes out with a commitment.
    """
    secret = np.zeros(len(next(iter(shares.values()))), np.uint8)
    for holder, share in shares.items():
        # Lagrange at 0: the product of other / (other - holder); minus is xor here.
        weight = np.uint8(1)
        for other in shares:
            if other != holder:
                weight = _PRODUCTS[weight, _PRODUCTS[other, _INVERSES[other ^ holder]]]
        secret ^= _PRODUCTS[weight, np.frombuffer(share, np.uint8)]
    return secret.tobytes()
