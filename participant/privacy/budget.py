"""What is spent of a site's privacy, and the secret seed of its noise: in its workspace, for ever.

Whoever trains writes down first what that costs: a kill between the two costs what was not used,
never the other way round. The same training again, to the same bytes, costs nothing. What was spent
belongs to records and not to runs: a run pays for all that was ever trained on a text that shares a
record with its own, so that neither another run's name, nor other token limits, nor one record more
begins a new account. A site that is protected as a whole has one account of its own, of all its
runs that do so, whatever they trained on.

    <workspace>/.privacy/seed          32 bytes, mode 0600; never leaves this machine
    <workspace>/.privacy/spent.json    which steps, on which records; mode 0600

One without the other is refused, and so is a training in a run that counted this site's work before
while nothing of it is written here. Noise is never drawn anew for what was trained already.
"""

from __future__ import annotations

import math
import os
import secrets
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field, Strict

from participant.privacy.accountant import Noise, epsilon_of
from participant.privacy.noise import KEY_BYTES, Secret
from shared.config import Name, Sha256, canonical_json
from shared.disk.durable_files import file_errors, make_directories, temporary
from shared.disk.files import sync_path
from shared.errors import NotAcceptedError, PrivacyBudgetError
from shared.failpoints import failpoint
from shared.protocol.manifest import Schema

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from participant.privacy.mechanism import Mechanism

SEED_FILE = "seed"
SPENT_FILE = "spent.json"
DIGITS = 16  # of a record's digest: two records that share them pay for each other


class Spend(Schema):
    """One training. ``training``: digest of all that decides its bytes; ``text``: of its records.

    ``steps`` noisy steps at sampling rate ``rate`` with noise ``multiplier`` x clip. ``text`` None:
    it protects the site as a whole.
    """

    run: Name
    round: Annotated[int, Field(ge=1)]
    training: Sha256
    text: Sha256 | None
    rate: Annotated[float, Field(gt=0, le=1)]
    multiplier: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]
    discrete: bool = False

    @property
    def noise(self) -> Noise:
        """What each of its steps is."""
        return Noise(self.rate, self.multiplier, self.discrete)


class Spent(Schema):
    """``spent.json``. ``seed``: fingerprint of the seed. ``texts``: digests of records, by text."""

    seed: Sha256
    texts: dict[str, Annotated[tuple[str, ...], Strict(False)]] = Field(default_factory=dict)
    spends: Annotated[tuple[Spend, ...], Strict(False)] = ()


class Epsilons(NamedTuple):
    """Of one run, and of all that was trained on records of the same text."""

    run: float
    total: float
    steps: int  # of the run


