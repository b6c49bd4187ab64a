"""Where a run protects each site as a whole: what its noise costs, and the delta that has it.

What it costs is on disk before the noise is made, and the noise follows from the site's secret and
from the delta: killed at whatever point, the site comes to the same delta or to the same one again.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from participant.learner.port import DELTA_FILE
from participant.privacy import SiteNoise, Spend, grid_of, mechanism_of_sites
from shared.config import canonical_json
from shared.config.secure import fewest_survivors
from shared.errors import NotAcceptedError, ProtocolError
from shared.methods.averaging import get_averaging
from shared.protocol.manifest import LocalMetrics
from shared.protocol.privacy import PrivacySpent
from shared.secure_sum.quantise import step_of
from shared.seeds import derive_seed
from shared.tensors.arithmetic import squared_norm
from shared.tensors.delta_file import DeltaFile, DeltaHeader, write_delta

if TYPE_CHECKING:
    from pathlib import Path

    from participant.guard import Guard
    from participant.learner.port import Learned, Readiness
    from participant.privacy import Mechanism
    from participant.privacy.whole_site import Grid
    from participant.site import Site
    from shared.protocol.events import RoundStarted, RunAnnounced
    from shared.protocol.manifest import Manifest
    from shared.tensors.tensor_file import FileDigest

EXACT = "fp32"  # what a training writes before there is noise on it


def with_site_noise(run: RunAnnounced, ready: Readiness) -> Readiness:
    """With the run's noise, where it protects sites.

    Raises NotAcceptedError with the number where nothing could be learnt, and what
    ``mechanism_of_sites`` raises.
    """
    if run.privacy is None or not run.privacy.of_sites:
        return ready
    averaging = get_averaging(run.averaging)
    numbers = max(_numbers(averaging.trained_in(ready.manifest, number)) for number in (1, 2))
    return replace(ready, privacy=mechanism_of_sites(run, numbers))


def steps_of(task: RoundStarted, ready: Readiness) -> Mechanism | None:
    """The noise of a round; None where sites are not protected as a whole.

    Raises ProtocolError for another than was announced, NotAcceptedError for a cohort or a scale
    that it is not made for.
    """
    planned = ready.privacy if ready.privacy is not None and ready.privacy.of_site else None
    asked = task.privacy if task.privacy is not None and task.privacy.of_sites else None
    if planned is None and asked is None:
        return None
    if planned is None or asked is None or planned.fewest != asked.fewest:
        raise ProtocolError(
            f"privacy: expected for round {task.round} of run {task.run} what was announced, got "
            "something else. Announce the run anew"
        )
    if (task.secure is not None) != planned.noise.discrete:
        raise ProtocolError("aggregation.secure: expected what was announced, got something else")
    grid_in(task, ready, planned)
    return planned


def grid_in(task: RoundStarted, ready: Readiness, steps: Mechanism) -> Grid | None:
    """The whole numbers of a masked round; None where nothing is masked. NotAcceptedError."""
    terms = task.secure
    if terms is None:
        return None
    enough = fewest_survivors(len(terms.roster))
    if enough < steps.fewest:
        raise NotAcceptedError(
            f"privacy: expected sums of at least {steps.fewest} deltas, got a cohort of "
            f"{len(terms.roster)}, of which {enough} would do"
        )
    if len(set(terms.reaches)) != 1:
        raise NotAcceptedError(
            'reaches: expected one for all tensors with privacy.unit = "site", got '
            f"{len(set(terms.reaches))}"
        )
    numbers = _numbers(_trained(task, ready))
    return grid_of(steps, float(step_of(terms.reaches[0], terms.levels)), numbers)


def begin_noise(
    site: Site, guard: Guard, task: RoundStarted, ready: Readiness, learned: Learned, making: Path
) -> tuple[SiteNoise, Learned]:
    """Pay for a trained delta's noise; the noise, and what may be told of the training with it.

    Raises what the budget raises.
    """
    steps, privacy = ready.privacy, task.privacy
    assert steps is not None  # see steps_of
    assert privacy is not None
    grid = grid_in(task, ready, steps)
    place = [task.run, task.round, site.name, learned.delta.sha256]
    asked = [steps.clip, steps.noise.multiplier, steps.fewest, grid.step if grid else None]
    spend = Spend(
        run=task.run,
        round=task.round,
        training=hashlib.sha256(canonical_json([*place, *asked])).hexdigest(),
        text=None,
        rate=steps.noise.rate,
        multiplier=steps.noise.multiplier,
        steps=1,
        discrete=steps.noise.discrete,
    )
    secret, epsilons = site.workspace.budget(guard.max_epsilon).charge(
        spend,
        (),
        steps.delta,
        privacy.target_epsilon or math.inf,
        begun=task.last_counted is not None,
    )
    spent = PrivacySpent(
        unit="site",
        sampling="none",
        epsilon=epsilons.run,
        total_epsilon=epsilons.total,
        delta=steps.delta,
        steps=epsilons.steps,
        rate=steps.noise.rate,
        clip=steps.clip,
        noise_multiplier=steps.noise.multiplier,
    )
    with DeltaFile(making / DELTA_FILE, _trained(task, ready)) as delta:
        squares = [squared_norm(delta.read(spec)) for spec in delta.manifest.tensors]
    noise = SiteNoise(steps, math.sqrt(math.fsum(squares)), secret, grid)
    metrics = LocalMetrics(steps=learned.metrics.steps, seconds=learned.metrics.seconds)
    return noise, replace(learned, tokens=1, metrics=metrics, distinct=None, privacy=spent)


def write_noisy(
    site: Site, task: RoundStarted, ready: Readiness, making: Path, noise: SiteNoise
) -> FileDigest:
    """Put the noisy delta in the place of the trained one, as the run's codec has it."""
    header = DeltaHeader.of(
        task.codec,
        run=task.run,
        number=task.round,
        site=site.name,
        source_sha=task.source_sha,
    )
    seed = derive_seed(task.seed, site.name, task.round, "codec")
    plain, noisy, trained = making / DELTA_FILE, making / "noisy", _trained(task, ready)
    with DeltaFile(plain, trained) as delta:
        digest = write_delta(
            noisy,
            trained,
            task.codec,
            header,
            lambda spec: noise.values(spec.name, delta.read(spec)),
            seed,
            packed=task.packed,
        )
    noisy.replace(plain)
    return digest


def _trained(task: RoundStarted, ready: Readiness) -> Manifest:
    return get_averaging(task.averaging).trained_in(ready.manifest, task.round)


def _numbers(manifest: Manifest) -> int:
    return sum(spec.elements for spec in manifest.tensors)
