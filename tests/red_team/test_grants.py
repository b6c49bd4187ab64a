"""A kit that sends more than it was granted, past the product's own client."""

from __future__ import annotations

import contextlib
import time

import pytest
import urllib3

from shared.errors import GrantError, ObjectChangedError, ObjectExistsError
from shared.stores.transfer import HttpTransfer

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


@pytest.mark.parametrize(
    "headers", [{}, {"If-None-Match": '"other"'}, {"If-None-Match": ""}, {"If-Match": "*"}], ids=str
)
def test_a_grant_to_create_is_good_for_nothing_else(s3_server, headers):
    """Without its condition, or with another one, the server takes it for another request."""
    store = s3_server.store(s3_server.new_bucket())
    store.put("k", b"accepted")
    url = store.sign_create("k", time.time() + 60, GRANTED)
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request("PUT", url, body=b"x" * GRANTED, headers=headers)
        assert answer.status in (400, 403), answer.data[:200]
        answer = http.request("PUT", url, body=b"x" * GRANTED, headers={"If-None-Match": "*"})
        assert answer.status == 412, answer.data[:200]
    assert store.get("k") == b"accepted"


@pytest.mark.parametrize("end", ["completed", "given up"])
def test_no_url_of_a_part_outlives_its_upload(s3_server, tmp_path, end):
    """Neither the object nor the room at the store is another by what is sent after it."""
    store = s3_server.store(s3_server.new_bucket())
    upload = store.parts.begin("k")
    url = store.parts.sign(upload, 1, time.time() + 60, GRANTED)
    (tmp_path / "part").write_bytes(b"x" * GRANTED)
    (tmp_path / "other").write_bytes(b"y" * GRANTED)
    HttpTransfer().upload(url, tmp_path / "part", 0, GRANTED)
    if end == "completed":
        store.parts.complete(upload, store.parts.arrived(upload))
    else:
        store.parts.abort(upload)
    with pytest.raises(GrantError, match="NoSuchUpload"):
        HttpTransfer().upload(url, tmp_path / "other", 0, GRANTED)
    assert store.parts.under_way("") == []
    assert [store.get(info.key) for info in store.list("")] == [b"x" * GRANTED] * (
        end == "completed"
    )


def test_a_part_sent_again_between_the_look_and_the_completion_gets_in_nowhere(s3_server, tmp_path):
    """By the URL the site holds still: the object is of the parts looked at, or there is none."""
    store = s3_server.store(s3_server.new_bucket())
    upload = store.parts.begin("k")
    url = store.parts.sign(upload, 1, time.time() + 60, 4)
    for data in (b"good", b"evil"):
        (tmp_path / "part").write_bytes(data)
        HttpTransfer().upload(url, tmp_path / "part", 0, 4)
        if data == b"good":
            seen = store.parts.arrived(upload)
    with contextlib.suppress(ObjectChangedError):
        store.parts.complete(upload, seen)
    assert [store.get(info.key) for info in store.list("")] in ([], [b"good"])


def test_of_two_uploads_of_a_key_one_makes_the_object(s3_server, tmp_path):
    """The second meets the condition, as an object that a URL made would."""
    store = s3_server.store(s3_server.new_bucket())
    for data in (b"good", b"evil"):
        upload = store.parts.begin("k")
        (tmp_path / "part").write_bytes(data)
        url = store.parts.sign(upload, 1, time.time() + 60, 4)
        HttpTransfer().upload(url, tmp_path / "part", 0, 4)
    first, second = store.parts.under_way("k")
    store.parts.complete(first, store.parts.arrived(first))
    made = store.get("k")
    with pytest.raises(ObjectExistsError):
        store.parts.complete(second, store.parts.arrived(second))
    assert store.get("k") == made
