"""range-finder: bases of ``core`` adapters from the mean gradient, in two rounds without a step.

For y = W x + B A x the gradient of B at B = 0 is G A^T and that of A at A = 0 is B^T G, G being the
gradient of W itself. So two rounds of gradients of an ordinary LoRA adapter are the two passes of a
randomised SVD of the sites' mean G (Halko, Martinsson, Tropp, arXiv:0909.4061), and no site ever
holds G. In odd rounds a site sends Y = G A^T, A being random as at any genesis, and the next
adapter is (B, A) = (Q, 0) with Y = Q R, the diagonal of R not negative. In even rounds it sends
Z = Q^T G = P S V^T, and the next adapter is (Q P, V^T): orthonormal directions in the order of what
they hold of G, so that the first r are the bases of rank r. A further pair goes on with A = V^T.

A site's delta is the gradient itself here, whatever stands in the adapter. The gradient is of the
mean loss and linear in the sites' shares, so that means of it are exact; a site whose gradient is
unusually long is clipped as any delta is. Scaling each site by a norm of its own would make the two
rounds' means those of two different matrices.

How much of G the directions hold is on record as squared norms by layer, ``energy``. What lies
outside of Q is estimated in round 1 by leaving one column of Y out at a time (Epperly, Tropp,
arXiv:2207.06342): no more gradients, and never below zero. It tends to say a little too much.

LAPACK's last digits are another CPU's own, as with ``svd``. Directions that hold nothing are zeros.
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
from shared.tensors.arithmetic import significant, squared_norm
from shared.tensors.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.adapters import Layer, Side
    from shared.config import FederationConfig
    from shared.methods.inputs import Inputs
    from shared.protocol.manifest import Manifest

    Wide = NDArray[np.float64]

# Directions beyond those that are wanted: they make the wanted ones nearly the best there are.
OVERSAMPLING: Final = 8
# Of the largest: below it a direction is rounding.
ROUNDING: Final = 1e-13
TOLERANCE: Final = 1e-5  # of the factors, relative; they are fp32
DIGITS: Final = 5


class Found(NamedTuple):
    """What one layer's pass gave, fp64. ``energy``: squared norms of parts of the gradient."""

    b: Wide
    a: Wide
    energy: tuple[float, ...]


def find_range(sketch: Wide, drawn: Wide) -> Found:
    """Q of ``sketch`` = G ``drawn``^T, (outputs, rank), and zeros for A, (rank, inputs).

    ``energy``: an estimate of ||G - Q Q^T G||^2, where ``drawn`` (rank, inputs) has independent
    entries of mean 0. Raises LinAlgError where LAPACK gives up.
    """
    q, r = np.linalg.qr(sketch)
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    q, r = q * signs, r * signs[:, np.newaxis]
    lengths = np.diagonal(r)
    used = lengths > ROUNDING * lengths.max()
    b = np.zeros(sketch.shape)
    b[:, : len(used)] = np.where(used, q, 0.0)
    outside = 0.0  # where the columns of the sketch depend on each other, they hold all of G
    if used.all() and r.shape[0] == r.shape[1]:
        alone = 1 / np.sum(np.square(np.linalg.inv(r)), axis=1)
        outside = float(np.mean(alone) / np.mean(np.square(drawn)))
    return Found(b, np.zeros(drawn.shape), (outside,))


def find_directions(q: Wide, projected: Wide) -> Found:
    """Q P and V^T of ``projected`` = Q^T G = P S V^T, (rank, inputs), in the order of S.

    The largest value of each column of Q P is positive. ``energy``: ||G||^2 as far as the first
    ``depths(rank)`` directions hold it. Raises LinAlgError where LAPACK gives up.
    """
    right, core = np.linalg.qr(projected.T)
    p, values, v = np.linalg.svd(core.T, full_matrices=False)
    count = int(np.count_nonzero(values > ROUNDING * values[0]))
    b, a = np.zeros(q.shape), np.zeros(projected.shape)
    b[:, :count] = q @ p[:, :count]
    a[:count] = v[:count] @ right.T
    peaks = b[np.abs(b[:, :count]).argmax(axis=0), np.arange(count)]
    signs = np.where(peaks < 0, -1.0, 1.0)
    b[:, :count] *= signs
    a[:count] *= signs[:, np.newaxis]
    squares = np.square(values)
    return Found(b, a, tuple(math.fsum(squares[:depth]) for depth in depths(len(projected))))


def depths(rank: int) -> tuple[int, ...]:
    """The ranks whose energy is on record, the last one being all that was found.

    Powers of two from 8, and what is left of ``rank`` without the oversampling.
    """
    wanted = rank - OVERSAMPLING
    powers = [1 << bit for bit in range(3, rank.bit_length()) if 1 << bit < wanted]
    return (*powers, wanted, rank)


def _is_sketch(manifest: Manifest) -> bool:
    """Whether deltas of this form are of an odd round."""
    kind = kind_of(manifest)
    return all(kind.side(spec.name) == "left" for spec in manifest.tensors)


