"""The floors of a round over the wire: the same bytes by the bare SDK and through plain sockets.

Run as a script it is one of their processes.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import numpy as np
from wire_federation import at_once, shared_out, wire_manifest
from wire_servers import process_seconds

if TYPE_CHECKING:
    from wire_servers import Servers

FLOOR_BUCKET = "bare-bytes"


def run_bare(address: str) -> None:
    """One process of the floors: does what each line of standard input says, answers each."""
    client = bare_client(*json.loads(address))
    data = b""

    def move(key: str) -> None:
        response = client.get_object(FLOOR_BUCKET, "adapter")
        for _ in response.stream(1024 * 1024):
            pass
        response.release_conn()
        client.put_object(FLOOR_BUCKET, key, io.BytesIO(data), len(data))

    def exchange(place: tuple[int, int]) -> None:
        with socket.create_connection(("127.0.0.1", place[0])) as line_:
            receive(line_, place[1])
            line_.sendall(data)
            receive(line_, 1)

    for line in sys.stdin:
        word, *rest = json.loads(line)
        match word:
            case "size":
                data = np.random.default_rng(os.getpid()).bytes(rest[0])
            case "sdk":
                at_once(move, rest)
            case "tcp":
                count, port, size = rest
                at_once(exchange, [(port, size)] * count)
        print("done", flush=True)


def bare_client(url: str, access_key: str, secret_key: str) -> Any:
    """The SDK as it comes."""
    from minio import Minio

    parts = urlsplit(url)
    secure = parts.scheme == "https"
    return Minio(parts.netloc, access_key, secret_key, secure=secure, region="us-east-1")


def receive(connection: socket.socket, size: int) -> None:
    """Take so many bytes and drop them."""
    room = memoryview(bytearray(1024 * 1024))
    while size:
        size -= connection.recv_into(room[: min(size, len(room))])


class Floor:
    """Bare processes for K participants that wait for the word; they end with the block."""

    def __init__(self, place: Servers, participants: int) -> None:
        place.store(FLOOR_BUCKET)
        count = sum(spec.elements for spec in wire_manifest().tensors)
        adapter = np.random.default_rng(1).standard_normal(count, np.float32)
        self._arrays = [adapter] * participants
        self._keys = shared_out([f"delta-{number}" for number in range(participants)])
        self._adapter_bytes = adapter.tobytes()
        address = json.dumps([place.s3_url, place.access_key, place.secret_key])
        self._workers = [
            subprocess.Popen(
                [sys.executable, __file__, address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )
            for _ in self._keys
        ]  # fmt: skip
        self._size, self._fetched = 0, b""
        self._client = bare_client(place.s3_url, place.access_key, place.secret_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()

    def cpu_seconds(self) -> float:
        """Processor seconds of the bare processes so far."""
        return sum(process_seconds(worker.pid) for worker in self._workers)

    def sizes(self, up: int, down: int | None) -> None:
        """Bytes that each process is to put from now on, and to get: None for the whole adapter."""
        self._size, self._fetched = up, self._adapter_bytes[:down]
        self._client.put_object(
            FLOOR_BUCKET, "adapter", io.BytesIO(self._fetched), len(self._fetched)
        )
        self._tell([["size", up]] * len(self._workers))

    def sdk(self) -> float:
        """Seconds of one round with the bare SDK and numpy."""
        start = time.perf_counter()
        self._tell([["sdk", *keys] for keys in self._keys])
        mean = self._arrays[0].copy()
        for array in self._arrays[1:]:
            mean += array
        mean /= np.float32(len(self._arrays))
        return time.perf_counter() - start

    def read(self) -> float:
        """Seconds of what a coordinator must do at least after ``sdk``."""
        start = time.perf_counter()
        for key in itertools.chain(*self._keys):
            response = self._client.get_object(FLOOR_BUCKET, key)
            for _ in response.stream(1024 * 1024):
                pass
            response.release_conn()
        mean = self._adapter_bytes
        self._client.put_object(FLOOR_BUCKET, "mean", io.BytesIO(mean), len(mean))
        return time.perf_counter() - start

    def tcp(self) -> float:
        """Seconds of the same bytes through plain sockets."""
        with socket.create_server(("127.0.0.1", 0), backlog=len(self._arrays)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(self._fetched)
                    receive(connection, self._size)
                    connection.sendall(b".")

            start = time.perf_counter()
            threads = [threading.Thread(target=serve) for _ in self._arrays]
            for thread in threads:
                thread.start()
            port, size = listener.getsockname()[1], len(self._fetched)
            self._tell([["tcp", len(keys), port, size] for keys in self._keys])
            for thread in threads:
                thread.join()
            return time.perf_counter() - start

    def _tell(self, words: list[list[Any]]) -> None:
        for worker, word in zip(self._workers, words, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(word) + "\n")
            worker.stdin.flush()
        for worker in self._workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "done\n":
                raise SystemExit("a process of the floor ended; see its error above")


if __name__ == "__main__":
    run_bare(sys.argv[1])
