"""A key of the store that is good for one bucket: enough for a run, and for no other bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
from minio import Minio
from minio.error import S3Error

from shared.errors import StoreError
from tests.servers.deployment import Deployment
from tests.servers.seaweedfs import SeaweedFS

# What compose.yaml gives the coordinator's key.
POLICY = Path(__file__).parents[2] / "deploy" / "compose" / "store_policy.json"
OURS = "gradualdiff"


def test_a_key_of_one_bucket_runs_the_federation_and_reaches_no_other(tmp_path, rabbit_server):
    """The store's root makes the bucket; the coordinator's own key is good for that one alone."""
    with SeaweedFS(tmp_path / "store", policy=POLICY) as weed:
        root = weed.server
        root.store(OURS).make_bucket()
        root.store("theirs").make_bucket()
        root.store("theirs").put("k", b"bait")
        limited = weed.limited_server
        stranger = limited.store("theirs")
        for attempt in (
            lambda: stranger.get("k"),
            lambda: stranger.put("k", b"x"),
            lambda: stranger.delete("k"),
            lambda: list(stranger.list("")),
        ):
            with pytest.raises(StoreError, match="may not do that"):
                attempt()
        assert root.store("theirs").get("k") == b"bait"
        host = limited.url.removeprefix("http://")
        client = Minio(
            host, access_key=limited.access_key, secret_key=limited.secret_key, secure=False
        )
        for attempt in (
            lambda: client.make_bucket("mine"),
            lambda: client.remove_bucket(OURS),
            lambda: client.set_bucket_policy(OURS, POLICY.read_text()),
            lambda: client.get_bucket_policy(OURS),
            lambda: client.delete_bucket_encryption(OURS),
            lambda: client.delete_bucket_lifecycle(OURS),
        ):
            with pytest.raises(S3Error, match="AccessDenied"):
                attempt()
        vhost = rabbit_server.new_vhost()
        deployment = Deployment(
            tmp_path, None, rabbit_server, vhost, limited, rounds=2, bucket=OURS
        )
        try:
            for site in "ab":
                deployment.start_participant(site)
            deployment.start_coordinator()
            assert deployment.finish() == deployment.wanted()
        finally:
            deployment.close()
            rabbit_server.delete_vhost(vhost)
