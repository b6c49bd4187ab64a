"""What a secure sum costs beside the same round in plain int8: ``python THIS [--quick]``.

With ``--rounds N`` whole rounds over a real RabbitMQ and a real S3 server, of sites that train
nothing: plain and masked runs of N rounds in turns, each round's wall seconds from its opening to
the next one's and the processor seconds of all that take part. A run's first round is left out.
``--participants K``, ``--turns R``; ``WIRE_SHAPE=llama-2-7b-r64`` for 640 MB in place of 67.

Without it CPU seconds of one process, by part; training and transfers are left out. Site: from the
trained values to the committed file. Plain: int8 with feedback. Secure: fp32, then quantised,
masked, with residual, commitments and sealed shares. Coordinator: from the stored files to the next
adapter. Plain: K deltas checked and averaged. Secure: K masked deltas checked, all answers opened,
the sum unmasked, the mean added. The largest row is of masks alone (a site's masking; the
coordinator's unmasking after all answered): its files would take 42 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from wire_federation import Federation, run_federation, shared_out
from wire_servers import add_server_options, end_on_signals, servers

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

    from wire_servers import Servers

    from shared.secure_sum.cohort import Cohort
    from shared.secure_sum.said import Offer

Made = TypeVar("Made")
TENSOR = 1 << 18  # numbers
SOURCE = "0" * 64
WHOLE = [(1, 5), (1, 20), (1, 100), (67, 5), (67, 20), (67, 100), (640, 5), (640, 20)]
MASKS = [(640, 100)]
PARTS = ("coordinator", "sites", "store", "broker")


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


def one_run(
    place: Servers, folder: Path, name: str, given: argparse.Namespace, *, secure: bool
) -> tuple[list[float], dict[str, float]]:
    """Wall seconds of each round but the first, and processor seconds a round by part."""
    sites = [f"{name}-{number:03d}" for number in range(given.participants)]
    federation = Federation(place, folder / name, name, sites, given.rounds, "int8", "int4", secure)
    with federation:
        before = place.cpu_seconds()
        run_federation(federation)
        cpu = {n: (s - before[n]) / given.rounds for n, s in place.cpu_seconds().items()}
        later = given.rounds - 1
        cpu["coordinator"] = federation.phases("coordinator")["cpu_seconds"] / later
        watches = [federation.phases(names[0]) for names in shared_out(sites)]
        cpu["sites"] = sum(watch["cpu_seconds"] for watch in watches) / later
        seconds = federation.round_seconds()[1:]
    shutil.rmtree(folder / name)
    return seconds, cpu


def whole_rounds(given: argparse.Namespace) -> None:
    """Runs of both kinds in turns over one pair of servers; print both and their ratios."""
    walls: dict[bool, list[float]] = {False: [], True: []}
    spent: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=given.dir, prefix="secure-"))
        place = stack.enter_context(servers(given, Path(name)))
        for turn in range(given.turns):
            for secure in (False, True) if turn % 2 == 0 else (True, False):
                kind = "secure" if secure else "plain"
                seconds, cpu = one_run(place, Path(name), f"{kind}-{turn}", given, secure=secure)
                walls[secure] += seconds
                spent[secure].append(cpu)
                print(f"{kind}: rounds of {' '.join(f'{s:.2f}' for s in seconds)} s", flush=True)
    print(f"\n| a round, K = {given.participants} | plain | secure | ratio |\n|---|---|---|---|")

    def row(name: str, plain: float, secure: float) -> None:
        print(f"| {name} | {plain:.2f} s | {secure:.2f} s | {secure / plain:.2f}x |")

    row("wall, median", *(statistics.median(walls[secure]) for secure in (False, True)))
    row("wall, least", *(min(walls[secure]) for secure in (False, True)))
    totals = [statistics.median(sum(cpu.values()) for cpu in spent[s]) for s in (False, True)]
    row("CPU of all", *totals)
    for part in PARTS:
        row(
            f"CPU, {part}",
            *(statistics.median(cpu[part] for cpu in spent[s]) for s in (False, True)),
        )


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description="Seconds of a secure sum and of a plain one.")
    parser.add_argument("--quick", action="store_true", help="1 MB only")
    parser.add_argument("--rounds", type=int, default=0, help="whole rounds of a run, 2 or more")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="runs of each kind")
    add_server_options(parser)
    given = parser.parse_args()
    if given.rounds:
        end_on_signals()
        whole_rounds(given)
        return
    quick = given.quick
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
