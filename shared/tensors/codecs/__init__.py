"""How a delta travels: one file in this folder per codec, found by its name.

A new codec is a new file here that sets ``MODE``, or another package's: ``shared/modes.py``. A
codec knows one tensor at a time and nothing of files, rounds or sites. Its bytes must be a function
of values and seed alone, and ``version`` goes up whenever they change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from shared.config import FederationConfig
    from shared.protocol.manifest import TensorSpec
    from shared.tensors.tensor_file import TensorLayout


class Codec(Protocol):
    """One way to write a tensor of a delta."""

    @property
    def name(self) -> str:
        """What ``codec.name`` in the config says: the file's name in this folder."""

    @property
    def version(self) -> int:
        """From 1; goes up when the same values give other bytes."""

    @property
    def exact(self) -> bool:
        """Whether what is decoded is always what was encoded, to the last bit."""

    def misfits(self, config: FederationConfig, /) -> Iterable[str]:
        """Settings that this codec does not go with: field, what to do."""

    def layout(self, spec: TensorSpec, /) -> tuple[TensorLayout, ...]:
        """The parts one tensor is written as, the first under its own name, then ``NAME:part``.

        A part whose length follows from the values (one that is entropy coded) ``varies``: it has
        one dimension, and its shape here is the most that any values come to.
        """

    def encode(
        self, spec: TensorSpec, values: NDArray[np.float32], seed: int, /
    ) -> tuple[NDArray[Any], ...]:
        """The parts of finite fp32 ``values`` of ``spec.shape``, in ``layout``'s order.

        ``seed``: for codecs that round at random; the others leave it alone.
        """

    def decode(self, spec: TensorSpec, parts: Sequence[NDArray[Any]], /) -> NDArray[np.float32]:
        """fp32 values of ``spec.shape`` from parts that have ``layout``'s shapes and dtypes.

        Parts may hold anything at all, so no length, index or count in them is believed before
        memory is taken by it: raises DecodeError with expected and got. The caller checks that what
        comes out is finite, and names the tensor.
        """


def get_codec(name: str) -> Codec:
    """The codec of this name. Raises ConfigError that lists the known ones."""
    return cast("Codec", modes.get("codecs", name))


def feedback_is_missing(name: str, config: FederationConfig) -> Iterator[str]:
    """The misfit of a codec that is of use only where what it leaves out is sent later."""
    averaging = config.aggregation.averaging
    if not config.codec.feedback:
        yield (
            f'codec.feedback is false, but codec.name = "{name}" leaves out most of a delta, and '
            'is of use only where that is sent later; set it to true, or choose "int4"'
        )
    elif not modes.get("averaging", averaging).by_value:
        yield (
            f'aggregation.averaging = "{averaging}" makes the adapter anew in every round, but '
            f'codec.name = "{name}" leaves out most of a delta, and what is sent later would '
            'belong to another adapter; choose "int4" or a mode such as "fedavg"'
        )
