"""The crash table: one row for each point at which a role's process is killed and started again.

A row is a run of two sites over two rounds, whose codec leaves a residual, whose server's optimiser
has a state and whose adapters travel as updates, in which one process dies at one point. Some
rows train cores of a real model, in some a late delta is carried into the second round, in some
three sites mask their deltas, and in some a site's gate keeps each delta until it is released.
Points stand in the order in which a run reaches them. To add a point: a line in the right list, and
where needed what is special about it in ``SPECIAL``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PUBLISHED = ("publish.before", "publish.sent", "publish.confirmed")
ACKNOWLEDGED = ("acknowledge.before", "acknowledge.after")
RECORDED = ("record.before", "record.after")


LORA = "[lora]\n"  # of the federation's file
CORE = '[lora]\nkind = "core"\n'
SECURE = f"""[aggregation]
secure = true
secure_reach = 0.1
{LORA}"""
PRIVATE = f"[privacy]\nclip = 1.0\nnoise_multiplier = 1.0\n{LORA}"
CARRY = f"""[policy]
kind = "quorum"
quorum = 1
deadline_seconds = 1.0
late = "carry"
{LORA}"""


def around(stages: tuple[str, ...], *subjects: str) -> list[str]:
    """Each stage of each subject."""
    return [f"{stage}:{subject}" for subject in subjects for stage in stages]


@dataclass(frozen=True)
class Row:
    """Kill ``role`` at the ``hit``-th time that it reaches ``point``.

    ``fault``: what goes wrong by itself in this run. ``again``: how many rounds the site trains
    once more, because the kill or the fault took an unfinished or refused training away;
    ``perhaps``: how many beyond that, where a race decides. ``untold``: how many may be missing in
    the trace, because a dying process says nothing of what its other threads end. ``real``: the
    sites train a real model, with ``core`` its cores.
    """

    role: str
    point: str
    hit: int = 1
    fault: str = ""
    again: int = 0
    perhaps: int = 0
    untold: int = 0
    real: bool = False
    core: bool = False

    @property
    def name(self) -> str:
        """For the test's report."""
        kind = "core" if self.core else "real" if self.real else ""
        words = [self.role, self.point, self.fault, kind]
        words.append("" if self.hit == 1 else "2nd" if self.hit == 2 else f"{self.hit}th")
        return "-".join(word for word in words if word)

    @property
    def settings(self) -> str:
        """What stands in the federation's file in place of ``LORA``."""
        by_fault = {"late": CARRY, "private": PRIVATE, "secure": SECURE, "kept": SECURE}
        return by_fault.get(self.fault, CORE if self.core else LORA)

    @property
    def sites(self) -> str:
        """Whose run it is."""
        return "abc" if self.settings == SECURE else "ab"

    @property
    def is_gated(self) -> bool:
        """Whether site a keeps each of its deltas until a person there releases it."""
        return self.fault in ("gate", "kept")

    @property
    def counted(self) -> list[list[tuple[str, int]]]:
        """Of each round, site and round of what it counts."""
        if self.fault == "late":
            return [[("b", 1)], [("a", 1), ("a", 2)]]
        return [[(site, number) for site in self.sites] for number in (1, 2)]

    @property
    def pause(self) -> float:
        """An acknowledgement is handed over to another thread, which may need these seconds."""
        return 0.05 if self.point.startswith("acknowledge.after") else 0.0


