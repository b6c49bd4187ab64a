"""svd (FlexLoRA, arXiv:2402.11505): the best rank-r factors of sum_i w_i B_i A_i, layer by layer.

Never the (outputs, inputs) matrix: with L = [sqrt(w_i) B_i] beside each other and R = [sqrt(w_i)
A_i] below each other the sum is L R; L = Q_L T_L and R^T = Q_R T_R by QR; the SVD of the small core
T_L T_R^T gives that of the sum (Eckart, Young: cut off after r singular values it is the best of
rank r). Each singular value goes half into B and half into A, and directions come in their order,
so that the first r_i of them are the best adapter of a site whose rank is r_i.

LAPACK's last digits depend on threads and CPU. So BLAS is held to one thread (the caller's part):
on one machine the same inputs give the same bytes, on another CPU they may differ in the last.
``distance`` tells how much. Memory: some six times one layer's stacked factors for each thread.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from shared.adapters import kind_of
from shared.errors import LedgerError
from shared.methods.averaging import Averaging
from shared.methods.layerwise import by_layer
from shared.tensors.arithmetic import is_finite, squared_norm
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.adapters import Layer
    from shared.methods.inputs import Inputs
    from shared.protocol.manifest import Manifest, TensorSpec

    Wide = NDArray[np.float64]

# A singular value below this part of the largest is rounding, not a direction.
ROUNDING: Final = 1e-13
FIT_TOLERANCE: Final = 1e-5  # of the product BA, relative; the factors are fp32


class Fit(NamedTuple):
    """Factors of one layer, fp64. ``residual``: squared norm of what no rank-r product holds."""

    b: Wide
    a: Wide
    residual: float


def fit(lefts: Sequence[Wide], rights: Sequence[Wide], spare: Wide) -> Fit:
    """Factors of rank ``len(spare)`` for sum_i lefts_i rights_i.

    ``lefts``: (outputs, r_i) each, ``rights``: (r_i, inputs). Where the sum has a lower rank the
    other directions begin as at genesis, B zero and A a row of ``spare`` (rank, inputs): with both
    zero no gradient would ever reach them. The signs are chosen so that the largest value of each
    column of B is positive. Raises LinAlgError where LAPACK gives up.
    """
    left_q, left_r = np.linalg.qr(np.concatenate(lefts, axis=1))
    right_q, right_r = np.linalg.qr(np.concatenate(rights).T)
    u, values, v = np.linalg.svd(left_r @ right_r.T, full_matrices=False)
    kept = min(len(spare), int(np.count_nonzero(values > ROUNDING * values[0])))
    roots = np.sqrt(values[:kept])
    b, a = np.zeros((len(left_q), len(spare))), spare.copy()
    b[:, :kept] = (left_q @ u[:, :kept]) * roots
    a[:kept] = roots[:, np.newaxis] * (v[:kept] @ right_q.T)
    peaks = b[np.abs(b[:, :kept]).argmax(axis=0), np.arange(kept)]
    signs = np.where(peaks < 0, -1.0, 1.0)
    b[:, :kept] *= signs
    a[:kept] *= signs[:, np.newaxis]
    beyond = values[kept:][values[kept:] > ROUNDING * values[0]]
    return Fit(b, a, float(np.sum(np.square(beyond))))


def _fitted(inputs: Inputs, layer: Layer) -> dict[str, NDArray[np.float32]]:
    watch = inputs.figures.watch
    pair = layer.right, layer.left
    with watch.phase("measure"):
        for spec in pair:
            inputs.measure(spec, inputs.scaled, [delta.weight for delta in inputs.deltas])
    with watch.phase("read"):
        a, b = (inputs.adapter.read(spec.name).astype(np.float64) for spec in pair)
        lefts, rights = [], []
        for index, delta in enumerate(inputs.deltas):
            root = math.sqrt(delta.weight)
            change_a, change_b = (inputs.scaled(index, spec.name) for spec in pair)
            rights.append(root * (a[: len(change_a)] + change_a))
            lefts.append(root * (b[:, : len(change_a)] + change_b))
        for spec in pair:
            inputs.release(spec.name)
    with watch.phase("fit"):
        try:
            found = fit(lefts, rights, a)
        except np.linalg.LinAlgError as error:
            raise LedgerError(f"layer of {layer.left.name!r}: the fit failed: {error}") from None
    inputs.figures.note_gap(found.residual)
    return {
        spec.name: _narrow(values, spec)
        for spec, values in zip(pair, (found.a, found.b), strict=True)
    }


def distance(one: Path, other: Path, manifest: Manifest) -> float:
    """How far two adapters' products are apart, as a part of the first: sqrt over all layers.

    Of the products, since two that are equal may be split into factors in more than one way.
    Raises KeyError, DecodeError or OSError where a file is not an adapter of ``manifest``.
    """
    apart, whole = [], []
    with TensorFile(one) as first, TensorFile(other) as second:
        for _, b, a in kind_of(manifest).layers(manifest):
            mine, theirs = ([f.read(a.name), f.read(b.name)] for f in (first, second))
            wide = [values.astype(np.float64) for values in (*mine, *theirs)]
            whole.append(_product_square([wide[1]], [wide[0]]))
            apart.append(_product_square([wide[1], -wide[3]], [wide[0], wide[2]]))
    total, difference = math.fsum(whole), math.fsum(apart)
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def _product_square(lefts: Sequence[Wide], rights: Sequence[Wide]) -> float:
    """Squared norm of sum_i lefts_i rights_i, by QR: no large numbers are subtracted."""
    _, left_r = np.linalg.qr(np.concatenate(lefts, axis=1))
    _, right_r = np.linalg.qr(np.concatenate(rights).T)
    return squared_norm(left_r @ right_r.T)


def _narrow(values: Wide, spec: TensorSpec) -> NDArray[np.float32]:
    """The one rounding to fp32. Raises LedgerError where it leaves fp32's range."""
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if not is_finite(result):
        raise LedgerError(
            f"tensor {spec.name!r}: expected finite values, got a product beyond fp32; "
            "a delta is too large: set aggregation.max_delta_norm"
        )
    return result


class BestFit(Averaging):
    """The best factors of the run's rank."""

    by_value = False
    factors_only = True
    takes_ranks = True
    renews = "makes both factors anew in every round, in other directions"
    joined = (
        "each round's global adapter is the best fit of its rank to the weighted mean of the "
        "participants' products BA"
    )
    tolerance = FIT_TOLERANCE

    def join(
        self, inputs: Inputs, threads: int, /
    ) -> tuple[Manifest, Generator[NDArray[np.float32]]]:
        """Layer by layer.

        Raises LedgerError for an adapter that is not made of factors, or a sum beyond fp32.
        """
        if not kind_of(inputs.manifest).is_factors_only(inputs.manifest):
            raise LedgerError(
                'aggregation.averaging = "svd": not all tensors of the adapter are factors'
            )
        return inputs.manifest, by_layer(inputs.manifest, threads, partial(_fitted, inputs))

    def distance(self, one: Path, other: Path, manifest: Manifest, /) -> float:
        """Of the products, as a part of the first."""
        return distance(one, other, manifest)


MODE = BestFit()
