"""What a secure sum costs in CPU, beside the same round in plain int8: ``python THIS [--quick]``.

Site: from the trained values to the committed file. Plain: int8 with feedback. Secure: fp32, then
quantised, masked, with residual, commitments and sealed shares. Coordinator: from the stored files
to the next adapter. Plain: K deltas checked and averaged. Secure: K masked deltas checked, all
answers opened, the sum unmasked, the mean added. Training and transfers are left out.

Larger rows are of masks alone (a site's masking; the coordinator's unmasking after all answered)
and say so: their files would take tens of GB. CPU seconds of one process; ratios within one run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from coordinator.aggregation.closing import aggregate
from coordinator.aggregation.unmasking import sum_deltas
from shared.methods.inputs import WeightedDelta
from shared.protocol.manifest import Manifest, TensorSpec
from shared.protocol.secure import Exchange, SecureTerms
from shared.secure_sum.answering import answer
from shared.secure_sum.cohort import Survivors
from shared.secure_sum.exchange import ExchangeKey
from shared.secure_sum.masking import Masking, pairs_of
from shared.secure_sum.opening import open_masks
from shared.tensors.delta_file import DeltaFile, DeltaHeader, check_delta, write_delta
from shared.tensors.genesis import draw_adapter
from shared.tensors.masked_file import check_masked, masked_header, ring_of, write_masked
from shared.tensors.residual import Feedback

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.secure_sum.cohort import Cohort
    from shared.secure_sum.said import Offer

Made = TypeVar("Made")
TENSOR = 1 << 18  # numbers
SOURCE = "0" * 64
WHOLE = [(1, 5), (1, 20), (1, 100), (67, 5), (67, 20)]
MASKS = [(67, 100), (640, 5), (640, 20), (640, 100)]


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Made]) -> Made:
        """What ``work`` makes; its seconds count as ``name``."""
        began = time.process_time()
        made = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return made


def manifest_of(megabytes: int) -> Manifest:
    """Tensors of that size together, in fp32."""
    count = max(1, round(megabytes * 1e6 / 4 / TENSOR))
    shape = (512, TENSOR // 512)
    specs = [TensorSpec(name=f"t{n:04d}", shape=shape, init="zeros") for n in range(count)]
    return Manifest(tensors=tuple(specs), target_modules=())


def cohort_of(count: int, manifest: Manifest) -> tuple[dict[str, ExchangeKey], SecureTerms, Cohort]:
    """Keys, terms and pairs of a cohort."""
    keys = {f"s{number:03d}": ExchangeKey.generate() for number in range(count)}
    terms = SecureTerms(
        roster={site: Exchange(key=key.public) for site, key in keys.items()},
        levels=127,
        reaches=tuple(0.05 for _ in manifest.tensors),
    )
    return keys, terms, terms.cohort("run", 1)


def site_round(
    folder: Path,
    site: str,
    manifest: Manifest,
    terms: SecureTerms,
    cohort: Cohort,
    key: ExchangeKey,
    clock: Clock,
) -> tuple[Path, Offer, bytes]:
    """Both ways of one site; its masked file, its offer and its seed."""
    random = np.random.default_rng(7)
    values = random.standard_normal(manifest.tensors[0].shape, np.float32) * 0.01
    about = {"run": "run", "number": 1, "site": site, "source_sha": SOURCE}

    def plain() -> None:
        header = DeltaHeader.of("int8", **about)
        feedback = Feedback(None, folder / f"residual-{site}", owed=False)
        write_delta(
            folder / f"int8-{site}", manifest, "int8", header, lambda _: values, 1, feedback
        )

    def secure() -> tuple[Path, Offer, bytes]:
        seed, path = os.urandom(32), folder / f"fp32-{site}"
        write_delta(path, manifest, "fp32", DeltaHeader.of("fp32", **about), lambda _: values, 1)
        masking = Masking(cohort, site, pairs_of(cohort, site, key), seed)
        feedback = Feedback(None, folder / f"residual-{site}", owed=False)
        with DeltaFile(path, manifest) as delta:
            target = folder / f"masked-{site}"
            header = masked_header("run", 1, site, SOURCE)
            digest = write_masked(
                target, manifest, header, terms, masking, delta.read, feedback, packed=True
            )
        path.unlink()
        return target, masking.offer(digest.sha256), seed

    clock("site, plain", plain)
    made = clock("site, secure", secure)
    (folder / f"residual-{site}").unlink()
    return made


def whole_row(megabytes: int, count: int, folder: Path) -> dict[str, float]:
    """CPU seconds of a site and of the coordinator, both ways."""
    manifest, clock = manifest_of(megabytes), Clock()
    keys, terms, cohort = cohort_of(count, manifest)
    made = {
        site: site_round(folder, site, manifest, terms, cohort, key, clock)
        for site, key in keys.items()
    }
    source, target = folder / "source", folder / "target"
    draw_adapter(manifest, 1, source)
    survivors = Survivors(cohort, {site: offer.sha for site, (_, offer, _) in made.items()})
    answers = {}
    for site, (_, offer, seed) in made.items():
        sealed = {other: made[other][1].sealed[site] for other in cohort.neighbours(site)}
        pairs = pairs_of(cohort, site, keys[site])
        answers[site] = clock(
            "site, secure",
            lambda s=site, p=pairs, o=offer, b=seed, x=sealed: answer(survivors, s, p, b, o.sha, x),
        )

    def plain() -> None:
        deltas = []
        for site in keys:
            path = folder / f"int8-{site}"
            about = {"run": "run", "number": 1, "site": site, "source_sha": SOURCE}
            check_delta(path, manifest, DeltaHeader.of("int8", **about), None)
            deltas.append(WeightedDelta(site, path, 1 / count))
        aggregate(source, deltas, manifest, target, threads=1)

    def secure() -> None:
        for site, (path, _, _) in made.items():
            check_masked(path, manifest, masked_header("run", 1, site, SOURCE), ring_of(terms))
        offers = {site: offer for site, (_, offer, _) in made.items()}
        opened = open_masks(survivors, answers, offers)
        paths = {site: path for site, (path, _, _) in made.items()}
        summed = sum_deltas(survivors, terms, opened, paths, SOURCE, manifest, folder / "sum")
        aggregate(source, [summed.delta], manifest, target, threads=1)

    clock("coordinator, plain", plain)
    clock("coordinator, secure", secure)
    sizes = [(folder / f"{kind}-s000").stat().st_size for kind in ("masked", "int8")]
    for path in folder.iterdir():
        path.unlink()
    found = {n: s / count if n.startswith("site") else s for n, s in clock.seconds.items()}
    return {**found, "bytes": sizes[0] / sizes[1]}


def masks_row(megabytes: int, count: int) -> dict[str, float]:
    """CPU seconds of the masks alone."""
    manifest, clock = manifest_of(megabytes), Clock()
    keys, terms, cohort = cohort_of(count, manifest)
    site, key = next(iter(keys.items()))
    masking = Masking(cohort, site, pairs_of(cohort, site, key), os.urandom(32))
    words = np.zeros(TENSOR, ring_of(terms).word)
    clock("site", lambda: [masking.mask(words, ring_of(terms)) for _ in manifest.tensors])
    # Of a sum after all answered: one stream for each site.
    alone = Masking(cohort, site, {}, os.urandom(32))
    clock("one", lambda: [alone.mask(words, ring_of(terms)) for _ in manifest.tensors])
    return {"site": clock.seconds["site"], "coordinator": clock.seconds["one"] * count}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 MB only")
    quick = parser.parse_args().quick
    print(
        "| adapter | K | site: plain | secure | ratio | coordinator: plain | secure | ratio |"
        " bytes up |\n|---|---|---|---|---|---|---|---|---|"
    )
    for megabytes, count in WHOLE[:2] if quick else WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            row = whole_row(megabytes, count, Path(folder))
        cells = []
        for who in ("site", "coordinator"):
            plain, secure = row[f"{who}, plain"], row[f"{who}, secure"]
            cells += [f"{plain:.2f} s", f"{secure:.2f} s", f"{secure / plain:.2f}x"]
        print(
            f"| {megabytes} MB | {count} | {' | '.join(cells)} | {row['bytes']:.2f}x |", flush=True
        )
    print(
        "\nMasks alone, CPU seconds:\n\n| adapter | K | neighbours | a site | the coordinator |\n"
        "|---|---|---|---|---|"
    )
    for megabytes, count in [] if quick else MASKS:
        row = masks_row(megabytes, count)
        neighbours = count - 1 if count <= 40 else 20
        print(
            f"| {megabytes} MB | {count} | {neighbours} | {row['site']:.1f} s |"
            f" {row['coordinator']:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
