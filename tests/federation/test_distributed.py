"""Real servers, real processes: the same digest as the embedded run, through kills and stops."""

from __future__ import annotations

import pytest

from tests.servers.deployment import Deployment
from tests.servers.fixtures_s3 import s3_server  # noqa: F401
from tests.servers.rabbitmq import rabbit_server, vhost  # noqa: F401
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def deployment(tmp_path, model, rabbit_server, vhost, s3_server):  # noqa: F811
    made = Deployment(tmp_path, model, rabbit_server, vhost, s3_server)
    yield made
    made.close()


def test_three_processes_end_where_one_does(deployment):
    """Coordinator and two participants over RabbitMQ and S3: the embedded run's very bytes."""
    deployment.start_participant("a")
    deployment.start_participant("b")
    deployment.start_coordinator()
    sha = deployment.finish()
    embedded = deployment.command("simulate", str(deployment.federation))
    assert sha in embedded.stdout
    deployment.command("runs", "verify", "tiny", "--federation", str(deployment.federation))