def _found(inputs: Inputs, layer: Layer) -> dict[str, NDArray[np.float32]]:
    figures = inputs.figures
    is_sketch = _is_sketch(inputs.sent[0])
    sent, kept = (layer.left, layer.right) if is_sketch else (layer.right, layer.left)
    with figures.watch.phase("measure"):
        mean = inputs.measure(sent, inputs.scaled, [delta.weight for delta in inputs.deltas])
    with figures.watch.phase("read"):
        other = inputs.adapter.read(kept.name).astype(np.float64)
        is_first = is_sketch and not inputs.adapter.read(sent.name).any()
        inputs.release(sent.name)
        inputs.adapter.release(kept.name)
    with figures.watch.phase("fit"):
        try:
            found = find_range(mean, other) if is_sketch else find_directions(other, mean)
        except np.linalg.LinAlgError as error:
            raise LedgerError(f"layer of {layer.left.name!r}: the fit failed: {error}") from None
    if is_first or not is_sketch:  # what is found later is no random direction
        figures.note_energy(layer.name, tuple(significant(x, DIGITS) for x in found.energy))
    with np.errstate(over="ignore"):
        return {
            layer.left.name: found.b.astype(np.float32),
            layer.right.name: found.a.astype(np.float32),
        }


class RangeFinder(Averaging):
    """The directions in which the mean gradient is largest, layer by layer."""

    by_value = False
    factors_only = True
    makes_bases = True
    renews = "takes a gradient of the other factor in each round"
    consent = "gradients"
    shows = "asks each site for gradients of its text in place of trainings"
    joined = "the adapter holds the directions in which the participants' mean gradient is largest"
    no_branch_to = "begins with random directions and an adapter that changes nothing"
    no_branch_from = (
        'its adapters are bases and no model; make a run with lora.kind = "core" and lora.bases '
        "instead"
    )
    tolerance = TOLERANCE

    def depths(self, rank: int, /) -> tuple[int, ...]:
        """See ``depths`` above."""
        return depths(rank)

    def misfits(self, config: FederationConfig, /) -> Iterator[str]:
        """Half a pass, too low a rank, and what has no use without a training."""
        setting = 'with aggregation.averaging = "range-finder"'
        if config.run.rounds % 2:
            yield (
                f"run.rounds: expected 2 {setting} (or 4: a second pair of rounds finds a little "
                f"more), got {config.run.rounds}: the second round of a pair makes the bases"
            )
        if config.lora.rank <= OVERSAMPLING:
            yield (
                f"lora.rank: expected more than {OVERSAMPLING} {setting}, got {config.lora.rank}; "
                f"give the largest rank that you want of a core adapter, and {OVERSAMPLING} more"
            )
        if config.lora.dropout:
            yield (
                f"lora.dropout: expected 0 {setting}, which takes the gradient of the model as it "
                f"is, got {config.lora.dropout:g}; set it to 0"
            )
        if config.training.proximal_mu:
            yield (
                f"training.proximal_mu: expected 0 {setting}, where nothing moves away from the "
                f"round's adapter, got {config.training.proximal_mu:g}; remove it"
            )
        if config.convergence.patience is not None:
            yield (
                f"convergence.patience: expected none {setting}, which measures no held-out loss, "
                f"got {config.convergence.patience}; remove it"
            )
        if config.selection.method == "random":
            yield (
                f'selection.method: expected "all" {setting}, got "{config.selection.method}": '
                "both rounds of a pair must be of one mean gradient; remove it"
            )

    def trained_in(self, manifest: Manifest, number: int, /) -> Manifest:
        """B in odd rounds, A in even ones."""
        side: Side = "left" if number % 2 == 1 else "right"
        return kind_of(manifest).only(manifest, side, "range-finder")

    def join(
        self, inputs: Inputs, threads: int, /
    ) -> tuple[Manifest, Generator[NDArray[np.float32]]]:
        """Layer by layer. Raises LedgerError for an adapter that is not made of factors."""
        manifest = inputs.manifest
        if not kind_of(manifest).is_factors_only(manifest):
            raise LedgerError(
                'aggregation.averaging = "range-finder": not all tensors of the adapter are factors'
            )
        return manifest, by_layer(manifest, threads, partial(_found, inputs))

    def distance(self, one: Path, other: Path, manifest: Manifest, /) -> float:
        """Of the factors, as a part of the first."""
        apart, whole = [], []
        with TensorFile(one) as first, TensorFile(other) as second:
            for spec in manifest.tensors:
                mine, theirs = (f.read(spec.name).astype(np.float64) for f in (first, second))
                whole.append(squared_norm(mine))
                apart.append(squared_norm(mine - theirs))
        total, difference = math.fsum(whole), math.fsum(apart)
        return math.sqrt(difference / total) if total else math.sqrt(difference)


MODE = RangeFinder()
