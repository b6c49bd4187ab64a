"""Deployments of real processes for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.servers.deployment import Deployment


@pytest.fixture
def deploy(tmp_path, rabbit_server, vhost, s3_server):
    """Makes a deployment; all of its processes are ended at the end."""
    made = []

    def make(**settings) -> Deployment:
        folder = tmp_path / str(len(made))
        settings = {
            "model": None,
            "rabbit": rabbit_server,
            "vhost": vhost,
            "s3": s3_server,
            **settings,
        }
        made.append(Deployment(folder, **settings))
        return made[-1]

    yield make
    for deployment in made:
        deployment.close()
