"""A Redis server that a test can stop and start, and one that breaks off in the middle."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARY = shutil.which("redis-server")


class RedisServer:
    """Debian's redis-server on a port and a socket of its own, keeping nothing on disk."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nq-redis-"))  # a socket's path must be short
        self.unix = f"unix://{self.folder}/socket?db=0"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert BINARY is not None
        settings = {
            "port": self._port, "bind": "127.0.0.1", "unixsocket": f"{self.folder}/socket",
            "save": "", "appendonly": "no", "dir": self.folder, "daemonize": "no",
        }  # fmt: skip
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen([BINARY, *words], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < end, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGKILL: nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as client:
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)


class HalfAnswers:
    """A server that says yes to everything, but breaks off in the middle of any value.

    Args:
        hang: do not close the connection then, but say nothing more.
    """

    def __init__(self, hang: bool = False) -> None:
        self._hang = hang
        self._done = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            thread = threading.Thread(target=self._answer, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            while words := client.recv(65536):
                if b"MGET" in words or b"GETRANGE" in words:
                    client.sendall(b"+OK\r\n+QUEUED\r\n*1\r\n*1\r\n$1000000\r\n" + bytes(1000))
                    if self._hang:
                        self._done.wait(30)
                    return
                client.sendall(b"+OK\r\n" * words.count(b"*"))

    def __enter__(self) -> HalfAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


@contextmanager
def running() -> Iterator[RedisServer]:
    """A server for a test, which is skipped where pip could not have installed the program."""
    if BINARY is None:
        pytest.skip("redis-server, a program and no Python package, is not installed")
    with RedisServer() as server:
        yield server
