"""The session's S3 server: the one that the environment names, or a SeaweedFS of our own."""

from __future__ import annotations

import pytest

from tests.servers.seaweedfs import SeaweedFS, named_server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """An :class:`tests.servers.seaweedfs.S3Server`; make a bucket of your own in it."""
    named = named_server()
    if named is not None:
        yield named
        return
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as weed:
        yield weed.server
