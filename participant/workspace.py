"""A site's own disk: what it trained and what became of it.

One folder rename commits a round's delta together with the next optimiser state, so a kill leaves
either all of it or nothing. Folders without a commit are swept at the next start. Nothing here is
needed for ever: what is lost is asked for again or trained again, to the same bytes.

    <root>/<run>/adapters/<sha>.safetensors      global adapters fetched
    <root>/<run>/updates/<sha>                   what leads from one to the next, while it is added
    <root>/<run>/trained/<round>-<sha>/          delta.safetensors, submission.json, optimizer...,
                                                 residual.safetensors: what the codec left out
    <root>/<run>/held/<round>-<sha>/             the same of a delta that the site's gate keeps
    <root>/<run>/bases/<sha>.safetensors         of core adapters, fetched once
    <root>/<run>/making/                         the round in hand, not committed
    <root>/<run>/config                          digest of the run's settings
    <root>/<run>/checkpoints/<round>-<source>/   how far its training is (checkpoints.py)
    <root>/<run>/taken-part.json                 what this site gave to the run: to be kept
    <root>/.privacy/                             of all runs: what is spent of differential privacy
    <root>/<run>/traffic.json                    bytes moved and not on record yet (traffic.py)
    <root>/<run>/heads.jsonl                     the run's history as confirmed here (heads.py)
    <root>/<run>/births                          which run it means by this name (births.py)
    <root>/<run>/bonds/<round>.json              what binds this site in a secure sum: to be kept
    <root>/exchange.key                          by which it shares masks with other sites
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, ValidationError

from participant.checkpoints import (
    DEFAULT_SECONDS,
    Checkpoints,
    checkpoint_folder_name,
    settings_digest,
)
from participant.learner.port import DELTA_FILE, RESIDUAL_FILE, STATE_FILE
from participant.privacy import Budget
from shared.config import Name, Sha256, canonical_json
from shared.disk.durable_files import file_errors, make_directories, temporary, write_new
from shared.disk.files import digest_file, sync_path
from shared.errors import StoreError, StoreUnavailableError
from shared.failpoints import failpoint
from shared.protocol.events import AdapterEvaluated
from shared.protocol.manifest import AuditFigures, LocalMetrics, Schema
from shared.protocol.privacy import PrivacySpent
from shared.protocol.secure import Exchange, MaskedWith, Revealed, Secret, SecureTerms
from shared.secure_sum.answering import Bond
from shared.secure_sum.exchange import ExchangeKey, ExchangeText

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from shared.protocol.events import RoundStarted

SUBMISSION_FILE = "submission.json"
DIGEST_FILE = "config"  # of which settings all of a run's folder is
WORK = ("adapters", "updates", "trained", "making", "checkpoints", "held")
ACCEPTED_FILE = "accepted"  # beside a delta that the coordinator has taken
RELEASED_FILE = "released"  # beside one that an operator let go, until it is offered
OVER_FILE = "over"  # beside one that the gate keeps, once nobody would count it
TAKEN_PART_FILE = "taken-part.json"
TRAFFIC_FILE = "traffic.json"
HEADS_FILE = "heads.jsonl"
EXCHANGE_FILE = "exchange.key"
PRIVACY_FOLDER = ".privacy"  # no run's name


class Submission(Schema):
    """A committed local training: what will be, or was, submitted.

    ``expires_at``: of the RoundStarted that asked for it; it tells old words from new ones.
    ``settings``: digest of what it asked for. ``residual``: what became of the one that the round
    began from. ``left_out``: sha256 of the one beside the delta. ``attempt``, ``fingerprint`` (of
    the base model) and ``codec``: as the round asked for it; none in an earlier release's.
    ``masked``, ``mask_seed``, ``terms``: of a masked delta what goes with it, its own seed, and how
    it was masked.
    """

    run: Name
    round: Annotated[int, Field(ge=1)]
    source_sha: Sha256
    sha: Sha256
    size: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    metrics: LocalMetrics
    state: Literal["fresh", "kept"]
    expires_at: float = 0.0
    settings: str = ""
    residual: Literal["none", "kept", "lost"] = "none"
    left_out: Sha256 | None = None
    attempt: Annotated[int, Field(ge=1)] | None = None
    fingerprint: Sha256 | None = None
    codec: str | None = None
    masked: MaskedWith | None = None
    mask_seed: Secret | None = None
    terms: SecureTerms | None = None
    privacy: PrivacySpent | None = None
    audit: AuditFigures | None = None


class KeptBond(Schema):
    """What binds this site in a round, and the one answer that it gave, if any."""

    attempt: Annotated[int, Field(ge=1)]
    survivors: str = ""
    revealed: Revealed | None = None

    @classmethod
    def of(cls, bond: Bond, revealed: Revealed | None = None) -> Self:
        """As it is kept."""
        return cls(attempt=bond.attempt, survivors=bond.survivors, revealed=revealed)

    @property
    def bond(self) -> Bond:
        """As it binds."""
        return Bond(self.attempt, self.survivors, answered=self.revealed is not None)


class Training(Schema):
    """One that was begun. ``task``: digest of all that decides its bytes."""

    round: Annotated[int, Field(ge=1)]
    task: Sha256


class TakenPart(Schema):
    """What this site accepted of a run and gave to it.

    ``announced``: digest of the settings accepted last. ``failures``: trainings without a delta, by
    round. ``evaluated``: the one loss of the run's result that was told. ``roster``: by what other
    sites share masks, as it was told. ``retired``: public halves that gave way to others there.
    """

    config_digest: Sha256 | None = None
    announced: Sha256 | None = None
    trainings: tuple[Training, ...] = ()
    failures: dict[int, int] = Field(default_factory=dict)
    evaluated: AdapterEvaluated | None = None
    roster: dict[Name, Exchange] = Field(default_factory=dict)
    retired: tuple[ExchangeText, ...] = ()


class Workspace:
    """One site's folder. Raises StoreUnavailableError where the disk is full or read-only."""

    def __init__(self, root: Path, checkpoint_seconds: float = DEFAULT_SECONDS) -> None:
        self._root = root
        self._checkpoint_seconds = checkpoint_seconds

    @property
    def root(self) -> Path:
        """Where it lies."""
        return self._root

    def begin(self, run: str, config_digest: str) -> bool:
        """Clear away what was made for a run of this name under other settings; whether it was.

        It was deleted and begun anew: what was trained for the other one must not be sent to it.
        """
        mark = self._root / run / DIGEST_FILE
        if mark.is_file() and mark.read_text(encoding="ascii", errors="replace") == config_digest:
            return False
        if anew := mark.exists():
            for name in WORK:
                shutil.rmtree(self._root / run / name, ignore_errors=True)
        unfinished = self._folder(run, "making") / DIGEST_FILE
        with file_errors(unfinished):
            unfinished.write_text(config_digest, encoding="ascii")
            unfinished.replace(mark)
        return anew

    def adapter_path(self, run: str, adapter_sha: str) -> Path:
        """Where a global adapter lies or is to be put."""
        return self._folder(run, "adapters") / f"{adapter_sha}.safetensors"

    def update_path(self, run: str, sha: str) -> Path:
        """Where an update is put while it is added to an adapter."""
        return self._folder(run, "updates") / sha

    def bases_path(self, run: str, sha: str) -> Path:
        """Where the bases of a run lie or are to be put."""
        return self._folder(run, "bases") / f"{sha}.safetensors"

    def taken_part(self, run: str) -> TakenPart:
        """What this site gave to a run so far. Raises StoreError where that cannot be read."""
        path = self._root / run / TAKEN_PART_FILE
        try:
            return TakenPart.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return TakenPart()
        except (OSError, ValidationError):
            raise StoreError(
                f"{path}: expected the record of what this site gave to run {run}, got an "
                "unreadable file; the site no longer trains in this run; remove the file to begin "
                "the count again"
            ) from None

    def keep_taken_part(self, run: str, taken: TakenPart) -> None:
        """Replace it, whole and durably."""
        failpoint("counted.before")
        self._replace(self._root / run / TAKEN_PART_FILE, taken)
        failpoint("counted.after")

    def exchange_key(self) -> ExchangeKey:
        """The key for masks; made when it is first asked for. Raises StoreError.

        It is never made anew: other sites know its public half.
        """
        path = self._root / EXCHANGE_FILE
        with file_errors(path):
            if not path.exists():
                make_directories(path.parent)
                with temporary(path.parent, f".{path.name}-") as new:
                    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    with os.fdopen(handle, "w", encoding="ascii") as file:
                        file.write(ExchangeKey.generate().raw.hex())
                    sync_path(new)
                    new.rename(path)
                sync_path(path.parent)
            try:
                return ExchangeKey(bytes.fromhex(path.read_text(encoding="ascii")))
            except ValueError:
                raise StoreError(
                    f"{path}: expected 64 hex digits, got others; restore it from a copy: without "
                    "it this site takes part in no secure sum that it began"
                ) from None

    def bond(self, run: str, round_number: int) -> KeptBond | None:
        """What binds this site in a round. Raises StoreError where that cannot be read."""
        path = self._bond_path(run, round_number)
        try:
            return KeptBond.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise StoreError(
                f"{path}: expected what binds this site in round {round_number}, got an unreadable "
                "file; restore it from a copy: without it the site reveals nothing of this round"
            ) from None

    def keep_bond(self, run: str, round_number: int, kept: KeptBond) -> None:
        """Replace it, whole and durably."""
        failpoint("bond.before")
        self._replace(self._bond_path(run, round_number), kept)
        failpoint("bond.after")

    def _bond_path(self, run: str, round_number: int) -> Path:
        return self._root / run / "bonds" / f"{round_number:05d}.json"

    @staticmethod
    def _replace(path: Path, value: Schema) -> None:
        with file_errors(path):
            make_directories(path.parent)
            with temporary(path.parent, f".{path.name}-") as new:
                write_new(new, [canonical_json(value.model_dump(mode="json"))])
                new.replace(path)
            sync_path(path.parent)

    def budget(self, most_epsilon: float | None) -> Budget:
        """What is spent of this site's differential privacy; ``most_epsilon``: in all."""
        return Budget(self._root / PRIVACY_FOLDER, most_epsilon)

    def traffic_path(self, run: str) -> Path:
        """Where this site counts the bytes of a run."""
        return self._root / run / TRAFFIC_FILE

    def heads_path(self, run: str) -> Path:
        """Where this site keeps which history of the run was confirmed to it."""
        return self._root / run / HEADS_FILE

    def new_round(self, run: str) -> Path:
        """An empty folder for the round in hand; what an earlier attempt left is removed."""
        folder = self._root / run / "making"
        shutil.rmtree(folder, ignore_errors=True)
        return self._folder(run, "making")

    def checkpoints(self, task: RoundStarted, site: str) -> Checkpoints:
        """Where the training of this round in ``site`` keeps how far it is."""
        folder = self._checkpoints(task.run, task.round, task.source_sha)
        return Checkpoints(folder, task, site, self._checkpoint_seconds)

    def commit(self, making: Path, submission: Submission, *, hold: bool = False) -> None:
        """Commit delta and state of the round in hand by one rename, durably.

        Its checkpoints go: they hold nothing that the delta does not. ``hold``: to where nothing is
        sent from.
        """
        (making / SUBMISSION_FILE).write_bytes(canonical_json(submission.model_dump(mode="json")))
        failpoint("commit.written")
        place = "held" if hold else "trained"
        target = self._place(submission.run, place, submission.round, submission.sha)
        shutil.rmtree(target, ignore_errors=True)
        for path in (*making.iterdir(), making):
            sync_path(path)
        failpoint("commit.before")
        making.rename(target)
        failpoint("commit.renamed")
        sync_path(target.parent)
        failpoint("commit.after")
        done = self._checkpoints(submission.run, submission.round, submission.source_sha)
        shutil.rmtree(done, ignore_errors=True)
        failpoint("checkpoint.cleared")

    def submission(self, task: RoundStarted) -> Submission | None:
        """What this site trained in just this round, if it is committed and may leave.

        A run that begins anew under its name may ask for other settings from the same source.
        """
        return self._found(task, "trained")

    def held(self, task: RoundStarted) -> Submission | None:
        """The same of one that the site's gate keeps."""
        return self._found(task, "held")

    def _found(self, task: RoundStarted, place: str) -> Submission | None:
        wanted = (task.source_sha, settings_digest(task), task.secure)
        for folder in self._folder(task.run, place).glob(f"{task.round:05d}-*"):
            found = self._read(folder)
            if found is not None and (found.source_sha, found.settings, found.terms) == wanted:
                return found
        return None

    def take_released(self, run: str) -> list[Submission]:
        """What an operator released since this was asked last; each is told once."""
        marks = list(self._folder(run, "trained").glob(f"*/{RELEASED_FILE}"))
        found = [self._read(mark.parent) for mark in marks]
        for mark in marks:
            mark.unlink(missing_ok=True)
        if marks:
            failpoint("released.taken")
        return [submission for submission in found if submission is not None]

    def mark_accepted(self, run: str, round_number: int, sha: str) -> None:
        """Remember that the coordinator has this delta; no harm where it is gone."""
        folder = self._trained(run, round_number, sha)
        if folder.is_dir():
            (folder / ACCEPTED_FILE).touch()

    def unanswered(self, run: str) -> list[Submission]:
        """Committed deltas that the coordinator did not take yet, oldest first."""
        folders = sorted(self._folder(run, "trained").iterdir())
        waiting = (self._read(f) for f in folders if not (f / ACCEPTED_FILE).exists())
        return [submission for submission in waiting if submission is not None]

    def committed(self, run: str, round_number: int, sha: str) -> Submission | None:
        """The committed delta of this sha, if it is here and whole."""
        return self._read(self._trained(run, round_number, sha))

    def last_submission(self, run: str) -> Submission | None:
        """The newest committed round of a run."""
        folders = sorted(self._folder(run, "trained").iterdir(), reverse=True)
        return next((found for f in folders if (found := self._read(f)) is not None), None)

    def newest(self, run: str) -> Submission | None:
        """What the folder of the highest round says; whether its delta is whole does not matter."""
        for folder in sorted(self._folder(run, "trained").iterdir(), reverse=True):
            try:
                return Submission.model_validate_json((folder / SUBMISSION_FILE).read_bytes())
            except (OSError, ValidationError):
                continue
        return None

    def delta_path(self, submission: Submission) -> Path:
        """The delta's file."""
        return self._trained(submission.run, submission.round, submission.sha) / DELTA_FILE

    def state_path(self, run: str, sha: str | None) -> Path | None:
        """The optimiser state committed with the delta ``sha``; None when there is none."""
        if sha is None:
            return None
        for folder in self._folder(run, "trained").glob(f"*-{sha}"):
            path = folder / STATE_FILE
            if path.exists():
                return path
        return None

    def residual_path(self, run: str, sha: str) -> Path | None:
        """What the codec left out of the delta ``sha``; None where that is not here and whole.

        The coordinator named the delta as accepted, whether or not its answer ever came.
        """
        for folder in self._folder(run, "trained").glob(f"*-{sha}"):
            path = folder / RESIDUAL_FILE
            try:
                found = Submission.model_validate_json((folder / SUBMISSION_FILE).read_bytes())
                if digest_file(path)[0] == found.left_out:
                    (folder / ACCEPTED_FILE).touch()
                    return path
            except (OSError, ValidationError):
                continue
        return None

    def forget(self, run: str, round_number: int, sha: str) -> None:
        """Remove a delta that was refused, so that the round is trained anew when asked for.

        Not if the same bytes were accepted since, and this is an old word that came again: the next
        round starts from what was left out of them.
        """
        failpoint("forget.before")
        folder = self._trained(run, round_number, sha)
        if not (folder / ACCEPTED_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        failpoint("forget.after")

    def sweep(
        self,
        run: str,
        closed_round: int,
        adapter_sha: str,
        *,
        keep_unanswered: bool = False,
        keep_source: bool = False,
        keep: Collection[str | None] = (),
    ) -> list[int]:
        """After a round closed keep the new adapter and the newest round trained here.

        That one's optimiser state may be needed, however many rounds this site is not selected in.
        So may the residual of the newest delta that was accepted.
        ``keep_unanswered``: and every delta that the coordinator did not take yet. ``keep_source``:
        and the adapter that the newest round here began with, which an update may lead on from.
        ``keep``: and these deltas, from whose state and residual the next training is to begin.
        Returns the rounds whose delta was removed though nobody had taken it. A training of a
        closed round is not resumed after a kill: its checkpoints go.
        """
        lost = []
        failpoint("sweep.before")
        found = self.newest(run)
        newest = found.round if found is not None else closed_round
        base = self._newest_residual(run)
        for folder in self._folder(run, "trained").iterdir():
            number, _, sha = folder.name.partition("-")
            if folder == base or sha in keep:
                continue
            # Names that are not ours are left alone.
            if number.isdigit() and int(number) < min(closed_round, newest):
                if not (folder / ACCEPTED_FILE).exists():
                    if keep_unanswered:
                        continue
                    lost.append(int(number))
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self._folder(run, "checkpoints").iterdir():
            number, _, _ = folder.name.partition("-")
            if number.isdigit() and int(number) <= closed_round:
                shutil.rmtree(folder, ignore_errors=True)
        kept = {adapter_sha, found.source_sha if found is not None and keep_source else ""}
        for path in self._folder(run, "adapters").iterdir():
            if path.name.removesuffix(".safetensors") not in kept and path.is_file():
                path.unlink(missing_ok=True)
        failpoint("sweep.after")
        return lost

    def end_held(self, run: str, closed_round: int) -> None:
        """Mark what the gate keeps of rounds up to this one: nobody would count it any more."""
        for folder in self._folder(run, "held").iterdir():
            number, _, _ = folder.name.partition("-")
            if number.isdigit() and int(number) <= closed_round:
                with contextlib.suppress(FileNotFoundError):  # released or dropped just now
                    (folder / OVER_FILE).touch()

    def _newest_residual(self, run: str) -> Path | None:
        """The folder of the newest delta that was accepted and has a residual."""
        for folder in sorted(self._folder(run, "trained").iterdir(), reverse=True):
            if (folder / ACCEPTED_FILE).exists() and (folder / RESIDUAL_FILE).exists():
                return folder
        return None

    def _folder(self, run: str, name: str) -> Path:
        folder = self._root / run / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailableError(
                f"{folder}: cannot be made ({error.strerror}); free space or fix its rights"
            ) from None
        return folder

    def _checkpoints(self, run: str, round_number: int, source_sha: str) -> Path:
        return self._root / run / "checkpoints" / checkpoint_folder_name(round_number, source_sha)

    def _trained(self, run: str, round_number: int, sha: str) -> Path:
        return self._place(run, "trained", round_number, sha)

    def _place(self, run: str, place: str, round_number: int, sha: str) -> Path:
        return self._folder(run, place) / f"{round_number:05d}-{sha}"

    def _read(self, folder: Path) -> Submission | None:
        """What a folder holds; None if anything of it is torn, so that it is trained anew."""
        try:
            found = Submission.model_validate_json((folder / SUBMISSION_FILE).read_bytes())
            whole = digest_file(folder / DELTA_FILE) == (found.sha, found.size)
        except (OSError, ValidationError):
            return None
        named = folder.name == f"{found.round:05d}-{found.sha}"
        return found if whole and named else None