COORDINATOR = [
    "queues.before",
    "queues.after",
    *around(RECORDED, "federation"),
    *around(PUBLISHED, "CoordinatorTick"),
    "start.before",
    "start.reloaded",
    "start.after",
    *around(ACKNOWLEDGED, "CoordinatorTick"),
    "status.before",
    "status.after",
    *around(PUBLISHED, "RunAnnounced"),
    *around(ACKNOWLEDGED, "SiteOnline"),
    *around(RECORDED, "link", "member"),
    *around(ACKNOWLEDGED, "ParticipantReady"),
    "genesis.drawn",
    *around(("adapter.before", "adapter.after"), "config", "tensors"),
    *around(RECORDED, "genesis", "opened"),
    *around(PUBLISHED, "RoundStarted", "UploadGranted"),
    *around(ACKNOWLEDGED, "UploadRequested"),
    "delta.spooled",
    "delta.checked",
    *around(RECORDED, "accepted"),
    *around(PUBLISHED, "DeltaAnswered"),
    *around(RECORDED, "closing"),
    "round.aggregated",
    *around(("server_state.before", "server_state.after"), "optimizer", "exact"),
    "update.before",
    "update.after",
    *around(RECORDED, "closed"),
    "round.swept",
    *around(PUBLISHED, "RoundClosed"),
    *around(ACKNOWLEDGED, "DeltaSubmitted"),
    *around(RECORDED, "finished"),
    *around(PUBLISHED, "RunFinished"),
    *around(RECORDED, "evaluated"),
    *around(ACKNOWLEDGED, "AdapterEvaluated"),
    "leave.before",
    "leave.swept",
    "leave.after",
]

PARTICIPANT = [
    *around(PUBLISHED, "SiteOnline"),
    *around(ACKNOWLEDGED, "RunAnnounced"),
    "counted.before",
    "counted.after",
    *around(PUBLISHED, "ParticipantReady"),
    *around(ACKNOWLEDGED, "RoundStarted"),
    "genesis.drawn",
    "update.before",
    "update.fetched",
    "update.applied",
    "learn.before",
    "checkpoint.begun",
    "checkpoint.adapter_written",
    "checkpoint.optimizer_written",
    "checkpoint.progress_written",
    "checkpoint.renamed",
    "checkpoint.synced",
    "checkpoint.old_removed",
    "learn.after",
    "commit.written",
    "commit.before",
    "commit.renamed",
    "commit.after",
    "checkpoint.cleared",
    *around(PUBLISHED, "UploadRequested"),
    *around(ACKNOWLEDGED, "UploadGranted"),
    "upload.before",
    "upload.after",
    *around(PUBLISHED, "DeltaSubmitted"),
    *around(ACKNOWLEDGED, "DeltaAnswered", "RoundClosed"),
    "sweep.before",
    "sweep.after",
    *around(ACKNOWLEDGED, "RunFinished"),
    *around(PUBLISHED, "AdapterEvaluated"),
]

# What is reached only where something else goes wrong first: FAULT -> role -> points.
# garbage: a message nobody can read lies in the site's queue; parts, inbox, together: see the
# coordinator in armed.py; the others: see the tiny trainer.
FAULTS: dict[str, dict[str, list[str]]] = {
    "garbage": {
        "participant": [
            *around(PUBLISHED, "MessageRefused"),
            *around(ACKNOWLEDGED, "unknown"),
        ],
        "coordinator": [
            *around(PUBLISHED, "MessageRefused"),
            *around(ACKNOWLEDGED, "MessageRefused"),
        ],
    },
    "declined": {
        "participant": around(PUBLISHED, "RunDeclined"),
        "coordinator": [
            *around(RECORDED, "declined"),
            *around(ACKNOWLEDGED, "RunDeclined"),
        ],
    },
    "unfit": {"coordinator": around(RECORDED, "rejoined")},
    "undrawn": {"participant": ["genesis.drawn", "download.before", "download.after"]},
    "failed": {
        "participant": around(PUBLISHED, "TrainingFailed"),
        "coordinator": [
            *around(RECORDED, "failed"),
            *around(ACKNOWLEDGED, "TrainingFailed"),
        ],
    },
    "parts": {"coordinator": ["parts.begun", "parts.completed"]},
    "inbox": {"coordinator": ["delta.stored", "inbox.cleared"]},
    "together": {
        "coordinator": [
            *around(RECORDED, "accepted"),
            "batch.written",
            *around(PUBLISHED, "DeltaAnswered"),
            *around(RECORDED, "closing", "closed"),
            *around(PUBLISHED, "RoundClosed"),
            *around(ACKNOWLEDGED, "DeltaSubmitted"),
        ]
    },
    "spoilt": {
        "participant": ["forget.before", "forget.after"],
        "coordinator": around(RECORDED, "refused"),
    },
}
# Faults that are the coordinator's, in each of its lives; together: in the first.
OF_COORDINATOR = ("parts", "inbox", "together")

