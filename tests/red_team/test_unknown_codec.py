"""A codec that a site does not have, as one that a newer coordinator names."""

from __future__ import annotations

from shared.protocol.events import TrainingFailed


def test_a_codec_that_a_site_does_not_have_is_said_and_nothing_is_lost(hostile):
    """No attempt helps, so it is said once; under a codec that it has the site goes on."""
    coordinator = hostile()
    coordinator.announce()
    source = coordinator.draw(coordinator.manifest)
    coordinator.start(source, codec="int3")
    (failed,) = coordinator.said(TrainingFailed)
    assert not failed.retryable
    assert "codec.name: expected a built-in mode" in failed.reason
    assert "got int3; install the coordinator's release at this site" in failed.reason
    assert coordinator.submitted == []
    coordinator.start(source, codec="int4")
    assert [one.round for one in coordinator.submitted] == [1]
