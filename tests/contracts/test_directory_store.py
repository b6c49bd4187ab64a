"""The directory store under the contract, and what only it has: links, crashes, full disks."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from shared.errors import GrantError, StoreError, StoreUnavailableError
from shared.stores.directory import STALE_SECONDS, DirectoryStore, DirectoryTransfer
from tests.contracts.store_contract import StoreContract, sha256

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "a" / "store"


@pytest.fixture
def store(root):
    return DirectoryStore(root)


class TestDirectoryStore(StoreContract):
    """The suite, unchanged; the store lies outside the folder that the tests look into."""

    @pytest.fixture
    def store(self, tmp_path_factory):
        return DirectoryStore(tmp_path_factory.mktemp("ledger"))

    @pytest.fixture
    def transfer(self, store):
        return DirectoryTransfer(store)

    @pytest.fixture
    def now(self):
        return time.time

    def altered(self, url, fault):
        head, _, signature = url.rpartition("=")
        flipped = "0" if signature[-1] != "0" else "1"
        return {
            "key": url.replace(":///k?", ":///other?"),
            "expiry": url.replace("expires=", "expires=9"),
            "signature": f"{head}={signature[:-1]}{flipped}",
            "host": url.replace(":///", "://elsewhere/"),
        }[fault]


def leftovers(root: Path) -> list[Path]:
    """Temporary files in the store."""
    return list((root / ".tmp").iterdir())


# Opening ----------


def test_a_missing_root_is_made(root):
    """With its parents, and usable at once."""
    assert DirectoryStore(root).put("k", b"x").size == 1


def test_a_missing_root_is_an_error_where_a_store_must_be(root):
    """``create=False`` is for commands that read a run: a wrong path is said, not made."""
    with pytest.raises(StoreError, match=f"no store at {root}; check --store"):
        DirectoryStore(root, create=False)
    assert not root.exists()
    DirectoryStore(root)
    DirectoryStore(root, create=False)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_root_that_is_a_file_is_refused(tmp_path, below):
    """StoreError naming the path at once, not at the first write."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        DirectoryStore(tmp_path / "file" / below)


def test_objects_outlive_the_store_object(root, store):
    """Another process opens the same directory and sees the same objects and etags."""
    info = store.put("a/b", b"x")
    assert list(DirectoryStore(root).list("")) == [info]


def test_old_leftovers_of_dead_processes_are_removed(root, store):
    """Older than an hour and its process gone: removed. Younger, or process alive: kept."""
    process = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        check=True,
        text=True,
    )
    dead = root / ".tmp" / f"{process.stdout.strip()}-0123"
    alive = root / ".tmp" / f"{os.getpid()}-0123"
    for path in (dead, alive):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))  # an old mtime proves nothing: a link keeps its source's
    DirectoryStore(root)
    assert sorted(leftovers(root)) == sorted([dead, alive])
    DirectoryStore(root, lambda: time.time() + STALE_SECONDS + 60)
    assert leftovers(root) == [alive]


# Keys ----------


def test_the_temporary_folder_is_no_part_of_the_store(root, store):
    """Not listed, not readable, not writable by key."""
    store.put("k", b"x")
    (root / ".tmp" / "1-x").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["k"]
    assert list(store.list(".tmp/")) == []
    for call in (lambda: store.get(".tmp/1-x"), lambda: store.put(".tmp/y", b"")):
        with pytest.raises(StoreError, match="tmp"):
            call()


def test_files_that_cannot_be_objects_are_not_listed(root, store):
    """A file browser's droppings do not break a listing."""
    store.put("k", b"x")
    (root / "lost+found").mkdir()
    (root / "a b").write_bytes(b"")
    assert [info.key for info in store.list("")] == ["k"]


