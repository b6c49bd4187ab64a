"""Bases that a run hands out: fetched once, checked, and refused where they are not the run's."""

from __future__ import annotations

import hashlib

import pytest

from coordinator.round.members import unfit
from participant.fetching import fetch_bases
from participant.site import Site
from participant.workspace import Workspace
from shared.config import LoraSection
from shared.errors import ConfigError, ProtocolError
from shared.protocol.events import BasesOffered, RunAnnounced, WireBase, WireLora, WireTraining
from shared.protocol.manifest import BasesFound, Manifest, Numerics, TensorSpec
from shared.protocol.records import MemberRecord
from tests.federations import config

DATA = b"some bases"
SHA = hashlib.sha256(DATA).hexdigest()
OTHER = "0" * 64


class Taking:
    """A learner that notes what it is given, and a store that counts."""

    def __init__(self):
        self.taken, self.downloads = [], 0

    def take_bases(self, run, path):
        self.taken.append((run, path.read_bytes()))

    def download(self, url, path, sha256):
        assert sha256 == SHA
        self.downloads += 1
        path.write_bytes(DATA)
        return len(DATA)


def site_of(taking, folder):
    return Site("a", None, taking, Workspace(folder), taking, lambda: 0.0)


def announced(bases, offered):
    return RunAnnounced(
        run="r",
        config_digest="b" * 64,
        base=WireBase(model="m"),
        lora=WireLora(kind="core", bases=bases),
        training=WireTraining(local_steps=1),
        rounds=1,
        participants=1,
        bases=offered,
    )


def offer(sha=SHA):
    return BasesOffered(sha=sha, get_url="https://store/k", expires_at=1.0)


def test_bases_are_fetched_once_and_again_where_they_were_altered(tmp_path):
    """What lies in the workspace is trusted no more than what comes over the wire."""
    taking = Taking()
    site = site_of(taking, tmp_path)
    for _ in range(2):
        fetch_bases(site, announced(f"x#{SHA}", offer()))
    assert (taking.downloads, taking.taken) == (1, [("r", DATA)] * 2)
    site.workspace.bases_path("r", SHA).write_bytes(b"altered")
    fetch_bases(site, announced(f"x#{SHA}", offer()))
    assert (taking.downloads, taking.taken[-1]) == (2, ("r", DATA))


def test_bases_of_the_weights_are_not_fetched(tmp_path):
    """There is nothing to fetch."""
    taking = Taking()
    fetch_bases(site_of(taking, tmp_path), announced("weights", None))
    assert (taking.downloads, taking.taken) == (0, [])


@pytest.mark.parametrize("offered", [None, offer(OTHER)])
def test_an_announcement_that_offers_other_bases_than_it_names_is_refused(tmp_path, offered):
    """Nothing is fetched then."""
    taking = Taking()
    with pytest.raises(ProtocolError, match=rf"bases.sha: expected {SHA[:12]}.*got"):
        fetch_bases(site_of(taking, tmp_path), announced(f"x#{SHA}", offered))
    assert taking.downloads == 0


# What the coordinator takes --------------------------------------------------------------------


def member(site, found, bases=None, version="1"):
    tensor = TensorSpec(name="x.lora_R.weight", shape=(4, 4), init="zeros")
    return MemberRecord(
        site=site,
        manifest=Manifest(tensors=(tensor,), target_modules=("x",), kind="core", bases=bases),
        fingerprint="f" * 64,
        numerics=Numerics(
            versions={"torch": "1"},
            device="cpu",
            cpu_capability=version,
            cpu_threads=1,
            compute_dtype="float32",
        ),
        examples=1,
        bases=BasesFound(sha=found),
    )


def core(bases="weights"):
    return config(sites=("a", "b"), lora={"kind": "core", "rank": 4, "bases": bases})


def test_equal_machines_that_found_other_bases_are_unfit():
    """One of them is broken; what unequal ones found is only shown."""
    settings = core()
    assert unfit({"a": member("a", SHA), "b": member("b", SHA)}, settings) == {}
    odd = unfit({"a": member("a", SHA), "b": member("b", OTHER)}, settings)
    assert odd.keys() == {"b"}
    assert f"lora.bases: expected {SHA[:12]}" in odd["b"]
    assert OTHER[:12] in odd["b"]
    assert unfit({"a": member("a", SHA), "b": member("b", OTHER, version="2")}, settings) == {}


def test_a_site_with_other_bases_than_the_runs_file_is_unfit():
    """Also one that found its own."""
    settings = core(f"x#{SHA}")
    one = member("a", SHA, SHA)
    assert unfit({"a": one, "b": member("b", SHA, SHA)}, settings) == {}
    for other in (OTHER, None):
        odd = unfit({"a": one, "b": member("b", OTHER, other)}, settings)
        assert odd.keys() == {"b"}
        assert "lora.bases: expected" in odd["b"]


def test_what_the_bases_are_is_read_from_the_settings():
    """The source as the user wrote it, and the sha256 behind it."""
    named = LoraSection(kind="core", bases="x#y.safetensors").with_bases(SHA)
    assert (named.bases, named.bases_sha) == (f"x#y.safetensors#{SHA}", SHA)
    assert LoraSection(kind="core").bases_sha is None
    assert LoraSection(bases=f"x#{SHA}").bases_sha is None
    with pytest.raises(ConfigError):
        config(lora={"kind": "cores"})
