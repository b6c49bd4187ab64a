"""``uniform4``: 4 levels a block, rounded at random. 0.281 bytes a value.

How, and how far off: shared/uniform.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shared.uniform import Uniform

if TYPE_CHECKING:
    from shared.codecs import Codec

CODEC: Final[Codec] = Uniform(bits=2)
