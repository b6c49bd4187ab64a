"""Whether the gate before a delta blocks a site that learns by heart and lets another one go.

Two sites train one round each, alike but for their text: one goes over few records again and again,
the other takes many records once. Both are audited as ``[privacy] audit = "gate"`` does it.

    python benchmarks/audit_gate.py [--preset tiny] [--seeds 1 2 3] [--rate R] [--json FILE]

``tiny``: the tests' Llama with random weights over records of random words (a CPU minute for three
seeds). ``smollm2``: SmolLM2-135M-Instruct over the demo's conversations (a few CPU minutes a seed).
Prints a Markdown table. ``cost`` is CPU seconds of the audit by those of the training, in one
process. A site that is not judged as it should be ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny model is the tests'

if TYPE_CHECKING:
    from collections.abc import Callable

    from participant.learner.port import Progress
    from shared.protocol.manifest import AuditFigures

ZEROS = "0" * 64
WANTED = {"overfitted": ("blocked",), "normal": ("passed", "warned")}
# Of SmolLM2: exchanges of one person, of which half are held out, and epochs.
EXCHANGES = {"overfitted": (32, 16), "normal": (192, 1)}


@dataclass(frozen=True)
class Case:
    """What one site trains: the tables of its files."""

    base: dict[str, Any]
    lora: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    write: Callable[[Path], None]


def tiny(kind: str, seed: int, folder: Path) -> Case:
    """The tests' model and records."""
    from tests.tiny_audit import LORA, SETTINGS, SITES, make_confident_model, write_text

    model = folder / "model"
    if not model.exists():
        make_confident_model(model)
    rows, steps = SITES[kind]
    return Case(
        {"model": str(model), "quantisation": "none", "compute_dtype": "float32"},
        LORA,
        {**SETTINGS, "local_steps": steps},
        {"prompt": "q", "answer": "a"},
        lambda path: write_text(path, rows, seed),
    )


def smollm2(kind: str, seed: int, folder: Path) -> Case:
    """The demo's model, and replies of one of its people."""
    import random

    from gradualdiff.demo.data import prepare_chitchat, write_rows
    from gradualdiff.demo.packages import CHITCHAT, SMOLLM2, find_packaged
    from participant.model.packaged import convert_gguf

    model = convert_gguf(find_packaged(SMOLLM2), SMOLLM2.sha256, folder, lambda *_: None)
    count, epochs = EXCHANGES[kind]

    def write(path: Path) -> None:
        where = folder / "chitchat"
        where.mkdir(exist_ok=True)
        (site,) = prepare_chitchat(find_packaged(CHITCHAT), where, 1, None)
        rows = [json.loads(line) for line in site.path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if len(row["answer"]) >= 60]  # ten tokens and more
        chosen = random.Random(seed).sample(rows, count)
        write_rows(path, ({"q": row["prompt"], "a": row["answer"]} for row in chosen))

    return Case(
        {"model": str(model), "quantisation": "none", "compute_dtype": "float32"},
        {"rank": 16, "alpha": 32, "dropout": 0.0},
        {
            "local_epochs": epochs,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 0.0002,
            "max_prompt_tokens": 64,
            "max_answer_tokens": 64,
            "gradient_checkpointing": False,
            "cpu_threads": 2,
        },
        {"prompt": "q", "answer": "a"},
        write,
    )


PRESETS = {"tiny": tiny, "smollm2": smollm2}


def audited(case: Case, folder: Path, seed: int) -> tuple[AuditFigures, float, float]:
    """One round of one site: the audit's figures, CPU seconds of the training and of the audit."""
    from participant.checkpoints import Checkpoints
    from participant.learner.model_pool import ModelPool
    from participant.learner.torch_learner import TorchLearner
    from shared.config import DataSection, SitePrivacySection
    from shared.protocol.events import RoundStarted, RunAnnounced, WireBase, WireLora, WireTraining
    from shared.tensors.genesis import draw_adapter

    folder.mkdir()
    case.write(folder / "text.jsonl")
    data = DataSection(path="text.jsonl", held_out_fraction=0.5, **case.data)
    learner = TorchLearner("a", data, folder, ModelPool("cpu"), SitePrivacySection(audit="gate"))
    announced = RunAnnounced(
        run="r",
        config_digest=ZEROS,
        base=WireBase(**case.base),
        lora=WireLora(**case.lora),
        training=WireTraining(**case.training),
        rounds=1,
        participants=1,
    )
    ready = learner.prepare(announced, lambda _: None)
    source = folder / "source"
    task = RoundStarted(
        run="r",
        round=1,
        source_sha=draw_adapter(ready.manifest, seed, source).sha256,
        get_url="none:",
        expires_at=1e10,
        training=announced.training,
        progress_from=0.0,
        progress_to=1.0,
        seed=seed,
        codec="fp32",
    )
    at: dict[str, list[float]] = {"train": [], "evaluate": []}

    def report(progress: Progress) -> None:
        at[progress.activity].append(time.process_time())

    began = time.process_time()
    (folder / "out").mkdir()
    learned = learner.learn(
        task,
        source,
        None,
        folder / "out",
        lambda: False,
        report,
        Checkpoints(folder / "checkpoints", task, "a", 1e9),
    )
    assert learned.audit is not None
    before = max((moment for moment in at["evaluate"] if moment < at["train"][0]), default=began)
    return learned.audit.figures, at["train"][-1] - before, time.process_time() - at["train"][-1]


def measure(preset: str, seeds: list[int], rate: float | None) -> list[dict[str, Any]]:
    """Both sites for every seed. ``rate``: of learning, instead of the preset's."""
    from shared.log import configure

    configure(level="error")
    found = []
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            for kind in WANTED:
                case = PRESETS[preset](kind, seed, Path(name))
                if rate is not None:
                    case.training["learning_rate"] = rate
                figures, train, audit = audited(case, Path(name) / f"{kind}-{seed}", seed)
                found.append(
                    {
                        **figures.model_dump(mode="json"),
                        "site": kind,
                        "seed": seed,
                        "train_cpu_seconds": round(train, 2),
                        "audit_cpu_seconds": round(audit, 2),
                    }
                )
                print_row(found[-1])
    return found


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    cost = row["audit_cpu_seconds"] / row["train_cpu_seconds"]
    print(
        f"| {row['site']} | {row['seed']} | {row['verdict']} | {row['hits']}/{row['records']} "
        f"| {row['hits_upper']:.1%} | {row['auc']:.2f} | {row['auc_min_k']:.2f} "
        f"| {row['train_cpu_seconds']:.1f} | {row['audit_cpu_seconds']:.1f} | {cost:.2f} |",
        flush=True,
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rate", type=float, help="of learning (default: the preset's)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    columns = ("site", "seed", "verdict", "reproduced", "at most", "AUC", "Min-K%++")
    columns = (*columns, "training, CPU s", "audit, CPU s", "cost")
    print(f"| {' | '.join(columns)} |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    found = measure(options.preset, options.seeds, options.rate)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in found if row["verdict"] not in WANTED[row["site"]]]
    if wrong:
        raise SystemExit(f"judged wrongly: {[(row['site'], row['seed']) for row in wrong]}")


if __name__ == "__main__":
    main()
