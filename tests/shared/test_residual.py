"""Error feedback: no part of a delta is lost, whatever its codec leaves out of it."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shared import modes
from shared.errors import DeltaRefusedError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaFile, DeltaHeader, write_delta
from shared.tensors.residual import Feedback
from shared.tensors.tensor_file import TensorFile, TensorLayout, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

# Parts sort across tensors here: "a", "a.b", "a:scale", not tensor by tensor.
SPECS = tuple(
    TensorSpec(name=name, shape=shape, init="zeros")
    for name, shape in [("a", (300,)), ("a.b", (2, 3)), ("c", (40, 10))]
)
MANIFEST = Manifest(tensors=SPECS, target_modules=("a",))
COARSE = [name for name in modes.names("codecs") if not get_codec(name).exact]


def only(*names: str) -> Manifest:
    """What is trained in a round that trains these alone."""
    tensors = tuple(spec for spec in SPECS if spec.name in names)
    return MANIFEST.model_copy(update={"tensors": tensors})


def drawn(spec: TensorSpec, number: int) -> Any:
    draw = np.random.Generator(np.random.Philox(derive_seed(number, spec.name)))
    return draw.standard_normal(spec.shape, dtype=np.float32)


class Sender:
    """One site that sends delta after delta, each from the residual of the one before."""

    def __init__(self, folder: Path, codec: str, site: str = "north") -> None:
        self.folder, self.codec, self.site = folder, codec, site
        self.before: Path | None = None
        self.sent = {spec.name: np.zeros(spec.shape) for spec in SPECS}

    def send(self, number: int, manifest: Manifest = MANIFEST) -> Feedback:
        after = self.folder / f"residual-{number}"
        feedback = Feedback(self.before, after, owed=self.before is not None)
        path = self.folder / f"delta-{number}"
        header = DeltaHeader(
            run="r",
            round=number,
            site=self.site,
            source_sha="0" * 64,
            codec=self.codec,
            codec_version=get_codec(self.codec).version,
        )
        values = partial(drawn, number=number)
        write_delta(path, manifest, self.codec, header, values, number, feedback)
        with DeltaFile(path, manifest) as delta:
            for spec in manifest.tensors:
                self.sent[spec.name] = self.sent[spec.name] + delta.read(spec)
        self.before = after
        return feedback

    @property
    def residual(self) -> dict[str, Any]:
        assert self.before is not None
        with TensorFile(self.before) as file:
            return {name: np.array(file.read(name)) for name in file.layouts}


@pytest.mark.parametrize("codec", COARSE)
def test_all_that_was_sent_is_all_that_was_trained_but_for_one_residual(
    tmp_path: Path, codec: str
) -> None:
    """The sum of z is that of the deltas less e, to fp32's rounding, and e stays bounded."""
    site, norms = Sender(tmp_path, codec), []
    for number in range(1, 21):
        feedback = site.send(number)
        assert feedback.state == ("none" if number == 1 else "kept")
        norms.append(np.linalg.norm(site.residual["a"]))
    for spec in SPECS:
        trained = sum(drawn(spec, number).astype(np.float64) for number in range(1, 21))
        np.testing.assert_allclose(
            site.sent[spec.name] + site.residual[spec.name], trained, atol=1e-4
        )
    assert max(norms) < 20 * norms[0]


@pytest.mark.parametrize("codec", COARSE)
def test_the_first_delta_is_what_it_is_without_feedback(tmp_path: Path, codec: str) -> None:
    """Nothing is owed yet: the same bytes, and a residual beside them."""
    site = Sender(tmp_path, codec)
    written = site.send(1).written
    plain = Sender(tmp_path / "plain", codec)
    plain.folder.mkdir()
    header = DeltaHeader(
        run="r", round=1, site="north", source_sha="0" * 64, codec=codec,
        codec_version=get_codec(codec).version,
    )  # fmt: skip
    path = plain.folder / "delta-1"
    write_delta(path, MANIFEST, codec, header, lambda spec: drawn(spec, 1), 1)
    assert path.read_bytes() == (tmp_path / "delta-1").read_bytes()
    assert written is not None
    again = Sender(tmp_path / "again", codec)
    again.folder.mkdir()
    assert again.send(1).written == written


def test_a_tensor_that_is_not_trained_keeps_its_residual(tmp_path: Path) -> None:
    """``rolora`` trains one factor in turn: what the other's codec left out waits for its turn."""
    site = Sender(tmp_path, "uniform4")
    site.send(1)
    first = site.residual
    site.send(2, only("a.b"))
    assert site.residual.keys() == first.keys()
    for name in ("a", "c"):
        np.testing.assert_array_equal(site.residual[name], first[name])
    assert (site.residual["a.b"] != first["a.b"]).any()
    assert site.send(3).state == "kept"


def test_a_tensor_that_was_never_trained_has_no_residual(tmp_path: Path) -> None:
    """``ffa`` trains B alone: no file of zeros for A."""
    site = Sender(tmp_path, "int8")
    site.send(1, only("c"))
    assert site.residual.keys() == {"c"}
    site.send(2)
    assert site.residual.keys() == {"a", "a.b", "c"}


