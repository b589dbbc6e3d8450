"""Real servers on 127.0.0.1 for tests: nginx, one for HTTP that can misbehave further, and an S3 store (moto)."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FolderServer(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges, and fails as asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.ranges = True
        self.etags: bool | str = True
        """Name the version of each file; `If-Range` is obeyed unless this is "stubborn"."""
        self.drop_after: int | None = None
        """Cut each connection after so many bytes of a body."""
        self.unavailable = 0
        """Answer 503 to so many requests."""
        self.refuse: dict[str, int] = {}
        """Path -> status."""
        self.start_page = b""
        """Answer 200 with this page where there is no such file, as hosts of web applications do."""
        self.refuse_all = 0
        """Answer this status to everything."""
        self.before_body: Any = None
        """Called with the path before a body is sent."""
        self.in_the_middle: Any = None
        """Called with the path when half of a body is sent."""
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, path, range)"""
        self.authorizations: set[str | None] = set()
        self.sent: Counter[str] = Counter()
        """Bytes of bodies by path."""
        self.connections = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, name = self.server, self.path.lstrip("/")
        asked = self.headers.get("Range")
        server.authorizations.add(self.headers.get("Authorization"))
        server.requests.append((self.command, name, asked))
        file = server.folder / name
        if server.unavailable > 0:
            server.unavailable -= 1
            return self._status(503)
        if server.refuse_all:
            return self._status(server.refuse_all)
        there = file.is_file()
        if name in server.refuse or not (there or server.start_page):
            return self._status(server.refuse.get(name, 404))
        data = file.read_bytes() if there else server.start_page
        version = f'"{hashlib.md5(data).hexdigest()}"'
        if server.etags is True and self.headers.get("If-Range", version) != version:
            asked = None
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and server.ranges else 0
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        if server.etags:
            self.send_header("ETag", version)
        self.end_headers()
        if body:
            self._send(name, data[start:])

    def _send(self, name: str, data: bytes) -> None:
        if self.server.before_body:
            self.server.before_body(name)
        short = self.server.drop_after is not None and len(data) > self.server.drop_after
        data = data[: self.server.drop_after] if short else data
        self.server.sent[name] += len(data)
        if self.server.in_the_middle:
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.server.in_the_middle(name)
            data = data[half:]
        self.wfile.write(data)
        if short:
            self.close_connection = True

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[FolderServer]:
    with FolderServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def s3_store(monkeypatch: Any, bucket: str) -> Iterator[str]:
    """An S3 server (moto) with an empty bucket; the AWS variables of this process point to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "ENDPOINT_URL": url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield url
    finally:
        server.stop()


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
NGINX_CONFIG = """
daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;
events {{ }}
http {{
    access_log off; root {folder};
    client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy; fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi; scgi_temp_path {scratch}/scgi;
    gzip on; gzip_types *; gzip_min_length 0;
    server {{
        listen 127.0.0.1:{port};
        location /plain/ {{ alias {folder}/; }}
        location /whole/ {{ alias {folder}/; max_ranges 0; }}
        location /slow/ {{ alias {folder}/; limit_rate 2000k; }}
        location /busy/ {{ alias {folder}/; if (-f {scratch}/busy) {{ return 503; }} }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /plain/$1 redirect; }}
        location /secret/ {{ deny all; }}
    }}
}}
"""


class Nginx:
    """nginx over a folder, whose files come plain, whole (no ranges), slow, busy (503), moved (302) or not (secret)."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.busy = scratch / "busy"
        """While this file exists, /busy/ answers 503."""
        self._port, self._config = port, scratch / "nginx.conf"
        self._config.write_text(NGINX_CONFIG.format(scratch=scratch, folder=folder, port=port))
        self.start()

    def start(self) -> None:
        assert NGINX is not None
        self._process = subprocess.Popen([NGINX, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, "nginx does not start"
                time.sleep(0.02)

    def kill(self) -> None:
        """At once, in the middle of whatever it sends."""
        self._process.kill()
        self._process.wait()


@contextmanager
def nginx(folder: Path, scratch: Path) -> Iterator[Nginx]:
    server = Nginx(folder, scratch)
    try:
        yield server
    finally:
        server.kill()