# What a kill at a point costs, and points that are worth a second kill, later in the run.
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("participant", "learn.after"): {"again": 1},
    ("participant", "bond.before"): {"again": 1},
    ("participant", "bond.after"): {"again": 1},
    ("participant", "delta.masked"): {"again": 1},
    ("participant", "commit.written"): {"again": 1},
    ("participant", "commit.before"): {"again": 1},
    # Killed before the answer was acknowledged, it is told of the refusal once more.
    ("participant", "forget.before"): {"perhaps": 1},
    ("participant", "forget.after"): {"again": 1},
    # Between this acknowledgement and the kill the other thread may have begun, or even ended.
    ("participant", "acknowledge.after:RoundStarted"): {"perhaps": 1, "untold": 1},
    ("coordinator", "record.before:refused"): {"again": 1},
    ("coordinator", "record.after:refused"): {"again": 1},
}
SECOND: dict[str, list[str]] = {
    "coordinator": [
        "record.before:accepted",
        "record.after:accepted",
        "record.after:opened",
        "record.after:closing",
        "record.before:link",
        "record.after:link",
        "server_state.before:optimizer",
        "server_state.after:optimizer",
        "server_state.after:exact",
        "update.after",
        "record.before:closed",
    ],
    "participant": [
        "counted.before",
        "counted.after",
        "checkpoint.renamed",
        "checkpoint.synced",
        "learn.after",
        "commit.renamed",
        "sweep.after",
        "update.fetched",
        "update.applied",
    ],
}
# With the real model, in the round that starts from a kept optimiser state or the one before.
REAL = [
    ("participant", "acknowledge.before:RoundStarted", 1),
    ("participant", "genesis.drawn", 1),
    ("participant", "training.stepped", 2),
    ("participant", "checkpoint.renamed", 2),
    ("participant", "learn.after", 1),
    ("participant", "commit.before", 2),
    ("participant", "commit.renamed", 1),
    ("participant", "upload.after", 2),
    ("participant", "publish.sent:DeltaSubmitted", 1),
    ("coordinator", "record.after:closing", 2),
]

# With the real model's cores: bases of the weights, found again after a restart.
REAL_CORES = [
    ("participant", "update.applied", 1),
    ("participant", "checkpoint.renamed", 2),
    ("participant", "upload.after", 2),
    ("coordinator", "record.after:closing", 2),
]
# Round 1 closes without site a, whose delta of it counts in round 2: the second to be accepted.
LATE = [
    ("participant", "commit.renamed", 1),
    ("participant", "sweep.after", 1),
    ("participant", "upload.before", 1),
    ("participant", "upload.after", 1),
    ("coordinator", "record.before:accepted", 2),
    ("coordinator", "record.after:accepted", 2),
    ("coordinator", "record.after:closing", 2),
    ("coordinator", "record.before:closed", 2),
]

# Of which records a link is depends on what came together; a run has at least six.
LINKS = [(f"{stage}:link", hit) for hit in (4, 5, 6) for stage in RECORDED]

