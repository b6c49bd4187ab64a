"""The first adapter of a run is drawn at the site, and fetched where that gives other bytes."""

from __future__ import annotations

import pytest

from participant.fetching import fetch_adapter
from participant.guard import Guard
from participant.site import Site
from participant.workspace import Workspace
from shared import failpoints
from shared.disk.files import digest_file
from shared.errors import ConfigError
from shared.protocol.events import RunFinished
from shared.tensors.genesis import draw_adapter
from tests.numpy_learner import MANIFEST, NumpyLearner, manifest_of
from tests.participant.test_asking import round_started


class Counting:
    """Brings the run's first adapter, and counts how often."""

    def __init__(self, data):
        self.data, self.downloads = data, 0

    def check(self, url):
        if "elsewhere" in url:
            raise ConfigError("signed URL: expected one of this site's store")

    def download(self, url, path, sha256):
        self.downloads += 1
        path.write_bytes(self.data)
        return len(self.data)


@pytest.fixture
def first(tmp_path):
    path = tmp_path / "first"
    return draw_adapter(MANIFEST, 7, path).sha256, path.read_bytes()


@pytest.fixture
def site(tmp_path, first):
    return Site(
        "a", None, Counting(first[1]), Workspace(tmp_path / "w"), NumpyLearner("a"), lambda: 0.0
    )


def fetched(site, first, seed, manifest=MANIFEST, **what):
    """The bytes of what a site trains from."""
    update = {"source_sha": first[0], "genesis_seed": seed, **what}
    task = round_started(9.0).model_copy(update=update)
    return fetch_adapter(site, Guard(None, site.workspace), task, manifest).read_bytes()


def test_the_first_adapter_is_drawn_and_not_fetched(site, first):
    """Of the seed that the round tells; and what lies there is drawn again where it was altered."""
    assert fetched(site, first, 7) == first[1]
    path = site.workspace.adapter_path("r", first[0])
    path.write_bytes(b"altered")
    assert fetched(site, first, 7) == first[1]
    assert site.transfer.downloads == 0


def test_the_result_of_a_run_may_be_drawn_too(site, first):
    """A run that ended where it began."""
    task = RunFinished(
        run="r", round=0, sha=first[0], reason="r", get_url="u", expires_at=9.0, genesis_seed=7
    )
    path = fetch_adapter(site, Guard(None, site.workspace), task, MANIFEST)
    assert (path.read_bytes(), site.transfer.downloads) == (first[1], 0)


@pytest.mark.parametrize(
    ("seed", "manifest"), [(8, MANIFEST), (7, manifest_of(9)), (None, MANIFEST)]
)
def test_another_draw_costs_the_bytes_and_nothing_else(site, first, seed, manifest):
    """A wrong seed, other tensors, or a coordinator that tells no seed: the sha256 decides."""
    assert fetched(site, first, seed, manifest) == first[1]
    assert site.transfer.downloads == 1
    assert len(list(site.workspace.adapter_path("r", first[0]).parent.iterdir())) == 1


def test_a_store_that_this_site_may_not_ask_is_said_before_the_training(site, first):
    """Else a wrong store.url would come out hours later, when the delta is to go there."""
    with pytest.raises(ConfigError, match="one of this site's store"):
        fetched(site, first, 7, get_url="https://elsewhere/k")


@pytest.mark.parametrize("seed", [7, 8])
def test_a_kill_after_the_draw_costs_nothing(site, first, seed):
    """Whatever it left is looked at again: drawn bytes are kept, wrong ones never trained from."""
    dying = []

    def die(point):
        if point == "genesis.drawn" and not dying:
            dying.append(point)
            raise KeyboardInterrupt

    failpoints.arm(die)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetched(site, first, seed)
    finally:
        failpoints.arm(None)
    assert fetched(site, first, seed) == first[1]
    assert digest_file(site.workspace.adapter_path("r", first[0]))[0] == first[0]
    assert (len(dying), site.transfer.downloads) == (1, seed == 8)