class Budget:
    """One site's. ``folder`` is its own; ``most``: ``accept.max_epsilon``."""

    def __init__(self, folder: Path, most: float | None = None) -> None:
        self._folder = folder
        self._most = math.inf if most is None else most

    def charge(
        self,
        spend: Spend,
        records: Collection[str],
        delta: float,
        most_of_run: float = math.inf,
        *,
        begun: bool = False,
    ) -> tuple[Secret, Epsilons]:
        """Write down a training before it begins: the secret of its noise, and epsilon with it.

        ``records``: sha256 of each, none of a whole site. ``begun``: this site's work was counted
        in the run before. Raises NotAcceptedError where that goes beyond a ceiling,
        PrivacyBudgetError where seed or account are gone or damaged, StoreUnavailableError.
        """
        with file_errors(self._folder):
            seed, spent = self._read(begun=begun, run=spend.run)
            short = tuple(sorted(record[:DIGITS] for record in records))
            known = any(one.training == spend.training for one in spent.spends)
            after = spent
            if not known:
                texts = spent.texts if spend.text is None else {**spent.texts, spend.text: short}
                update = {"texts": texts, "spends": (*spent.spends, spend)}
                after = spent.model_copy(update=update)
            found = _epsilons(after, spend, short, delta)
            if not known:
                _refuse("privacy.target_epsilon", found.run, most_of_run, spend, delta)
                _refuse("accept.max_epsilon", found.total, self._most, spend, delta)
                self._write(SPENT_FILE, canonical_json(after.model_dump(mode="json")))
        return seed.derive("training", spend.training), found

    def with_run(self, run: str, planned: Mechanism, records: Collection[str]) -> float:
        """Epsilon of all other runs on a text with one of ``records``, and of ``run`` as planned.

        Of a whole site: of all others that protect it as one, whatever the text.

        Raises as ``charge`` does.
        """
        with file_errors(self._folder):
            _, spent = self._read(begun=False, run=run)
        short = [record[:DIGITS] for record in records]
        others = [one for one in spent.spends if one.run != run]
        wanted = None if planned.of_site else short
        before = _steps(spent.model_copy(update={"spends": tuple(others)}), wanted)
        return epsilon_of([*before, (planned.noise, planned.steps)], planned.delta)

    def _read(self, *, begun: bool, run: str) -> tuple[Secret, Spent]:
        seed_path, spent_path = self._folder / SEED_FILE, self._folder / SPENT_FILE
        try:
            spent = _read_spent(spent_path)
            if spent is None and seed_path.exists():
                raise self._lost(f"no {SPENT_FILE}")
            if begun and not any(one.run == run for one in (spent.spends if spent else ())):
                raise self._lost(f"nothing of what was spent in run {run}")
            if spent is None or not (spent.spends or seed_path.exists()):
                return self._begin()  # nothing yet, or a kill before there was a seed
            seed = Secret(seed_path.read_bytes())
        except FileNotFoundError:
            raise self._lost(f"no {SEED_FILE}") from None
        except ValueError:  # pydantic's is one
            raise self._lost("a file that is not as it was written") from None
        if spent.seed != seed.fingerprint:
            raise self._lost(f"the account of another {SEED_FILE}")
        return seed, spent

    def _begin(self) -> tuple[Secret, Spent]:
        make_directories(self._folder)
        key = secrets.token_bytes(KEY_BYTES)
        spent = Spent(seed=Secret(key).fingerprint)
        # The account first: a seed without one is a seed whose account is gone.
        self._write(SPENT_FILE, canonical_json(spent.model_dump(mode="json")))
        self._write(SEED_FILE, key)
        return Secret(key), spent

    def _write(self, name: str, data: bytes) -> None:
        """Replace a file, whole and durably, readable by its owner only."""
        failpoint("budget.before")
        with temporary(self._folder, f".{name}-") as new:
            handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            new.replace(self._folder / name)
        sync_path(self._folder)
        failpoint("budget.after")

    def _lost(self, what: str) -> PrivacyBudgetError:
        return PrivacyBudgetError(
            f"{self._folder}: expected {SEED_FILE} and {SPENT_FILE} as this site wrote them, got "
            f"{what}; put the folder back from a backup. Without it nobody knows what was spent of "
            "this text's privacy, and this site trains in no private run on it; with another text, "
            "move the folder away"
        )


def _read_spent(path: Path) -> Spent | None:
    return Spent.model_validate_json(path.read_bytes()) if path.exists() else None


def _refuse(setting: str, epsilon: float, most: float, spend: Spend, delta: float) -> None:
    if epsilon > most or math.isinf(epsilon):
        raise NotAcceptedError(
            f"{setting}: expected at most {most:g}, got {epsilon:.4g} at delta {delta:.3g} with "
            f"the {spend.steps} steps of round {spend.round}; this site's privacy budget does not "
            "allow this round: more noise or fewer steps would, or a higher ceiling"
        )


def _epsilons(spent: Spent, this: Spend, records: Collection[str], delta: float) -> Epsilons:
    alike = [one for one in spent.spends if (one.text is None) == (this.text is None)]
    here = [(one.noise, one.steps) for one in alike if one.run == this.run]
    return Epsilons(
        epsilon_of(here, delta),
        epsilon_of(_steps(spent, None if this.text is None else records), delta),
        sum(steps for _, steps in here),
    )


def _steps(spent: Spent, records: Collection[str] | None) -> list[tuple[Noise, int]]:
    """The steps that saw a text with one of ``records``; None: those that protect the site."""
    if records is None:
        return [(one.noise, one.steps) for one in spent.spends if one.text is None]
    wanted = set(records)
    shared = {text for text, known in spent.texts.items() if not wanted.isdisjoint(known)}
    return [(one.noise, one.steps) for one in spent.spends if one.text in shared]