def test_a_key_cannot_lie_below_an_object(store):
    """A directory's limit, said as a StoreError; neither object is harmed."""
    store.put("a", b"x")
    store.put("b/c", b"y")
    for call in (
        lambda: store.put("a/b", b""),
        lambda: store.put("b", b""),
        lambda: store.create("a/b", b""),
    ):
        with pytest.raises(StoreError):
            call()
    assert (store.get("a"), store.get("b/c")) == (b"x", b"y")


# Etags and links ----------


def test_writing_the_same_bytes_again_changes_the_etag_each_time(store):
    """A hundred rewrites within few ticks of the kernel's clock, inodes reused: as many etags."""
    assert len({store.put("k", b"same").etag for _ in range(100)}) == 100


def test_a_write_has_a_stamp_of_its_own(root, store, tmp_path, monkeypatch):
    """Older kernels stamp files every few milliseconds only: the store does not rely on them."""
    (tmp_path / "in").write_bytes(b"x")
    writes = (lambda: store.put("k", b"x"), lambda: store.put_file("k", tmp_path / "in"))
    for moment, write in enumerate(writes, start=10**18 + 1):
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        write()
        assert (root / "k").stat().st_mtime_ns == moment


def test_links_stand_in_for_copies(root, store, tmp_path):
    """One inode for the file that was put, the object, and the spooled file that is put again."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"bytes")
    part = store.put_file("part", source)
    store.spool(["part"], target)
    store.put_file("whole", target)
    assert len({p.stat().st_ino for p in (source, target, root / "part", root / "whole")}) == 1
    assert store.stat("part") == part


def test_a_copy_is_told_of_as_the_object_it_was_made_of(elsewhere, tmp_path):
    """Also on another file system, where a spooled file is no link."""
    store = DirectoryStore(elsewhere)
    infos = [store.put(key, bytes(9)) for key in ("a", "b")]
    assert store.fetch_file("a", tmp_path / "out") == infos[0]
    for count in (1, 2):
        spooled = store.spool(["a", "b"][:count], tmp_path / "spooled")
        assert spooled.parts == infos[:count]
        assert spooled.sha256 == hashlib.sha256(bytes(9 * count)).hexdigest()


def test_a_fetched_file_is_the_callers_own(root, store, tmp_path):
    """Mode 0644 and no link: it may be written into."""
    store.put("k", b"bytes")
    store.fetch_file("k", tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o644
    (tmp_path / "out").write_bytes(b"other")
    assert store.get("k") == b"bytes"


def test_stored_files_are_read_only(root, store, tmp_path):
    """Mode 0444 however they came; a linked source becomes read-only too, as documented."""
    (tmp_path / "in").write_bytes(b"bytes")
    store.put("a", b"x")
    store.put_file("b", tmp_path / "in")
    store.create("c", b"x")
    for path in (*(root / key for key in "abc"), tmp_path / "in"):
        assert path.stat().st_mode & 0o777 == 0o444


def test_a_writable_file_with_other_names_is_copied(root, store, tmp_path):
    """Somebody may write through the other name; the object must not change."""
    source, other = tmp_path / "in", tmp_path / "other"
    source.write_bytes(b"bytes")
    other.hardlink_to(source)
    store.put_file("k", source)
    other.write_bytes(b"later")
    assert store.get("k") == b"bytes"
    assert other.stat().st_mode & 0o200


def test_a_symbolic_link_is_put_as_the_file_it_leads_to(root, store, tmp_path):
    """The object is a file of its own name."""
    (tmp_path / "in").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("in")
    store.put_file("k", tmp_path / "link")
    assert not (root / "k").is_symlink()
    assert store.get("k") == b"bytes"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_without_links_bytes_are_copied(root, store, tmp_path, monkeypatch, code):
    """Another file system, or one without links: same result, inodes of its own."""
    fired = []

    def refuse(*_args: object, **_kwargs: object) -> None:
        fired.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "in").write_bytes(b"bytes")
    store.put_file("k", tmp_path / "in")
    store.spool(["k"], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"bytes"
    assert len({p.stat().st_ino for p in (tmp_path / "in", root / "k", tmp_path / "out")}) == 3
    assert len(fired) == 2
    assert leftovers(root) == []


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_only_a_file_can_be_put(store, tmp_path, what):
    """StoreError naming the local path."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=str(tmp_path / what)):
        store.put_file("k", tmp_path / what)
    assert list(store.list("")) == []


