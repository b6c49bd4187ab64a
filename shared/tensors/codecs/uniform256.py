"""``uniform256``: 256 levels a block, rounded at random. 1.031 bytes a value.

How, and how far off: shared/tensors/uniform.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shared.tensors.uniform import Uniform

if TYPE_CHECKING:
    from shared.tensors.codecs import Codec

MODE: Final[Codec] = Uniform(bits=8)
