"""All that a site may not do in the store, tried by urllib3 alone: without a key, and with URLs.

Each row is refused, and afterwards the store is as it was. For the broker see
test_forbidden_operations.
"""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
import urllib3

INBOX = "inbox/run/00001/mine/0"
OTHERS = "inbox/run/00001/other/0"
BODY = b"unchanged"


@pytest.fixture(scope="module")
def world(s3_server):
    """A bucket with two sites' objects, as the coordinator sees it, and its address."""
    bucket = s3_server.new_bucket()
    store = s3_server.store(bucket)
    for key in (INBOX, OTHERS):
        store.put(key, BODY)
    return SimpleNamespace(store=store, bucket=bucket, url=f"{s3_server.url}/{bucket}")


@pytest.fixture
def unchanged(world):
    """No object is another afterwards, and none more or fewer."""

    def everything():
        return [(info, world.store.get(info.key)) for info in world.store.list("")]

    before = everything()
    assert [body for _, body in before] == [BODY, BODY]
    yield
    assert everything() == before


def signed(method, seconds=60.0):
    """To make a URL as the coordinator does."""

    def make(world):
        at = time.time() + seconds
        if method == "GET":
            return world.store.sign_get(INBOX, at)
        sign = world.store.sign_create if method == "CREATE" else world.store.sign_put
        return sign(INBOX, at, len(BODY))

    return make


def altered(method, old, new):
    """To make a URL that somebody changed afterwards."""

    def make(world):
        url = signed(method)(world)
        changed = re.sub(old, new, url)
        assert changed != url
        return changed

    return make


def plain(path):
    """To make a URL without a signature."""
    return lambda world: f"{world.url}{path}"


METHODS = ("GET", "HEAD", "PUT", "DELETE")
FLIPPED = (r"(Signature=)([0-9a-f])", lambda found: found[1] + ("1" if found[2] == "0" else "0"))
STORE = {
    "list the bucket": ("GET", plain("?list-type=2")),
    "list all buckets": ("GET", lambda world: world.url.rpartition("/")[0] + "/"),
    "delete the bucket": ("DELETE", plain("")),
    "make a bucket": ("PUT", plain("-mine")),
    "open the bucket to everybody": ("PUT", plain("?acl")),
    "see who may what": ("GET", plain("?policy")),
    "delete many": ("POST", plain("?delete")),
    "begin an upload in parts": ("POST", plain(f"/{INBOX}?uploads")),
    **{f"{method} without a key": (method, plain(f"/{OTHERS}")) for method in METHODS},
    **{
        f"{method} by a URL to {granted}": (method, signed(granted))
        for granted in ("GET", "PUT", "CREATE")
        for method in METHODS
        if method != granted
    },
    **{
        f"{method} another object by a URL to {granted}": (
            method,
            altered(granted, "/mine/", "/other/"),
        )
        for granted in ("GET", "PUT")
        for method in METHODS
    },
    **{
        f"{granted} with {what}": (granted, altered(granted, old, new))
        for granted in ("GET", "PUT")
        for what, (old, new) in {
            "a later expiry": (r"Expires=\d+", "Expires=86400"),
            "a later date": (r"Date=\d{4}", "Date=2099"),
            "another signature": FLIPPED,
            "another key's name": (r"Credential=[^%]+", "Credential=admin"),
            "another question": (r"$", "&acl="),
        }.items()
    },
    **{
        f"{granted} too late": (granted, signed(granted, seconds=-10)) for granted in ("GET", "PUT")
    },
    "list by a URL to GET": ("GET", altered("GET", r"/inbox[^?]*\?", "?list-type=2&")),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("what", STORE)
def test_the_store_refuses_to(world, what):
    """403, and no byte of an object in the answer."""
    method, make = STORE[what]
    body = b"x" * len(BODY) if method in ("PUT", "POST") else None
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request(method, make(world), body=body)
    assert answer.status == 403, answer.data[:300]
    assert BODY not in answer.data


@pytest.mark.usefixtures("unchanged")
def test_a_granted_upload_copies_nothing(world):
    """A header that nobody signed would have the server write another site's object there."""
    headers = {"x-amz-copy-source": f"/{world.bucket}/{OTHERS}"}
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request("PUT", signed("PUT")(world), body=BODY, headers=headers)
    assert answer.status == 403, answer.data[:300]


def test_what_the_urls_are_for_works(world):
    """So that no row above is refused for another reason."""
    with urllib3.PoolManager(retries=False) as http:
        assert http.request("GET", signed("GET")(world)).data == BODY
        assert http.request("PUT", signed("PUT")(world), body=BODY).status == 200
