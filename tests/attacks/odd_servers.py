"""Servers that do not answer as they should, over real sockets: each is what is sent to whoever connects."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OK = b"HTTP/1.1 200 OK\r\n"
Answer = Callable[[socket.socket], None]


def says(data: bytes) -> Answer:
    return lambda connection: connection.sendall(data)


def without_end(head: bytes, chunk: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(chunk)

    return answer


CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"
ODD: dict[str, tuple[Answer, str]] = {
    "only a body, as HTTP/0.9 has it": (says(b"hello\r\n"), "does not answer in HTTP"),
    "another protocol": (says(b"SSH-2.0-OpenSSH_9.2\r\n"), "does not answer in HTTP"),
    "an unknown version": (says(b"HTTP/7.0 200 OK\r\n\r\n"), "does not answer in HTTP"),
    "a status that is none": (says(b"HTTP/1.1 abc\r\n\r\n"), "does not answer in HTTP"),
    "status 999": (says(b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n"), r"refused \(999\)"),
    "status 600": (says(b"HTTP/1.1 600 No\r\nContent-Length: 0\r\n\r\n"), r"refused \(600\)"),
    "not implemented": (says(b"HTTP/1.1 501 No\r\nContent-Length: 0\r\n\r\n"), r"refused \(501\)"),
    "two lengths": (says(OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nhello"), "Content-Length"),
    "a line without end": (says(OK + b"X: " + b"y" * 200_000), "does not answer in HTTP"),
    "headers without end": (without_end(OK, b"X: y\r\n"), "does not answer in HTTP"),
    "a chunk that is none": (says(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "manifest.json"),
    "compressed": (says(OK + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"), "compressed"),
    "other bytes than asked for": (says(b"HTTP/1.1 206 P\r\nContent-Length: 1\r\n\r\nx"), "the server sent others"),
    "a 404 without end": (without_end(b"HTTP/1.1 404 No\r\n\r\n", b"x" * 65536), "no manifest"),
    "a 404 in chunks without end": (
        without_end(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNK),
        "no manifest",
    ),
    "a 404 with a length that never comes": (says(b"HTTP/1.1 404 No\r\nContent-Length: 999\r\n\r\n"), "no manifest"),
    "a 403 without end": (without_end(b"HTTP/1.1 403 No\r\n\r\n", b"x" * 65536), "access denied"),
    "a redirect without end": (
        without_end(b"HTTP/1.1 302 F\r\nLocation: /x\r\n\r\n", b"x" * 65536),
        "redirects more than 3 times",
    ),
    "a redirect to a file": (says(b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\n\r\n"), "is not HTTP"),
    "a redirect to nowhere": (says(b"HTTP/1.1 302 F\r\nLocation: http://:x/\r\n\r\n"), "http"),
}
"""By name: the answer, and what the error says."""


class OddServer:
    def __init__(self, answer: Answer, certificate: Path | None = None) -> None:
        self.connections = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._tls = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True) as talking:
                talking.recv(65536)
                self._answer(talking)
                # Whoever asks for more than came waits here, and may ask again.
                while talking.recv(65536):
                    self._answer(talking)
        except OSError:
            # The other side has heard enough.
            pass

    def close(self) -> None:
        # Closing alone would leave the thread in `accept`.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def odd_server(answer: Answer, certificate: Path | None = None) -> Iterator[OddServer]:
    server = OddServer(answer, certificate)
    try:
        yield server
    finally:
        server.close()


def self_signed(folder: Path) -> Path:
    """A certificate that nobody vouches for, with its key."""
    both = folder / "both.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    alternative = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *alternative, "-keyout", folder / "key.pem", "-out", both], check=True, capture_output=True)
    both.write_text(both.read_text() + (folder / "key.pem").read_text())
    return both


def trickles(head: bytes, seconds: float) -> Answer:
    """The head of an answer at once, and then a byte now and then, without end."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            time.sleep(seconds)
            connection.sendall(b"x")

    return answer
