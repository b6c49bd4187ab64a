"""A person's word at the site on each run: asked for, given or refused, never rewritten.

``approvals.jsonl`` in the workspace: a line of JSON for each word, only ever appended. The
participant asks, by terms; ``gradualdiff site`` answers. An approval is of just these terms, by
their digest: whatever else a run is announced with later is asked again. A refusal is of the run.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from shared.config import Name, Sha256, canonical_json
from shared.disk.lines import append_line, whole_lines
from shared.errors import ConfigError, StoreError
from shared.protocol.manifest import Schema

if TYPE_CHECKING:
    from pathlib import Path

    from shared.protocol.events import RunAnnounced

FILE = "approvals.jsonl"
MOST_BYTES = 16 * 1024 * 1024  # thousands of announcements; a coordinator must not fill the disk


class ApprovalLine(Schema):
    """One word on a run."""

    word: Literal["asked", "approved", "declined"]
    run: Name
    terms: Sha256
    """Digest of what the run was announced with."""
    time: float
    """When, seconds since the epoch."""
    by: str = ""
    """Who said it: account@machine."""
    reason: str = ""
    """Why."""
    rounds: Annotated[int, Field(ge=1)]
    """With ``asked`` the rounds that were announced; else the last one that is allowed."""
    announced: dict[str, Any] = Field(default_factory=dict)
    """With ``asked``: what the run was announced with."""


def terms_digest(run: RunAnnounced) -> str:
    """sha256 of all that a run was announced with, but for the URLs, which are made anew.

    Defaults are left out: so a setting that a later release adds changes no digest.
    """
    return hashlib.sha256(canonical_json(_terms(run, exclude_defaults=True))).hexdigest()


def _terms(run: RunAnnounced, *, exclude_defaults: bool = False) -> dict[str, Any]:
    where = {"bases": {"get_url", "expires_at"}}
    return run.model_dump(mode="json", exclude=where, exclude_defaults=exclude_defaults)


def told_terms(asked: ApprovalLine) -> dict[str, str]:
    """What a run asks of a site, for a person to judge. Raises KeyError, TypeError for others."""
    run = asked.announced
    base, lora, training = run["base"], run["lora"], run["training"]
    layers = lora["target_modules"]
    modules = layers if isinstance(layers, str) else ", ".join(layers)
    examples = training["batch_size"] * training["gradient_accumulation"]
    steps = training["local_steps"]
    work = (
        f"{training['local_epochs'] or 1} times through this site's text"
        if steps is None
        else f"{steps} steps"
    )
    packages = [f"{mode['kind']}.{mode['name']}" for mode in run["modes"]]
    return {
        "base model": f"{base['model']} ({base['quantisation']})",
        "adapter": f"{lora['kind']}, rank {lora['rank']}, on {modules}",
        "rounds": str(run["rounds"]),
        "a round here": f"{work}, {examples} examples each step",
        "answers cut at": f"{training['max_answer_tokens']} tokens",
        "participants": f"{run['participants']}, this site among them",
        "averaging": run["averaging"],
        "who sees this site's delta": (
            "nobody: the coordinator learns the sum of all sites' (secure sum)"
            if run.get("secure")
            else "the coordinator, and whoever reads its store"
        ),
        "differential privacy": _told_privacy(run.get("privacy")),
        "code of other packages": ", ".join(packages) or "none",
        "leaves this site": (
            "a delta of the adapter in each round; counts and times; losses unless "
            "accept.send_metrics is false"
        ),
        "settings' sha256": run["config_digest"],
        "terms' sha256": asked.terms,
    }


def _told_privacy(privacy: dict[str, Any] | None) -> str:
    if privacy is None:
        return "none"
    noise, most = privacy["noise_multiplier"], privacy["target_epsilon"]
    strength = f"noise {noise:g} x clip" if noise is not None else f"epsilon at most {most:g}"
    if privacy["unit"] == "site":
        return f"for this site as a whole, {strength} on the sum of {privacy['fewest']} deltas"
    return f"for each {privacy['unit']}, {strength}"


class Approvals:
    """The file at ``path``. Raises StoreError where it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def answer(self, run: str, terms: str) -> ApprovalLine | None:
        """The last word of a person on these terms of a run; None while there is none."""
        found = None
        for line in self._lines():
            if line.run != run:
                continue
            if line.word == "declined" or (line.word == "approved" and line.terms == terms):
                found = line
        return found

    def ask(self, run: RunAnnounced, now: float) -> None:
        """Note that these terms wait for an answer, unless they are the ones that wait already."""
        terms = terms_digest(run)
        asked = self.asked().get(run.run)
        if self._path.exists() and self._path.stat().st_size > MOST_BYTES:
            raise StoreError(
                f"{self._path}: expected at most {MOST_BYTES} bytes, got more: somebody announces "
                "runs with other terms again and again; move the file away to begin anew"
            )
        if asked is None or asked.terms != terms:
            line = ApprovalLine(
                word="asked",
                run=run.run,
                terms=terms,
                time=now,
                rounds=run.rounds,
                announced=_terms(run),
            )
            self._append(line)

    def asked(self) -> dict[str, ApprovalLine]:
        """By run: the terms that were asked about last."""
        return {line.run: line for line in self._lines() if line.word == "asked"}

    def say(
        self,
        word: Literal["approved", "declined"],
        asked: ApprovalLine,
        now: float,
        by: str,
        *,
        reason: str = "",
        rounds: int | None = None,
    ) -> ApprovalLine:
        """A person's answer to what was asked. Raises ConfigError if other terms wait by now."""
        newest = self.asked().get(asked.run)
        if newest is None or newest.terms != asked.terms:
            raise ConfigError(
                f"run {asked.run}: other terms were announced meanwhile; look at them first: "
                "gradualdiff site status"
            )
        line = ApprovalLine(
            word=word,
            run=asked.run,
            terms=asked.terms,
            time=now,
            by=by,
            reason=reason,
            rounds=rounds or asked.rounds,
        )
        self._append(line)
        return line

    def _lines(self) -> list[ApprovalLine]:
        try:
            return [ApprovalLine.model_validate_json(line) for line in whole_lines(self._path)]
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}; check this path") from None
        except ValidationError:
            raise StoreError(
                f"{self._path}: expected a person's answers to runs, a line each, got a line that "
                "is none; until it is restored or moved away this site takes part in nothing"
            ) from None

    def _append(self, line: ApprovalLine) -> None:
        append_line(self._path, canonical_json(line.model_dump(mode="json")))
