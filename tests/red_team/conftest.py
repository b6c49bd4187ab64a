"""What a coordinator that means harm works with: its own end of the bus, and a site's real code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from participant.handlers import Participant
from participant.site import Site
from participant.workspace import Workspace
from shared.config import AcceptSection
from shared.protocol import wire
from shared.protocol.events import (
    DeltaSubmitted,
    Event,
    ParticipantReady,
    RoundStarted,
    RunAnnounced,
    UploadGranted,
    UploadRequested,
    WireBase,
    WireLora,
    WireTraining,
)
from shared.tensors.genesis import draw_adapter
from tests.numpy_learner import NumpyLearner
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from shared.protocol.manifest import Manifest

# What the defaults of [accept] allow.
FITTING = {"local_steps": 4, "batch_size": 4, "learning_rate": 0.001, "cpu_threads": 1}


@dataclass
class HostileCoordinator:
    """Says to one site what it likes, and keeps all that comes back. ``adapters``: files by sha.

    ``transfer``: the site's; None: whatever it asks for comes from here.
    """

    folder: Path
    learner: Any
    accept: AcceptSection | None
    model: str = "owner/m"
    transfer: Any = None
    heard: list[Event] = field(default_factory=list)
    adapters: dict[str, Path] = field(default_factory=dict)
    uploads: list[bytes] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart_site()

    def restart_site(self) -> None:
        """The site's process again, over the same workspace."""
        site = Site(
            name="a",
            outbox=self,
            transfer=self.transfer or self,
            workspace=Workspace(self.folder / "workspace"),
            learner=self.learner,
            clock=lambda: 1000.0,
            accept=self.accept,
        )
        self.site = Participant(site)

    def publish(self, messages) -> None:
        """The site's line."""
        self.heard += [wire.decode(message.body).event for message in messages]

    def download(self, url: str, path: Path, sha256: str) -> int:
        """The site's transfer: whatever it asks for comes."""
        self.urls.append(url)
        path.write_bytes(self.adapters[sha256].read_bytes())
        return path.stat().st_size

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """A delta comes in."""
        self.urls.append(url)
        self.uploads.append(path.read_bytes()[start : start + length])

    def said(self, kind: type[Event]) -> list[Any]:
        """What the site said of one kind."""
        return [event for event in self.heard if isinstance(event, kind)]

    def tell(self, event: Event) -> None:
        """One word, and the site does what follows from it."""
        self.site.handlers[type(event)](event, "coordinator")
        while self.site.has_work:
            self.site.work()

    def announce(self, lora: dict[str, Any] | None = None, **fields: Any) -> RunAnnounced:
        """Announce the run."""
        training = WireTraining(**fields.pop("training", FITTING))
        values = {
            "run": "r",
            "config_digest": "b" * 64,
            "base": WireBase(model=self.model, quantisation="none", compute_dtype="float32"),
            "lora": WireLora(**{"rank": 4, "dropout": 0.0, **(lora or {})}),
            "training": training,
            "rounds": 5,
            "participants": 3,
        }
        event = RunAnnounced(**{**values, **fields})
        self.tell(event)
        return event

    def draw(self, manifest: Manifest, seed: int = 1) -> str:
        """A fresh adapter; its sha."""
        path = self.folder / f"adapter-{seed}"
        sha = draw_adapter(manifest, seed, path).sha256
        self.adapters[sha] = path
        return sha

    def start(self, source: str, number: int = 1, **fields: Any) -> RoundStarted:
        """Start a round from one of the adapters, and take its delta where one is offered."""
        values = {
            "run": "r",
            "round": number,
            "source_sha": source,
            "get_url": "https://store/k",
            "expires_at": 2000.0 + number,
            "training": WireTraining(**fields.pop("training", FITTING)),
            "progress_from": (number - 1) / 5,
            "progress_to": number / 5,
            "seed": number,
            "codec": "fp32",
        }
        event = RoundStarted(**{**values, **fields})
        asked = len(self.said(UploadRequested))
        self.tell(event)
        for wanted in self.said(UploadRequested)[asked:]:
            self.take(wanted)
        return event

    def take(self, wanted: UploadRequested) -> None:
        """Take a delta that is offered."""
        grant = UploadGranted(
            run=wanted.run,
            round=wanted.round,
            sha=wanted.sha,
            chunk_size=2**24,
            urls={0: "https://store/0"},
            expires_at=2000.0,
        )
        self.tell(grant)

    @property
    def manifest(self) -> Manifest:
        """As the site told it."""
        return self.said(ParticipantReady)[-1].manifest

    @property
    def submitted(self) -> list[DeltaSubmitted]:
        """The deltas that left."""
        return self.said(DeltaSubmitted)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Two Llama layers with random weights and a byte tokenizer, as a folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def hostile(tmp_path):
    """A hostile coordinator of one site that trains in numpy, under the defaults or less."""

    def make(transfer: Any = None, **accept: Any) -> HostileCoordinator:
        learner = NumpyLearner("a", examples=100)
        section = AcceptSection(**{"min_held_out": 1, **accept})
        return HostileCoordinator(tmp_path, learner, section, transfer=transfer)

    return make


@pytest.fixture
def reading(tmp_path, tiny_model):
    """The same, of a site that trains the tiny model on texts."""
    from participant.learner.model_pool import ModelPool
    from participant.learner.torch_learner import TorchLearner
    from shared.config import DataSection

    def make(texts: list[str], accept: AcceptSection | None) -> HostileCoordinator:
        rows = [{"q": "what is it?", "a": text} for text in texts]
        (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataSection(path="text.jsonl", prompt="q", answer="a", held_out_fraction=0.0)
        learner = TorchLearner("a", data, tmp_path, ModelPool("cpu"))
        if accept is not None:
            accept = accept.model_copy(update={"models": (str(tiny_model),)})
        return HostileCoordinator(tmp_path, learner, accept, model=str(tiny_model))

    return make
