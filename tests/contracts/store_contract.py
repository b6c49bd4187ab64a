"""What every ``ObjectStore`` and ``Transfer`` must do. An adapter's test class gives ``store``.

Nothing here looks inside an adapter.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from shared.errors import (
    GrantError,
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.stores.port import ObjectStore, Transfer


GOOD_KEYS = (
    "a",
    "a.json",
    "runs/r-1/rounds/00001/opened.json",
    "A_b/0.1/..x",
    "x/...",
    ".hidden/k",
)
BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    "a b",
    "a\nb",
    "ä",
    "a\0",
    "a:b",
)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


class StoreContract:
    """The suite. Adapters override the fixtures."""

    soon_seconds = 60.0

    @pytest.fixture
    def store(self) -> ObjectStore:
        raise NotImplementedError

    @pytest.fixture
    def transfer(self) -> Transfer:
        raise NotImplementedError

    @pytest.fixture
    def now(self) -> Callable[[], float]:
        """The store's clock: seconds since the epoch."""
        raise NotImplementedError

    # Writing and reading ----------

    @pytest.mark.parametrize("key", GOOD_KEYS)
    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=len)
    def test_what_was_put_is_read_back(self, store, key, data):
        """Whole, with its size and a digest that is read from the bytes."""
        info = store.put(key, data)
        assert (info.key, info.size) == (key, len(data))
        assert store.get(key) == data
        assert store.stat(key) == info
        assert store.sha256(key) == sha256(data)

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_bad_key_is_refused_everywhere(self, store, tmp_path, key):
        """StoreError, before anything is touched."""
        file = tmp_path / "file"
        file.write_bytes(b"x")
        for call in (
            lambda: store.put(key, b"x"),
            lambda: store.create(key, b"x"),
            lambda: store.put_file(key, file),
            lambda: store.get(key),
            lambda: store.fetch_file(key, tmp_path / "out"),
            lambda: store.stat(key),
            lambda: store.sha256(key),
            lambda: store.delete(key),
            lambda: store.sign_get(key, 2e9),
            lambda: store.sign_put(key, 2e9, 1),
            lambda: store.sign_create(key, 2e9, 1),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert not isinstance(caught.value, ObjectMissingError)

    def test_a_put_replaces(self, store):
        """The last writer's bytes are read, under another etag."""
        first = store.put("k", b"first")
        second = store.put("k", b"second")
        assert store.get("k") == b"second"
        assert second.etag != first.etag
        assert store.stat("k").etag == second.etag

    def test_a_missing_object_is_an_error_that_names_it(self, store, tmp_path):
        """ObjectMissingError from every reader, also for what is only a prefix of keys."""
        store.put("runs/r1/a", b"x")
        for key in ("none", "runs/r1", "runs/r1/a/b"):
            for call in (
                lambda key=key: store.get(key),
                lambda key=key: store.stat(key),
                lambda key=key: store.sha256(key),
                lambda key=key: store.fetch_file(key, tmp_path / "out"),
            ):
                with pytest.raises(ObjectMissingError, match=key):
                    call()
        assert not (tmp_path / "out").exists()

    def test_a_deleted_object_is_gone_and_deleting_repeats(self, store):
        """Nothing there is no error; neighbours stay."""
        store.put("a/b", b"x")
        store.put("a/c", b"y")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("never/was")
        store.delete("a")
        assert [info.key for info in store.list("")] == ["a/c"]

    # Conditional create ----------

    def test_create_writes_once(self, store):
        """The second gets ObjectExistsError and changes nothing, whatever it would have written."""
        store.create("k", b"first")
        for data in (b"first", b"second"):
            with pytest.raises(ObjectExistsError, match="k"):
                store.create("k", data)
        assert store.get("k") == b"first"

    def test_create_works_again_after_a_delete(self, store):
        """The condition is about now."""
        store.create("k", b"first")
        store.delete("k")
        store.create("k", b"second")
        assert store.get("k") == b"second"

    def test_of_eight_threads_one_creates(self, store):
        """One winner, seven ObjectExistsErrors, the winner's bytes: in twenty races."""

        def create(number: int, key: str) -> int | None:
            try:
                store.create(key, b"%d" % number)
            except ObjectExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            for race in range(20):
                key = f"race/{race}"
                won = list(pool.map(create, range(8), [key] * 8))
                winners = [number for number in won if number is not None]
                assert len(winners) == 1
                assert store.get(key) == b"%d" % winners[0]

    # Files ----------

    def test_a_file_goes_in_and_comes_out(self, store, tmp_path):
        """Same bytes, and the same size and etag told on both ways."""
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(bytes(range(256)) * 9000)
        info = store.put_file("k", source)
        assert info.size == 256 * 9000
        assert store.fetch_file("k", target) == store.stat("k") == info
        assert target.read_bytes() == source.read_bytes()

    def test_a_fetched_file_replaces_what_was_there(self, store, tmp_path):
        """Whole: the old file's other names keep the old bytes."""
        target, other = tmp_path / "out", tmp_path / "other"
        target.write_bytes(b"old and longer")
        other.hardlink_to(target)
        store.put("k", b"new")
        store.fetch_file("k", target)
        assert target.read_bytes() == b"new"
        assert other.read_bytes() == b"old and longer"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]

    def test_removing_or_replacing_local_files_leaves_the_object(self, store, tmp_path):
        """A spool may be emptied once its file was put, and a fetched file deleted."""
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(b"bytes")
        store.put_file("k", source)
        store.fetch_file("k", target)
        source.unlink()
        target.unlink()
        assert store.get("k") == b"bytes"

    def test_a_fetched_file_keeps_its_bytes_when_the_object_goes(self, store, tmp_path):
        """Neither a put nor a delete reaches what was fetched before."""
        store.put("k", b"first")
        store.fetch_file("k", tmp_path / "out")
        store.put("k", b"second")
        store.delete("k")
        assert (tmp_path / "out").read_bytes() == b"first"

    @pytest.mark.parametrize("count", [1, 3])
    def test_objects_are_spooled_in_the_order_given(self, store, tmp_path, count):
        """Into one file, whose sha256 is told with each part; what was there is replaced."""
        target = tmp_path / "out"
        target.write_bytes(b"older and longer than what comes")
        data = [b"%d" % number * 9000 for number in range(count)]
        keys = [f"inbox/{count - number}" for number in range(count)]
        parts = [store.put(key, piece) for key, piece in zip(keys, data, strict=True)]
        spooled = store.spool(keys, target)
        assert target.read_bytes() == b"".join(data)
        assert spooled.parts == parts
        assert spooled.sha256 == sha256(b"".join(data))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        store.delete(keys[0])
        with pytest.raises(ObjectMissingError, match=keys[0]):
            store.spool(keys, target)
        assert target.read_bytes() == b"".join(data)

    # Listing ----------

    def test_a_listing_is_in_key_order_and_by_prefix(self, store):
        """Order of whole keys as text, not of folders; a prefix may end within a name."""
        keys = ["a-b", "a.b", "a/b", "a/b-c", "a/b.d/e", "a0", "b/1", "b/10", "b/2", "b2/x", "z"]
        for key in reversed(keys):
            store.put(key, key.encode())
        assert [info.key for info in store.list("")] == sorted(keys)
        assert [info.key for info in store.list("a/b")] == ["a/b", "a/b-c", "a/b.d/e"]
        assert [info.key for info in store.list("b/")] == ["b/1", "b/10", "b/2"]
        assert [info.key for info in store.list("b/1")] == ["b/1", "b/10"]
        assert [info.key for info in store.list("b")] == ["b/1", "b/10", "b/2", "b2/x"]
        for prefix in ("c", "a/b/", "../", "/", "b/1/"):
            assert list(store.list(prefix)) == []

    def test_a_listing_tells_what_stat_tells(self, store):
        """Key, size and etag."""
        store.put("a/1", b"x")
        store.put("a/2", b"yy")
        assert list(store.list("a/")) == [store.stat("a/1"), store.stat("a/2")]

    # Signed URLs ----------

    def test_a_signed_url_brings_a_file(self, store, transfer, now, tmp_path):
        """Checked against its sha256, with its size; an older file there is replaced."""
        store.put("k", b"payload")
        (tmp_path / "out").write_bytes(b"older")
        url = store.sign_get("k", now() + self.soon_seconds)
        assert transfer.download(url, tmp_path / "out", sha256(b"payload")) == 7
        assert (tmp_path / "out").read_bytes() == b"payload"

    def test_other_bytes_than_expected_are_not_kept(self, store, transfer, now, tmp_path):
        """IntegrityError naming both digests; the older file is untouched, nothing is left over."""
        store.put("k", b"payload")
        (tmp_path / "out").write_bytes(b"older")
        url = store.sign_get("k", now() + self.soon_seconds)
        with pytest.raises(IntegrityError, match=sha256(b"payload")):
            transfer.download(url, tmp_path / "out", sha256(b"other"))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out").read_bytes() == b"older"

    def test_a_missing_object_is_no_download(self, store, transfer, now, tmp_path):
        """ObjectMissingError, no file."""
        url = store.sign_get("none", now() + self.soon_seconds)
        with pytest.raises(ObjectMissingError):
            transfer.download(url, tmp_path / "out", sha256(b""))
        assert list(tmp_path.iterdir()) == []

    def test_a_slice_of_a_file_is_uploaded(self, store, transfer, now, tmp_path):
        """Start and length in bytes; an upload may be repeated."""
        file = tmp_path / "delta"
        file.write_bytes(b"0123456789")
        for start, length, expected in ((0, 4, b"0123"), (8, 2, b"89"), (0, 10, b"0123456789")):
            url = store.sign_put(f"inbox/{start}", now() + self.soon_seconds, length)
            for _ in range(2):
                transfer.upload(url, file, start, length)
            assert store.get(f"inbox/{start}") == expected

    def test_a_slice_beyond_the_file_is_not_uploaded(self, store, transfer, now, tmp_path):
        """IntegrityError: half a chunk is no chunk."""
        (tmp_path / "delta").write_bytes(b"0123456789")
        url = store.sign_put("inbox/0", now() + self.soon_seconds, 4)
        with pytest.raises(IntegrityError):
            transfer.upload(url, tmp_path / "delta", 8, 4)
        assert list(store.list("")) == []

    @pytest.mark.parametrize("length", [0, 3, 5, 10])
    def test_a_url_takes_the_length_that_was_signed(self, store, transfer, now, tmp_path, length):
        """GrantError for any other: a grant for a chunk takes no more room than the chunk."""
        (tmp_path / "delta").write_bytes(b"0123456789")
        url = store.sign_put("inbox/0", now() + self.soon_seconds, 4)
        with pytest.raises(GrantError):
            transfer.upload(url, tmp_path / "delta", 0, length)
        assert list(store.list("")) == []
        transfer.upload(url, tmp_path / "delta", 0, 4)
        assert store.get("inbox/0") == b"0123"

    def test_a_url_to_create_makes_an_object_once(self, store, transfer, now, tmp_path):
        """Whoever holds it can send again, other bytes too: no error, and nothing is changed."""
        assert store.indirect == ""
        file = tmp_path / "delta"
        url = store.sign_create("k", now() + self.soon_seconds, 4)
        file.write_bytes(b"01234")
        with pytest.raises(GrantError):
            transfer.upload(url, file, 0, 5)
        for data in (b"0123", b"0123", b"abcd"):
            file.write_bytes(data)
            transfer.upload(url, file, 0, 4)
            assert store.get("k") == b"0123"
        store.delete("k")
        transfer.upload(url, file, 0, 4)
        assert store.get("k") == b"abcd"
        assert [info.key for info in store.list("")] == ["k"]

    def test_of_eight_urls_to_create_one_makes_the_object(self, store, transfer, now, tmp_path):
        """Whole, and from one of them."""
        size = 200_000
        for number in range(8):
            (tmp_path / f"{number}").write_bytes(bytes([number]) * size)

        def send(number: int) -> None:
            url = store.sign_create("k", now() + self.soon_seconds, size)
            transfer.upload(url, tmp_path / f"{number}", 0, size)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, range(8)))
        made = store.get("k")
        assert made == made[:1] * size

    @pytest.mark.parametrize("fault", ["expired", "method", "key", "expiry", "signature", "host"])
    def test_a_url_is_good_for_what_was_signed_and_nothing_else(
        self, store, transfer, now, tmp_path, fault
    ):
        """GrantError whose text repeats no URL; nothing is read and nothing written."""
        store.put("k", b"payload")
        store.put("other", b"secret")
        expires_at = now() + self.soon_seconds
        get, put = store.sign_get("k", expires_at), store.sign_put("k", expires_at, 11)
        if fault == "expired":
            get, put = store.sign_get("k", now() - 10), store.sign_put("k", now() - 10, 11)
        elif fault == "method":
            get, put = put, get
        else:
            get, put = (self.altered(url, fault) for url in (get, put))
        (tmp_path / "in").write_bytes(b"overwritten")
        for call in (
            lambda: transfer.download(get, tmp_path / "out", sha256(b"payload")),
            lambda: transfer.upload(put, tmp_path / "in", 0, 11),
        ):
            with pytest.raises(GrantError) as caught:
                call()
            for url in (get, put):
                assert url not in str(caught.value)
                assert url.rpartition("=")[2] not in str(caught.value)
            assert "ignature=" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        assert store.get("k") == b"payload"

    def altered(self, url: str, fault: str) -> str:
        """The URL with one part changed. Adapters override it for their own spelling."""
        raise NotImplementedError