def test_a_residual_of_something_else_is_lost_and_said_so(tmp_path: Path) -> None:
    """Another codec's, another site's, another shape's, torn: zeros, and the reason."""
    site = Sender(tmp_path, "int8")
    site.send(1)
    mine = site.before
    assert mine is not None
    with TensorFile(mine) as file:
        metadata = file.metadata
    shapes = [TensorLayout(s.name, "F32", (*s.shape, 1)) for s in SPECS]
    write_tensors(
        tmp_path / "shapes", shapes, (np.zeros(s.shape, np.float32) for s in shapes), metadata
    )
    (tmp_path / "torn").write_bytes(mine.read_bytes()[:-1])
    other = Sender(tmp_path, "uniform4")
    other.send(7)
    somebody = Sender(tmp_path, "int8", "south")
    somebody.send(8)
    fresh = Sender(tmp_path, "int8")
    fresh.send(9)
    wanted = (tmp_path / "delta-9").read_bytes()
    reasons = {
        tmp_path / "shapes": r"tensor 'a': expected F32 \(300,\), got F32 \(300, 1\)",
        tmp_path / "torn": "expected 2824 bytes of data, got 2823",
        tmp_path / "missing": "No such file",
        other.before: 'expected the residual of .*"int8".*got another',
        somebody.before: 'expected the residual of .*"north".*got another',
    }
    for path, reason in reasons.items():
        site.before = path
        feedback = site.send(9)
        assert feedback.state == "lost"
        assert re.search(reason, feedback.problem)
        assert (tmp_path / "delta-9").read_bytes() == wanted


def test_a_residual_that_overflows_leaves_no_delta(tmp_path: Path) -> None:
    """Neither is there then: the round failed, and the residual before it stands."""
    site = Sender(tmp_path, "bf16")
    site.send(1)
    kept = site.before
    header = DeltaHeader(
        run="r", round=2, site="north", source_sha="0" * 64, codec="bf16", codec_version=1
    )
    huge = np.finfo(np.float32).max  # bfloat16 has no number as large
    feedback = Feedback(kept, tmp_path / "residual-2", owed=True)
    with pytest.raises(DeltaRefusedError, match="'a': expected finite values"):
        write_delta(
            tmp_path / "delta-2", MANIFEST, "bf16", header,
            lambda spec: np.full(spec.shape, huge, np.float32), 1, feedback,
        )  # fmt: skip
    assert feedback.written is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta-1", "residual-1"]


def share_of_gain(folder: Path, goals: list[Any], codec: str, *, feedback: bool) -> Any:
    """Of sum((w - mean goal)^2), by value: each site pulls an eighth of the way to its goal.

    Twenty-five rounds of the coordinator's arithmetic: w + mean of the deltas as they travelled.
    """
    spec = TensorSpec(name="c", shape=goals[0].shape, init="zeros")
    manifest = Manifest(tensors=(spec,), target_modules=("c",))
    before: dict[int, Path] = {}
    weights = np.zeros(spec.shape, np.float32)
    for number in range(1, 26):
        deltas = []
        for site, goal in enumerate(goals):
            after, path = folder / f"residual-{site}-{number % 2}", folder / f"delta-{site}"
            header = DeltaHeader(
                run="r", round=number, site=f"s{site}", source_sha="0" * 64, codec=codec,
                codec_version=get_codec(codec).version,
            )  # fmt: skip
            step = (goal - weights) / np.float32(8)
            owed = Feedback(before.get(site), after, owed=number > 1) if feedback else None
            seed = derive_seed(number, site)
            write_delta(path, manifest, codec, header, lambda _, step=step: step, seed, owed)
            with DeltaFile(path, manifest) as delta:
                deltas.append(np.array(delta.read(spec)))
            before[site] = after
        weights = weights + np.mean(deltas, axis=0, dtype=np.float32)
    wanted = np.mean(goals, axis=0)
    return 1 - (weights - wanted) ** 2 / wanted**2


def test_what_is_too_small_for_a_codec_to_say_arrives_with_feedback(tmp_path: Path) -> None:
    """Int8 says 127ths of a block's largest value: beside a loud one all others round to 0.

    The sites agree about the quiet values and not about the loud one. Without feedback the quiet
    ones are lost in every round, however many there are.
    """
    goals = [np.ones(64, np.float32) for _ in range(3)]
    for goal, loud in zip(goals, (-300, -300, 601), strict=True):
        goal[0] = loud
    without, with_it = (
        share_of_gain(tmp_path, goals, "int8", feedback=on)[1:].mean() for on in (False, True)
    )
    assert without < 0.01
    assert with_it > 0.8


@pytest.mark.parametrize("codec", ["int4", "uniform4", "sign", "topk"])
def test_a_coarse_codec_misses_less_of_the_gain_with_feedback(tmp_path: Path, codec: str) -> None:
    """Each error is made up for in the next round.

    The sites' goals differ, so that their deltas, and the codec's errors, do not vanish.
    """
    draw = np.random.Generator(np.random.Philox(5))
    common = draw.standard_normal(2048, dtype=np.float32)
    goals = [common + draw.standard_normal(2048, dtype=np.float32) for _ in range(3)]
    weight = np.mean(goals, axis=0) ** 2
    missed = [
        1 - np.average(share_of_gain(tmp_path, goals, codec, feedback=on), weights=weight)
        for on in (True, False)
    ]
    assert 0 < missed[0] < missed[1] / 1.5
