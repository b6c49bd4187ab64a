"""The S3 store and the HTTP transfer under the contract, and what only they have."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from shared.errors import (
    ConfigError,
    GrantError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.s3 import S3Store
from shared.stores.transfer import HttpTransfer
from tests.contracts.store_contract import StoreContract, sha256
from tests.servers.faults import CuttingProxy, ToldServer, make_certificate, reply
from tests.servers.seaweedfs import SeaweedFS


class TestS3Store(StoreContract):
    """The suite, unchanged; a bucket for each test."""

    @pytest.fixture
    def store(self, s3_server):
        return s3_server.store(s3_server.new_bucket())

    @pytest.fixture
    def transfer(self):
        return HttpTransfer()

    @pytest.fixture
    def now(self):
        return time.time

    def altered(self, url, fault):
        head, _, signature = url.rpartition("=")
        flipped = "0" if signature[-1] != "0" else "1"
        return {
            "key": url.replace("/k?", "/other?"),
            "expiry": url.replace("X-Amz-Expires=", "X-Amz-Expires=9"),
            "signature": f"{head}={signature[:-1]}{flipped}",
            "host": url.replace("127.0.0.1", "localhost"),
        }[fault]


@pytest.fixture
def bucket(s3_server):
    return s3_server.new_bucket()


@pytest.fixture
def store(s3_server, bucket):
    return s3_server.store(bucket)


@pytest.fixture
def proxy(s3_server):
    parts = urlsplit(s3_server.url)
    with CuttingProxy((parts.hostname, parts.port)) as proxy:
        yield proxy


@pytest.fixture
def through(s3_server, bucket, proxy):
    """The same bucket, reached through the proxy; signed URLs lead through it too."""
    return s3_server.store(bucket, endpoint=proxy.url)


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may kill."""
    with SeaweedFS(tmp_path / "weed") as weed:
        yield weed


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """``(certificate, key)`` that are good, and others that are over."""
    folder = tmp_path_factory.mktemp("tls")
    return make_certificate(folder, 10), make_certificate(folder, -1)


def soon() -> float:
    return time.time() + 60


def elsewhere(url: str, **settings) -> S3Store:
    return S3Store(url, "some-bucket", "AKIDKEY", "very-secret", **settings)


# Settings and the check at start ----------