# Three sites, whose deltas are masked: what else there is to be killed at.
MASKED = {
    "participant": [
        "bond.before",
        "bond.after",
        "delta.masked",
        "commit.before",
        "commit.renamed",
        "upload.after",
        *around(ACKNOWLEDGED, "UnmaskRequested"),
        "answer.kept",
        *around(PUBLISHED, "UnmaskAnswered"),
    ],
    "coordinator": [
        *around(RECORDED, "opened", "accepted", "closing"),
        *around(PUBLISHED, "UnmaskRequested"),
        *around(RECORDED, "unmasked"),
        *around(ACKNOWLEDGED, "UnmaskAnswered"),
        "sum.opened",
        *around(RECORDED, "closed"),
    ],
}
# Site a's gate keeps each delta, and a person releases it: of a real model with its audit, and of
# masked deltas.
GATE = [
    ("audit.extracted", 1),
    ("audit.extracted", 2),
    ("learn.after", 1),
    ("commit.before", 2),
    ("commit.renamed", 1),
    ("publish.before:TrainingFailed", 1),
    ("released.taken", 1),
    ("publish.before:UploadRequested", 2),
    ("upload.before", 1),
    ("upload.after", 2),
    ("publish.sent:DeltaSubmitted", 1),
]
KEPT = [
    ("delta.masked", 1),
    ("commit.renamed", 1),
    ("released.taken", 1),
    ("upload.after", 2),
    ("answer.kept", 1),
]
# With [privacy]: the account is begun, then the seed, then the first training is paid for.
PAID = [("participant", f"budget.{when}", hit) for hit in (1, 2, 3) for when in ("before", "after")]

# (role, whole point or its subject) -> why no row kills there.
EXEMPT: dict[tuple[str, str], str] = {
    ("coordinator", f"{stage}:{word}"): (
        "the command line writes it, not a role: tests/coordinator and tests/cli kill around it"
    )
    for word in ("control", "deleting", "origin", "pruned")
    for stage in RECORDED
}
EXEMPT |= {
    (role, f"{stage}:TrainingProgressed"): (
        "only trainings of more than 5 s say it, it expires, and nothing but a display hears it"
    )
    for role, stages in (("participant", PUBLISHED), ("coordinator", ACKNOWLEDGED))
    for stage in stages
}


EXEMPT |= {
    (role, f"{stage}:SurvivorsSigned"): (
        "only sites with keys say it, nothing is written for it, and it is asked for again: "
        "tests/federation/test_secure.py dies at every write of such a run"
    )
    for role, stages in (("participant", PUBLISHED), ("coordinator", ACKNOWLEDGED))
    for stage in stages
}


def _rows() -> list[Row]:
    usual = {"coordinator": COORDINATOR, "participant": PARTICIPANT}
    found = [
        Row(role, point, **SPECIAL.get((role, point), {}))
        for role, points in usual.items()
        for point in points
    ]
    found += [
        Row(role, point, hit=2, **SPECIAL.get((role, point), {}))
        for role, points in SECOND.items()
        for point in points
    ]
    found += [
        Row(role, point, fault=fault, **SPECIAL.get((role, point), {}))
        for fault, roles in FAULTS.items()
        for role, points in roles.items()
        for point in points
    ]
    found += [
        Row(role, point, hit, real=True, **SPECIAL.get((role, point), {}))
        for role, point, hit in REAL
    ]
    found += [Row(role, point, hit, real=True, core=True) for role, point, hit in REAL_CORES]
    found += [Row("coordinator", point, hit) for point, hit in LINKS]
    found += [
        Row(role, point, fault="secure", **SPECIAL.get((role, point), {}))
        for role, points in MASKED.items()
        for point in points
    ]
    found += [
        Row("participant", point, hit, "gate", real=True, **SPECIAL.get(("participant", point), {}))
        for point, hit in GATE
    ]
    found += [
        Row("participant", point, hit, "kept", **SPECIAL.get(("participant", point), {}))
        for point, hit in KEPT
    ]
    found += [Row(role, point, hit, "private") for role, point, hit in PAID]
    return found + [Row(role, point, hit, "late") for role, point, hit in LATE]


UNDISTURBED = Row("nobody", "")
ROWS = _rows()