def test_an_open_reader_sees_the_object_it_opened(store):
    """A put while reading changes nothing for who reads."""
    store.put("k", b"first")
    with store.open("k") as file:
        store.put("k", b"second")
        store.delete("k")
        assert file.read() == b"first"


def test_a_stream_that_fails_writes_nothing(root, store):
    """The old object stays, no temporary file is left."""
    store.put("k", b"old")

    def stream():
        yield b"half"
        raise StoreError("the source broke")

    with pytest.raises(StoreError, match="the source broke"):
        store.write("k", stream())
    assert store.get("k") == b"old"
    assert leftovers(root) == []


# Signed URLs ----------


def test_a_url_expires_at_its_moment(root):
    """Good until just before, refused at the moment itself; time is told."""
    now = [1000.0]
    store = DirectoryStore(root, lambda: now[0])
    url = store.sign_get("k", 1010.0)
    now[0] = 1009.999
    assert store.granted_key(url, "GET") == "k"
    now[0] = 1010.0
    with pytest.raises(GrantError, match="expired 0 s ago"):
        store.granted_key(url, "GET")


@pytest.mark.parametrize(
    "alter",
    [
        lambda url: "",
        lambda url: url + "&more=1",
        lambda url: url + "#x",
        lambda url: url + "\n",
        lambda url: url.upper(),
        lambda url: url.replace("expires=", "expires=0"),
        lambda url: url.replace("method=GET", "method=PUT"),
        lambda url: url.replace(":///k", ":///./k"),
        lambda url: url.replace("&expires", "&method=GET&expires"),
        lambda url: url.partition("&signature")[0],
        lambda url: "http" + url.removeprefix("gradualdiff-dir"),
    ],
)
def test_a_url_has_one_spelling(store, alter):
    """Anything but the very text that was signed is altered, whatever a URL parser thinks of it."""
    url = store.sign_get("k", time.time() + 60)
    assert store.granted_key(url, "GET") == "k"
    with pytest.raises(GrantError, match="altered"):
        store.granted_key(alter(url), "GET")


def test_a_url_of_another_opening_is_refused(root, store):
    """The secret lives in one store object: after a restart sites ask for new URLs."""
    url = store.sign_get("k", time.time() + 60)
    with pytest.raises(GrantError):
        DirectoryStore(root).granted_key(url, "GET")


def test_a_downloaded_file_is_no_link_into_the_ledger(root, store, tmp_path):
    """A site that writes into its copy changes nothing but its copy."""
    store.put("k", b"bytes")
    url = store.sign_get("k", time.time() + 60)
    DirectoryTransfer(store).download(url, tmp_path / "out", sha256(b"bytes"))
    assert (tmp_path / "out").stat().st_ino != (root / "k").stat().st_ino


# Full, read-only, torn ----------

MS_RDONLY, MS_REMOUNT = 1, 32


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB with a store of one object; yields its root and a remount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(flags: int) -> int:
        done: int = libc.mount(b"tmpfs", bytes(disk), b"tmpfs", flags, b"size=1m")
        return done

    if mount(0) != 0:
        pytest.skip(f"may not mount here: {os.strerror(ctypes.get_errno())}")
    try:
        yield disk, lambda: mount(MS_REMOUNT | MS_RDONLY)
    finally:
        libc.umount2(bytes(disk), 2)


def writes(store: DirectoryStore, folder: Path):
    """Every way to write 2 MiB; name and call."""
    (folder / "large").write_bytes(bytes(2 << 20))
    url = store.sign_put("k", time.time() + 60, 2 << 20)
    return {
        "put": lambda: store.put("k", bytes(2 << 20)),
        "create": lambda: store.create("k2", bytes(2 << 20)),
        "put_file": lambda: store.put_file("k", folder / "large"),
        "upload": lambda: DirectoryTransfer(store).upload(url, folder / "large", 0, 2 << 20),
    }