def test_a_good_server_passes_the_check_and_keeps_nothing_of_it(store):
    """Any number of times; making a bucket that is there is no error."""
    store.check()
    store.make_bucket()
    store.check()
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        ("access_key", r"store\.access_key_file"),
        ("secret_key", r"store\.secret_key_file"),
        ("bucket", "there is no bucket no-such-bucket; `gradualdiff setup FEDERATION.toml`"),
    ],
)
def test_the_check_names_the_setting_to_mend(s3_server, bucket, wrong, setting):
    """StoreError that is not retryable and tells no secret; the same from put, stat and create."""
    keys = {"access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    if wrong in keys:
        keys[wrong] = "wrong-and-private"
    else:
        bucket = "no-such-bucket"
    store = S3Store(s3_server.url, bucket, **keys)
    calls = [store.check, lambda: store.put("k", b"x"), lambda: store.create("k", b"x")]
    if wrong != "bucket":
        calls.append(lambda: store.stat("k"))
    for call in calls:
        with pytest.raises(StoreError, match=setting) as caught:
            call()
        assert not caught.value.retryable
        for secret in ("wrong-and-private", s3_server.secret_key, "ignature="):
            assert secret not in str(caught.value)


@pytest.mark.parametrize("status", [200, 501])
def test_a_server_without_conditional_writes_is_refused(status):
    """Whether it ignores If-None-Match or says that it has none; the probe is removed."""
    listing = b"<ListBucketResult><Name>some-bucket</Name></ListBucketResult>"

    def answer(handler):
        if handler.command == "PUT":
            reply(handler, status, ETag='"e"')
        else:
            reply(handler, 200 if handler.command == "GET" else 204, listing)

    with (
        ToldServer(answer) as server,
        pytest.raises(StoreError, match=r"honour If-None-Match.*use a server or version"),
    ):
        elsewhere(server.url).check()
    assert server.seen[-1][0] == "DELETE"


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_clock_is_named(store, monkeypatch, hours):
    """With both times, as RequestTimeTooSkewed alone helps nobody."""
    wrong = lambda: datetime.now(UTC) + timedelta(hours=hours)  # noqa: E731
    monkeypatch.setattr("minio.time.utcnow", wrong)
    with pytest.raises(StoreError, match=r"clock.*15 minutes \(there 20.*, here 20.*NTP"):
        store.check()


def test_a_server_that_is_down_is_unavailable_within_seconds():
    """Retryable, naming the endpoint and the cause, from a read as from a write."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = elsewhere(f"http://127.0.0.1:{port}")
    for call in (store.check, lambda: store.create("k", b"x")):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=rf"127.0.0.1:{port}.*Connection refused"):
            call()
        assert time.monotonic() - started < 10


def test_an_unknown_host_is_unavailable():
    with pytest.raises(
        StoreUnavailableError, match=r"nowhere\.invalid:9: .*host name is not known"
    ):
        elsewhere("http://nowhere.invalid:9").put("k", b"x")


def test_a_server_that_speaks_no_s3_is_named():
    """A web page where the store should be: store.url, and nothing of the page."""
    with ToldServer(lambda handler: reply(handler, 200, b"<html>welcome</html>")) as server:
        with pytest.raises(StoreError, match=r"expected.*S3 server.*store\.url") as caught:
            elsewhere(server.url).check()
        assert "welcome" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (507, "XMinioStorageFull")]
)
def test_a_busy_or_full_server_is_unavailable(status, code):
    """Retryable; the full one says so."""
    body = f"<Error><Code>{code}</Code><Message>secret text</Message></Error>".encode()
    with ToldServer(
        lambda handler: reply(handler, status, body, Content_Type="application/xml")
    ) as server:
        store = elsewhere(server.url)
        call = store.create if status == 500 else store.put
        with pytest.raises(StoreUnavailableError, match=code) as caught:
            call("k", b"x")
    assert "secret text" not in str(caught.value)
    assert ("full" in str(caught.value)) == (status == 507)
    assert len(server.seen) == (1 if status == 507 else 5)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_balancer_without_a_server_behind_it_is_unavailable(status):
    """Its answer is a page or nothing, not S3's XML; retryable all the same."""
    with ToldServer(lambda handler: reply(handler, status, b"<html>secret</html>")) as server:
        store = elsewhere(server.url)
        for call in (lambda: store.put("k", b"x"), lambda: store.get("k")):
            with pytest.raises(StoreUnavailableError, match=str(status)) as caught:
                call()
            assert "secret" not in str(caught.value)


def test_503s_are_tried_again():
    """Two refusals, then it goes through: nobody hears of it."""
    left = [503, 503, 200]
    with ToldServer(lambda handler: reply(handler, left.pop(0), ETag='"e"')) as server:
        assert elsewhere(server.url).create("k", b"x").etag == "e"


@pytest.mark.parametrize(
    ("url", "bucket", "named"),
    [
        ("ftp://host", "bucket", r"store\.url"),
        ("http://", "bucket", r"store\.url"),
        ("http://host:99999", "bucket", r"store\.url"),
        ("http://host", "Not A Bucket", r"store\.bucket"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(url, bucket, named):
    """ConfigError, without a server."""
    with pytest.raises(ConfigError, match=named):
        S3Store(url, bucket, "key", "secret")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_file_without_a_certificate_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "ca").write_text(content, encoding="ascii")
    with pytest.raises(ConfigError, match=rf"store\.ca_file.*{tmp_path}/ca"):
        elsewhere("https://host", ca_file=tmp_path / "ca")
    with pytest.raises(ConfigError, match=r"broker\.ca_file"):
        HttpTransfer(ca_file=tmp_path / "ca")


# TLS ----------


def test_all_of_it_over_tls(tmp_path, certificates):
    """With the authority named; without it, or over plain HTTP, the setting is named."""
    (certificate, key), _ = certificates
    with SeaweedFS(tmp_path / "weed", certificate, key) as weed:
        server = weed.server
        store = server.store(server.new_bucket())
        store.check()
        url = store.sign_put("k", soon(), 5)
        (tmp_path / "in").write_bytes(b"bytes")
        HttpTransfer(ca_file=certificate).upload(url, tmp_path / "in", 0, 5)
        assert store.get("k") == b"bytes"
        with pytest.raises(StoreError, match=r"certificate is refused.*store\.ca_file"):
            server.store("bucket", ca_file=None).check()
        with pytest.raises(StoreError, match=r"certificate is refused.*broker\.ca_file") as caught:
            HttpTransfer().upload(url, tmp_path / "in", 0, 5)
        assert not caught.value.retryable
        with pytest.raises(StoreError, match=r"store\.url"):
            server.store("bucket", endpoint=server.url.replace("https:", "http:")).check()


def test_an_expired_certificate_is_named(tmp_path, certificates):
    """At once, not after retries, on both sides."""
    _, expired = certificates
    with ToldServer(lambda handler: reply(handler, 200), expired) as server:
        store = elsewhere(server.url, ca_file=expired[0])
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"has expired.*store\.ca_file") as caught:
            store.check()
        assert not caught.value.retryable
        url = store.sign_get("k", soon())
        with pytest.raises(StoreError, match=r"has expired.*broker\.ca_file"):
            HttpTransfer(ca_file=expired[0]).download(url, tmp_path / "out", "")
        assert time.monotonic() - started < 2
    assert list(tmp_path.iterdir()) == []


def test_plain_http_where_tls_is_expected_is_named():
    with ToldServer(lambda handler: reply(handler, 200)) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(StoreError, match="expected TLS"):
            elsewhere(url).check()


# Signing ----------


def test_signing_asks_nobody_and_uses_the_sites_view(tmp_path):
    """No server is there at all; the URL leads to where sites find it."""
    store = elsewhere("http://inside.invalid:1", site_endpoint="https://outside.example:9000")
    for url in (store.sign_get("a/b", soon()), store.sign_put("a/b", soon(), 1)):
        assert url.startswith("https://outside.example:9000/some-bucket/a/b?")
        assert "very-secret" not in url


@pytest.mark.parametrize(
    ("after", "seconds"), [(3600, 3600), (1, 1), (30 * 86400, 7 * 86400), (-10, 1), (0, 1)]
)
def test_a_url_ends_when_it_should(monkeypatch, after, seconds):
    """At most seven days; one that is over was good for a second that is past."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.5)
    query = parse_qs(urlsplit(elsewhere("http://h").sign_get("k", 1_800_000_000.5 + after)).query)
    signed = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z").timestamp()
    assert query["X-Amz-Expires"] == [str(seconds)]
    assert signed == min(1_800_000_000, 1_800_000_000 + after - 1)


def test_a_long_upload_with_an_expired_url_is_a_grant_error(store, tmp_path):
    """The server says no before it has read the body; that is heard."""
    (tmp_path / "in").write_bytes(bytes(20_000_000))
    url = store.sign_put("k", time.time() - 10, 20_000_000)
    with pytest.raises(GrantError):
        HttpTransfer().upload(url, tmp_path / "in", 0, 20_000_000)


# Large, many, cut and killed ----------


def test_a_listing_of_several_pages_is_in_key_order(store):
    """Where pages end within a folder that has neighbours such as ``a-`` and ``a.``."""
    keys = [f"runs/a/{number:04d}" for number in range(1100)]
    keys += [f"runs/a{sign}{number}" for sign in "-.0" for number in range(50)] + ["runs/z"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert [info.key for info in store.list("runs/")] == sorted(keys)
    assert [info.key for info in store.list("runs/a/1")] == keys[1000:1100]
    assert next(store.list("runs/a/")).key == "runs/a/0000"


def test_a_file_of_many_parts_does_not_grow_memory(s3_server, bucket, tmp_path):
    """160 MiB there and back: the process stays within a few parts of 16 MiB."""
    with (tmp_path / "in").open("wb") as file:
        file.truncate(160 << 20)
    script = (
        "import resource, sys; from pathlib import Path; from shared.stores.s3 import S3Store\n"
        "url, bucket, key, secret, folder = sys.argv[1:]\n"
        "store = S3Store(url, bucket, key, secret); folder = Path(folder)\n"
        "store.put('warm', bytes(16 << 20))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "info = store.put_file('k', folder / 'in')\n"
        "assert store.fetch_file('k', folder / 'out') == info == store.stat('k')\n"
        "store.sha256('k')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    words = [s3_server.url, bucket, s3_server.access_key, s3_server.secret_key, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 64 * 1024  # KiB
    assert (tmp_path / "out").stat().st_size == 160 << 20


def test_a_server_killed_amid_a_put_leaves_the_old_object(own_server, tmp_path):
    """SIGKILL while parts are under way: unavailable; after a restart the old bytes, then new."""
    server = own_server.server
    bucket = server.new_bucket()
    parts = urlsplit(server.url)
    (tmp_path / "in").write_bytes(bytes(range(256)) * (3 << 16))
    with CuttingProxy((parts.hostname, parts.port)) as proxy:
        store = server.store(bucket, endpoint=proxy.url)
        store.put("k", b"old")
        fresh = server.store(bucket, endpoint=proxy.url)
        proxy.requests = [20_000_000]
        proxy.on_cut = own_server.kill
        with pytest.raises(StoreUnavailableError, match=r"^k: store at"):
            fresh.put_file("k", tmp_path / "in")
        assert proxy.cuts == 1
        own_server.start()
        assert store.get("k") == b"old"
        assert [info.key for info in store.list("")] == ["k"]
        info = fresh.put_file("k", tmp_path / "in")
        assert store.sha256("k") == sha256((tmp_path / "in").read_bytes())
        assert store.stat("k") == info


def test_what_was_written_outlives_a_killed_server(own_server):
    """A call that returned is durable against the death of the server's process."""
    server = own_server.server
    store = server.store(server.new_bucket())
    infos = [store.create(f"k/{number}", b"%d" % number) for number in range(20)]
    own_server.kill()
    own_server.start()
    assert list(store.list("k/")) == sorted(infos, key=lambda info: info.key)
    assert [store.get(info.key) for info in infos] == [b"%d" % number for number in range(20)]
    with pytest.raises(ObjectExistsError):
        store.create("k/0", b"other")


def test_a_create_whose_answer_was_lost_meets_itself(through, store, proxy):
    """Tried again, it finds its own bytes: ObjectExistsError, and the caller adopts them."""
    proxy.answers = [0]
    with pytest.raises(ObjectExistsError):
        through.create("k", b"mine")
    assert proxy.cuts == 1
    assert store.get("k") == b"mine"


@pytest.mark.parametrize("way", ["get", "fetch_file", "sha256"])
def test_a_read_that_was_cut_goes_on(through, store, proxy, tmp_path, way):
    """From where it was, if the object is still the same."""
    data = bytes(range(256)) * 20_000
    store.put("k", data)
    proxy.answers = [1_000_000, 2_000_000]
    if way == "get":
        assert through.get("k") == data
    elif way == "sha256":
        assert through.sha256("k") == sha256(data)
    else:
        assert through.fetch_file("k", tmp_path / "out") == store.stat("k")
        assert (tmp_path / "out").read_bytes() == data
    assert proxy.cuts == 2
    assert all("range: bytes=" in head.lower() for head in proxy.heads[1:])


def test_a_read_that_was_cut_does_not_go_on_in_another_object(through, store, proxy, tmp_path):
    """ObjectChangedError rather than the halves of two; no file."""
    store.put("k", b"a" * 5_000_000)
    proxy.answers = [1_000_000]
    proxy.on_cut = lambda: store.put("k", b"b" * 5_000_000)
    with pytest.raises(ObjectChangedError, match="k: was written anew"):
        through.fetch_file("k", tmp_path / "out")
    assert proxy.cuts == 1
    assert list(tmp_path.iterdir()) == []


# The transfer ----------


@pytest.fixture
def payload(store):
    """An object ``k`` of 5 MB that is nowhere the same."""
    data = b"".join(b"%9d\n" % number for number in range(500_000))
    store.put("k", data)
    return data


def test_a_cut_download_goes_on_by_range(through, proxy, payload, tmp_path):
    """Two cuts, three requests, the second and third for the rest only."""
    proxy.answers = [1_000_000, 2_500_000]
    url = through.sign_get("k", soon())
    assert HttpTransfer().download(url, tmp_path / "out", sha256(payload)) == len(payload)
    assert (tmp_path / "out").read_bytes() == payload
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert proxy.cuts == 2
    assert len(proxy.heads) == 3
    assert "Range:" not in proxy.heads[0]
    for head in proxy.heads[1:]:
        assert re.search(r"Range: bytes=[1-9]\d+-\r\n", head + "\r\n")
        assert "If-Range: " in head


def test_a_download_goes_on_after_a_restart(through, proxy, payload, tmp_path):
    """What came stays beside the target and is asked for no more."""
    url = through.sign_get("k", soon())
    proxy.answers = [2_000_000, 0, 0, 0, 0]
    with pytest.raises(StoreUnavailableError) as caught:
        HttpTransfer().download(url, tmp_path / "out", sha256(payload))
    assert proxy.cuts == 5
    assert "ignature" not in str(caught.value)
    (part,) = tmp_path.iterdir()
    assert part.name == ".out.part"
    kept = part.stat().st_size
    assert 1_900_000 < kept < 2_000_000
    proxy.answers = []
    HttpTransfer().download(url, tmp_path / "out", sha256(payload))
    assert f"Range: bytes={kept}-" in proxy.heads[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == payload


@pytest.mark.parametrize("old", [b"of another object", bytes(9_000_000)], ids=["short", "long"])
def test_a_part_of_another_object_is_started_over(through, proxy, payload, tmp_path, old):
    """Only the sha256 decides: once more from the start, and right."""
    (tmp_path / ".out.part").write_bytes(old)
    HttpTransfer().download(through.sign_get("k", soon()), tmp_path / "out", sha256(payload))
    assert (tmp_path / "out").read_bytes() == payload
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "Range:" in proxy.heads[0]
    assert "Range:" not in proxy.heads[-1]


def test_a_whole_part_needs_no_request(through, proxy, payload, tmp_path):
    """The process died between the last byte and the name."""
    (tmp_path / ".out.part").write_bytes(payload)
    HttpTransfer().download(through.sign_get("k", soon()), tmp_path / "out", sha256(payload))
    assert proxy.heads == []
    assert (tmp_path / "out").read_bytes() == payload


def test_a_part_survives_a_url_that_expired(store, payload, tmp_path):
    """The site asks for a new URL and goes on; it does not begin again."""
    (tmp_path / ".out.part").write_bytes(payload[:1000])
    transfer = HttpTransfer()
    with pytest.raises(GrantError):
        transfer.download(store.sign_get("k", time.time() - 9), tmp_path / "out", sha256(payload))
    assert (tmp_path / ".out.part").read_bytes() == payload[:1000]


def test_an_object_written_anew_amid_a_download_is_not_mixed(
    through, store, proxy, payload, tmp_path
):
    """The new object whole or IntegrityError, never the halves of two."""
    new = payload[::-1]
    proxy.answers = [1_000_000]
    proxy.on_cut = lambda: store.put("k", new)
    HttpTransfer().download(through.sign_get("k", soon()), tmp_path / "out", sha256(new))
    assert proxy.cuts == 1
    assert (tmp_path / "out").read_bytes() == new


def test_a_cut_upload_is_sent_again_whole(through, store, proxy, payload, tmp_path):
    """Cut in the body, and cut before the answer."""
    (tmp_path / "in").write_bytes(payload)
    proxy.requests = [1_000_000, None, None]
    proxy.answers = [None, 0, None]
    url = through.sign_put("up", soon(), len(payload) - 1000)
    HttpTransfer().upload(url, tmp_path / "in", 1000, len(payload) - 1000)
    assert proxy.cuts == 2
    assert store.get("up") == payload[1000:]


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_503s_of_a_transfer_are_tried_again_and_not_for_ever(tmp_path, method):
    """Twice refused and then served; always refused is StoreUnavailableError after five tries."""
    (tmp_path / "in").write_bytes(b"bytes")
    left = [503, 503]

    def answer(handler):
        reply(handler, left.pop() if left else 200, b"bytes")

    def call(url):
        url = f"{url}/b/k?X-Amz-Signature=5ec2e7"
        if method == "GET":
            HttpTransfer().download(url, tmp_path / "out", sha256(b"bytes"))
        else:
            HttpTransfer().upload(url, tmp_path / "in", 0, 5)

    with ToldServer(answer) as server:
        call(server.url)
        assert len(server.seen) == 3
        left += [503] * 9
        with pytest.raises(StoreUnavailableError, match="cannot serve now") as caught:
            call(server.url)
        assert len(server.seen) == 8
    assert "5ec2e7" not in str(caught.value)


def test_plain_text_to_another_machine_is_refused(tmp_path):
    """ConfigError naming the setting, before a byte is sent; loopback and https are no matter."""
    transfer = HttpTransfer()
    for host in ("store.example:8333", "10.0.0.7", "[fd00::1]:80"):
        with pytest.raises(ConfigError, match=r'broker\.transport = "plaintext"') as caught:
            transfer.download(f"http://{host}/b/k?X-Amz-Signature=5ec2e7", tmp_path / "out", "")
        assert "5ec2e7" not in str(caught.value)
    with pytest.raises(StoreUnavailableError, match=r"nowhere\.invalid"):
        HttpTransfer(plaintext=True).download("http://nowhere.invalid/k", tmp_path / "out", "")
    for url in (
        "file:///etc/passwd",
        "gradualdiff-dir:///k",
        "http://",
        "http://h:x/",
        "http://[/",
    ):
        with pytest.raises(GrantError, match="expected http"):
            transfer.download(url, tmp_path / "out", "")


def test_a_redirect_is_not_followed(tmp_path):
    """A signed URL is good for one host."""
    with ToldServer(lambda handler: reply(handler, 302, Location="/other")) as server:
        with pytest.raises(StoreError, match=r"redirect.*store\.site_url") as caught:
            HttpTransfer().download(f"{server.url}/k", tmp_path / "out", "")
        assert not caught.value.retryable
        assert len(server.seen) == 1


@pytest.mark.parametrize("announced", [True, False])
def test_endless_bytes_are_not_read(tmp_path, announced):
    """IntegrityError at the limit, whether the length is told or not; nothing is left over."""
    sent = []

    def answer(handler):
        handler.send_response(200)
        handler.send_header(*(("Content-Length", "1" * 12) if announced else ("X", "y")))
        handler.send_header("Connection", "close")
        handler.close_connection = True
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(100_000))
            sent.append(100_000)

    with (
        ToldServer(answer) as server,
        pytest.raises(IntegrityError, match="at most 1000000 bytes"),
    ):
        HttpTransfer(max_bytes=1_000_000).download(f"{server.url}/k", tmp_path / "out", "")
    assert sum(sent) < 50_000_000
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges_starts_over(tmp_path):
    """It answers 200 with the whole: what was here is dropped, not prepended."""
    (tmp_path / ".out.part").write_bytes(b"byt")
    with ToldServer(lambda handler: reply(handler, 200, b"bytes")) as server:
        assert HttpTransfer().download(f"{server.url}/k", tmp_path / "out", sha256(b"bytes")) == 5
        assert len(server.seen) == 1
    assert (tmp_path / "out").read_bytes() == b"bytes"


def test_a_full_local_disk_is_the_sites_own(payload, store, tmp_path, monkeypatch):
    """The path is named, not the store; the older file stays."""
    (tmp_path / "out").write_bytes(b"older")

    def full(_handle: int, _mode: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fchmod", full)
    for call in (
        lambda: HttpTransfer().download(
            store.sign_get("k", soon()), tmp_path / "out", sha256(payload)
        ),
        lambda: store.fetch_file("k", tmp_path / "out"),
    ):
        with pytest.raises(StoreUnavailableError, match=rf"{tmp_path}/out.*disk is full"):
            call()
    assert (tmp_path / "out").read_bytes() == b"older"
