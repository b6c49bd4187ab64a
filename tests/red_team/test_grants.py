"""A kit that sends more than it was granted, past the product's own client."""

from __future__ import annotations

import time

import pytest
import urllib3

GRANTED = 2_000
MUCH = 200_000


def chunks():
    yield from (b"x" * 1_000 for _ in range(MUCH // 1_000))


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(b"x" * MUCH, {}, id="more"),
        pytest.param(b"x" * (GRANTED - 1), {}, id="less"),
        pytest.param(chunks, {}, id="of-no-length"),
        pytest.param(chunks, {"X-Amz-Decoded-Content-Length": str(GRANTED)}, id="lying"),
        pytest.param(
            b"x" * MUCH, {"X-Amz-Content-Sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER"}, id="stream"
        ),
    ],
)
def test_a_grant_takes_no_more_than_was_granted(s3_server, body, headers):
    """Refused by the server itself, and nothing is there."""
    store = s3_server.store(s3_server.new_bucket())
    url = store.sign_put("inbox/0", time.time() + 60, GRANTED)
    sent = body() if callable(body) else body
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request("PUT", url, body=sent, headers=headers)
        assert answer.status in (400, 403, 411), answer.data[:200]
        assert list(store.list("")) == []
        granted = http.request("PUT", url, body=b"x" * GRANTED)
        assert granted.status == 200, granted.data[:200]
    assert store.stat("inbox/0").size == GRANTED