@pytest.mark.parametrize("way", ["put", "create", "put_file", "upload"])
def test_a_full_disk_leaves_the_old_object_and_no_rubbish(small_disk, tmp_path, way):
    """StoreUnavailableError naming the path and what to do; writing goes on once there is room."""
    disk, _ = small_disk
    store = DirectoryStore(disk)
    old = store.put("k", bytes(300_000))
    with pytest.raises(StoreUnavailableError, match=rf"{disk}/k.*disk is full; free space"):
        writes(store, tmp_path)[way]()
    assert store.stat("k") == old
    assert [info.key for info in store.list("")] == ["k"]
    assert leftovers(disk) == []
    store.put("more", bytes(300_000))


@pytest.mark.parametrize("way", ["put", "create", "put_file", "upload"])
def test_a_read_only_disk_can_still_be_read(small_disk, tmp_path, way):
    """StoreUnavailableError naming path and remedy from each write; reading goes on."""
    disk, make_read_only = small_disk
    store = DirectoryStore(disk)
    old = store.put("k", b"bytes")
    assert make_read_only() == 0
    with pytest.raises(StoreUnavailableError, match=rf"{disk}/k.*read-only; mount it writable"):
        writes(store, tmp_path)[way]()
    with pytest.raises(StoreUnavailableError, match=rf"{disk}/k.*read-only"):
        store.delete("k")
    assert (store.get("k"), list(store.list(""))) == (b"bytes", [old])
    with pytest.raises(StoreUnavailableError, match=f"{disk}.*read-only"):
        DirectoryStore(disk)


def test_a_full_local_disk_fails_a_download(small_disk, tmp_path):
    """The site's own disk is named, not the store's; what was there stays."""
    disk, _ = small_disk
    store = DirectoryStore(tmp_path / "store")
    store.put("k", bytes(2 << 20))
    (disk / "out").write_bytes(b"older")
    url = store.sign_get("k", time.time() + 60)
    for call in (
        lambda: DirectoryTransfer(store).download(url, disk / "out", sha256(bytes(2 << 20))),
        lambda: store.fetch_file("k", disk / "out"),
    ):
        with pytest.raises(StoreUnavailableError, match=rf"{disk}/out.*disk is full"):
            call()
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert (disk / "out").read_bytes() == b"older"


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT]
)
def test_trouble_of_the_disk_is_retryable_and_says_what_to_do(root, store, monkeypatch, code):
    """StoreUnavailableError for each of the errors that somebody can mend, from the fsync too."""
    fired = []

    def fail(_handle: int) -> None:
        fired.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreUnavailableError, match=rf"{root}/k: \w+.*;") as caught:
        store.put("k", b"x")
    assert caught.value.retryable
    assert fired
    assert leftovers(root) == []
    monkeypatch.undo()
    assert list(store.list("")) == []


WRITER = """
import sys
from pathlib import Path
from shared.stores.directory import DirectoryStore
store = DirectoryStore(Path(sys.argv[1]))
for number in range(200):
    data = str(number % 10).encode() * 200_000
    (store.put if number % 2 else store.create)(f"k/{number:03d}", data)
    store.put("again", data)
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [3, 20, 57])
def test_a_killed_writer_leaves_only_whole_objects(root, after):
    """SIGKILL amid 400 writes: what was reported is there, what is there is whole."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        for _ in range(after):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        reported = after + len(writer.stdout.read().split())
    assert writer.wait() == -signal.SIGKILL
    store = DirectoryStore(root)
    found = [info.key for info in store.list("k/")]
    assert reported <= len(found) <= reported + 1
    assert len(found) < 200
    for key in (*found, "again"):
        data = store.get(key)
        assert len(data) == 200_000
        assert len(set(data)) == 1
