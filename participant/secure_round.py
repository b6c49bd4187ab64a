"""A site's part of a secure sum: its delta masked before it is committed, and its one answer.

What binds the site (``Bond``) is on disk before anything that follows from it leaves.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from participant.learner.port import DELTA_FILE
from participant.workspace import KeptBond
from shared.errors import NotAcceptedError, ProtocolError, SignatureError
from shared.failpoints import failpoint
from shared.methods.averaging import get_averaging
from shared.protocol.secure import Exchange, MaskedWith, Revealed, survivors_of
from shared.secure_sum.answering import Bond, answer
from shared.secure_sum.masking import Masking, pairs_of
from shared.secure_sum.said import SEED_BYTES
from shared.tensors.delta_file import DeltaFile
from shared.tensors.masked_file import masked_header, write_masked, write_numbers
from shared.tensors.residual import Feedback

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from participant.privacy import SiteNoise
    from participant.site import Site
    from participant.workspace import Submission, TakenPart, Workspace
    from shared.protocol.events import RoundStarted, UnmaskRequested
    from shared.protocol.manifest import Manifest
    from shared.protocol.secure import SecureTerms
    from shared.secure_sum.cohort import Cohort, Survivors
    from shared.tensors.tensor_file import FileDigest


def check_terms(site: Site, task: RoundStarted, terms: SecureTerms, manifest: Manifest) -> Cohort:
    """The cohort of a round that this site may mask for. Raises NotAcceptedError.

    A key that another site was known by is not exchanged, since who could do that stands between
    them; but for one that this site's own key signed, and never back to one it had before.
    """
    taken, own = site.workspace.taken_part(task.run), exchange_of(site)
    try:
        cohort = terms.cohort(task.run, task.round)
    except ProtocolError as error:
        raise NotAcceptedError(str(error)) from None
    known = {**taken.roster, site.name: own}
    renewed = {s: one for s, one in taken.roster.items() if _is_renewed(s, one, terms, taken)}
    changed = sorted(
        s for s, one in known.items() if s not in renewed and terms.roster.get(s, one) != one
    )
    if site.name not in terms.roster or changed:
        raise NotAcceptedError(
            f"cohort of round {task.round}: expected this site, and the exchange keys known of "
            f"run {task.run}; got {'another of ' + ', '.join(changed) if changed else 'others'}. "
            "Whoever lost a key and signs nothing needs another run"
        )
    peers = site.accept.peers if site.accept is not None else {}
    if peers or site.trust.key is not None:
        _check_identities(site.name, terms, peers)
    trained = get_averaging(task.averaging).trained_in(manifest, task.round)
    if len(terms.reaches) != len(trained.tensors):
        raise NotAcceptedError(
            f"cohort of round {task.round}: expected a reach for each of {len(trained.tensors)} "
            f"tensors, got {len(terms.reaches)}"
        )
    if renewed or taken.roster.keys() != (known | terms.roster).keys():
        old = {name: one for name, one in known.items() if name not in renewed}
        retired = (*taken.retired, *(one.key for one in renewed.values()))
        update = {"roster": {**terms.roster, **old}, "retired": retired}
        site.workspace.keep_taken_part(task.run, taken.model_copy(update=update))
    return cohort


def _is_renewed(site: str, before: Exchange, terms: SecureTerms, taken: TakenPart) -> bool:
    told = terms.roster.get(site, before)
    if told == before or told.key in taken.retired or not told.renews(before):
        return False
    try:
        told.check(site)
    except SignatureError:
        return False
    return True


def is_for_a_lost_key(site: Site, task: RoundStarted) -> bool:
    """Whether a round means this site by a key that it has no more, and will be told of the new."""
    told = task.secure.roster.get(site.name) if task.secure else None
    if told is None:
        return False
    own = exchange_of(site)
    return told != own and own.renews(told)


def _check_identities(own: str, terms: SecureTerms, peers: Mapping[str, str]) -> None:
    """Each site of the cohort signed its key, with the identity that is known of it here."""
    for name, exchange in terms.roster.items():
        try:
            exchange.check(name)
        except SignatureError as error:
            raise NotAcceptedError(str(error)) from None
        if peers and name != own and peers.get(name) != exchange.identity:
            raise NotAcceptedError(
                f"accept.peers: expected sites that are named there with the keys they sign with, "
                f"got {name} with {exchange.identity}; ask {name}'s operator for the key, or begin "
                "a run without it"
            )


def mask_delta(
    site: Site,
    task: RoundStarted,
    terms: SecureTerms,
    manifest: Manifest,
    making: Path,
    how: Feedback | SiteNoise,
) -> tuple[FileDigest, tuple[MaskedWith, bytes]]:
    """Put a masked delta in the place of the trained one; what it is, and the site's own seed.

    ``how`` it becomes whole numbers: cut off and rounded, the rest kept, or with a site's noise.

    Raises NotAcceptedError, and DeltaRefusedError for values that are not finite.
    """
    cohort = check_terms(site, task, terms, manifest)
    _bind(site.workspace, cohort)
    pairs = pairs_of(cohort, site.name, site.workspace.exchange_key())
    seed = os.urandom(SEED_BYTES)
    masking = Masking(cohort, site.name, pairs, seed)
    trained = get_averaging(task.averaging).trained_in(manifest, task.round)
    header = masked_header(task.run, task.round, site.name, task.source_sha)
    plain, masked = making / DELTA_FILE, making / "masked"
    with DeltaFile(plain, trained) as delta:
        if isinstance(how, Feedback):
            digest = write_masked(
                masked, trained, header, terms, masking, delta.read, how, packed=task.packed
            )
        else:
            digest = write_numbers(
                masked,
                trained,
                header,
                terms,
                masking,
                lambda spec, _: how.numbers(spec.name, delta.read(spec)),
                packed=task.packed,
            )
    masked.replace(plain)
    failpoint("delta.masked")
    return digest, (MaskedWith.of(masking.offer(digest.sha256)), seed)


def _bind(workspace: Workspace, cohort: Cohort) -> None:
    attempt = cohort.attempt
    kept = workspace.bond(attempt.run, attempt.round)
    try:
        bond = kept.bond.to_attempt(attempt) if kept else Bond(attempt.number)
    except ProtocolError as error:
        raise NotAcceptedError(f"{error}; take another run.name") from None
    workspace.keep_bond(attempt.run, attempt.round, KeptBond.of(bond))


def exchange_of(site: Site) -> Exchange:
    """By what this site shares masks with others; signed, if it signs at all."""
    return Exchange.of(site.name, site.workspace.exchange_key().public, site.trust.key)


def sign_once(site: Site, task: UnmaskRequested) -> str | None:
    """The site's signature of the set that it is shown first, and of no other in this attempt.

    None where it is time to answer: two thirds signed it, or this run's sites do not sign. What
    binds the site to the set is on disk when this returns. Raises ProtocolError.
    """
    submission, kept, survivors = _asked(site, task)
    identities = submission.terms.identities if submission.terms else {}
    if not identities or kept.revealed is not None:
        return None
    bond = kept.bond.to_survivors(survivors)
    if task.signatures:
        signatures = {name: bytes.fromhex(text) for name, text in task.signatures.items()}
        survivors.check_signatures(signatures, identities)
        return None
    if site.trust.key is None:
        raise ProtocolError("survivors: expected a key to sign them with, got none at this site")
    site.workspace.keep_bond(task.run, task.round, KeptBond.of(bond))
    return survivors.sign(site.trust.key).hex()


def answer_once(site: Site, task: UnmaskRequested) -> Revealed:
    """The site's one answer, made or met again; on disk when this returns. Raises ProtocolError.

    Whatever is asked and however often, for one round this is revealed and nothing else. Whether
    enough sites signed the set was looked at before.
    """
    workspace = site.workspace
    submission, kept, survivors = _asked(site, task)
    bond = kept.bond.to_survivors(survivors, answered=True)
    if kept.revealed is not None:
        return kept.revealed
    sealed = {other: bytes.fromhex(text) for other, text in task.sealed.items()}
    pairs = pairs_of(survivors.cohort, site.name, workspace.exchange_key())
    seed = _seed_of(submission)
    told = answer(survivors, site.name, pairs, seed, submission.sha, sealed)
    revealed = Revealed.of(told)
    workspace.keep_bond(task.run, task.round, KeptBond.of(bond, revealed))
    failpoint("answer.kept")
    return revealed


def _asked(site: Site, task: UnmaskRequested) -> tuple[Submission, KeptBond, Survivors]:
    """What the request is about: this site's masked delta, its bond, the set. ProtocolError."""
    workspace = site.workspace
    kept = workspace.bond(task.run, task.round)
    submission = workspace.committed(task.run, task.round, task.survivors.get(site.name, ""))
    if kept is None or submission is None or submission.terms is None:
        raise ProtocolError(
            f"survivors of round {task.round}: expected this site with a masked delta that it "
            "holds, got none; its neighbours answer for it"
        )
    terms = submission.terms
    if task.attempt != terms.number:
        raise ProtocolError(f"attempt: expected {terms.number}, got {task.attempt}")
    return submission, kept, survivors_of(terms, task.run, task.round, task.survivors)


def _seed_of(submission: Submission) -> bytes:
    assert submission.mask_seed is not None  # it was committed with the terms
    return bytes.fromhex(submission.mask_seed)
