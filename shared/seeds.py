"""Every random number of a run comes from its one seed through this function."""

from __future__ import annotations

import hashlib

from shared.config import canonical_json


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from the parts, e.g. ``derive_seed(run_seed, "site-a", round, step)``.

    First 8 bytes of the sha256 of the canonical JSON list, high bit cleared, so that torch and
    numpy both take it. Independent of platform and Python's hash seed.
    """
    digest = hashlib.sha256(canonical_json(list(parts))).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)
