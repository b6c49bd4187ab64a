"""Uploads in parts, and the trial of a server that cannot take what sites create by URLs."""

from __future__ import annotations

import time

import pytest

from shared.errors import GrantError, ObjectExistsError, StoreError, StoreUnavailableError
from shared.stores.port import Part, PartUpload
from shared.stores.s3 import S3Store
from shared.stores.transfer import HttpTransfer
from tests.servers.faults import ToldServer, reply

BEGUN = b"<R><UploadId>u</UploadId></R>"


def told(answer):
    """A server that says what the test wants."""
    return ToldServer(answer)


def store_at(server) -> S3Store:
    return S3Store(server.url, "some-bucket", "AKIDKEY", "very-secret")


def test_uploads_are_listed_by_prefix_and_no_two_alike(s3_server):
    """In key order, several of one key too; what is over is not listed and can be ended again."""
    store = s3_server.store(s3_server.new_bucket())
    keys = ["b/1", "a/2", "a/1", "a/1", "c"]
    begun = [store.parts.begin(key) for key in keys]
    assert len(set(begun)) == 5
    assert [one.key for one in store.parts.under_way("")] == sorted(keys)
    assert [one.key for one in store.parts.under_way("a/")] == ["a/1", "a/1", "a/2"]
    assert store.parts.under_way("a/3") == []
    for one in begun:
        store.parts.abort(one)
        store.parts.abort(one)
        assert store.parts.arrived(one) == {}
    assert store.parts.under_way("") == list(store.list("")) == []


def test_parts_are_told_with_size_and_tag_and_make_the_object(s3_server, tmp_path):
    """In the order of their numbers, whatever order they came in; one that came again counts."""
    store = s3_server.store(s3_server.new_bucket())
    size = 5 * 2**20
    data = b"1" * size + b"2" * size + b"rest"
    (tmp_path / "file").write_bytes(data)
    upload = store.parts.begin("k")
    for number, length in ((3, 4), (1, size), (2, size), (1, size)):
        url = store.parts.sign(upload, number, time.time() + 60, length)
        HttpTransfer().upload(url, tmp_path / "file", (number - 1) * size, length)
    parts = store.parts.arrived(upload)
    assert {number: part.size for number, part in parts.items()} == {1: size, 2: size, 3: 4}
    store.parts.complete(upload, parts)
    assert store.get("k") == data


@pytest.mark.parametrize("fault", ["late", "more", "fewer", "another part", "another upload"])
def test_a_url_of_a_part_is_good_for_that_part_alone(s3_server, tmp_path, fault):
    """GrantError; no part is there."""
    store = s3_server.store(s3_server.new_bucket())
    upload, other = store.parts.begin("k"), store.parts.begin("k")
    (tmp_path / "file").write_bytes(b"0123456789")
    url = store.parts.sign(upload, 1, time.time() + (-10 if fault == "late" else 60), 4)
    if fault == "another part":
        url = url.replace("partNumber=1", "partNumber=2")
    if fault == "another upload":
        url = url.replace(upload.id, other.id)
    with pytest.raises(GrantError):
        HttpTransfer().upload(url, tmp_path / "file", 0, {"more": 5, "fewer": 3}.get(fault, 4))
    assert store.parts.arrived(upload) == store.parts.arrived(other) == {}


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("condition", "PUT with If-None-Match: . answered HTTP 200"),
        ("parts", "NotImplemented"),
        ("listing", "is not listed"),
        ("rights", "AccessDenied"),
        ("completion", "completing an upload in parts replaced an object"),
    ],
)
def test_a_server_that_cannot_take_deltas_straight_is_told_why(lacks, says):
    """In a sentence that names what it lacks; nothing is raised, for deltas can take the inbox."""
    puts = []

    def answer(handler):
        path, method = handler.path, handler.command
        if method == "PUT" and "partNumber" not in path:
            puts.append(path)
            reply(handler, 200 if lacks == "condition" or len(puts) == 1 else 412)
        elif method == "POST" and "uploads=" in path:
            refused = b"<Error><Code>NotImplemented</Code></Error>"
            reply(handler, 400 if lacks == "parts" else 200, refused if lacks == "parts" else BEGUN)
        elif method == "GET" and "uploads=" in path:
            key = "" if lacks == "listing" else "<Key>k</Key><UploadId>u</UploadId>"
            refused = b"<Error><Code>AccessDenied</Code></Error>"
            body = refused if lacks == "rights" else f"<R><Upload>{key}</Upload></R>".encode()
            reply(handler, 403 if lacks == "rights" else 200, body)
        else:
            reply(handler, 204 if method == "DELETE" else 200)

    with told(answer) as server:
        assert says.replace(".", "*") in store_at(server).parts.why_not("k")


def test_a_completion_that_fails_after_200_has_failed():
    """S3 says 200 before it knows how a long one ends; the body tells."""
    body = b"<Error><Code>%s</Code></Error>"
    codes = [b"PreconditionFailed", b"InternalError"]
    with told(lambda handler: reply(handler, 200, body % codes.pop(0))) as server:
        parts = store_at(server).parts
        for kind in (ObjectExistsError, StoreUnavailableError):
            with pytest.raises(kind):
                parts.complete(PartUpload("k", "u"), {1: Part(4, "e")})


@pytest.mark.parametrize(
    "body",
    [
        b"no XML",
        b"<R/>",
        b"<R><IsTruncated>true</IsTruncated><NextKeyMarker>a</NextKeyMarker></R>",
        b"<R><IsTruncated>true</IsTruncated><Part><PartNumber>x</PartNumber></Part></R>",
        b"<R><IsTruncated>true</IsTruncated></R>",
    ],
)
def test_an_answer_that_is_none_ends_in_an_error_of_the_tree(body):
    """No listing goes on for ever, and what is no number is not taken for one."""
    with told(lambda handler: reply(handler, 200, body)) as server:
        parts = store_at(server).parts
        with pytest.raises(StoreError):
            parts.begin("k")
        for ask in (lambda: parts.under_way("k"), lambda: parts.arrived(PartUpload("k", "u"))):
            if body == b"<R/>":
                assert not ask()
                continue
            with pytest.raises(StoreError):
                ask()
        assert len(server.seen) < 8
