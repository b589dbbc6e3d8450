"""A stand-in for the few endpoints of the Hugging Face hub that publishing and reading use; it is not the hub.

It keeps one data set repository in memory and speaks Git LFS over HTTP, not Xet.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LFS = re.compile(r"\.(parquet|tar)$")


class HubStandIn(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.exists = False
        self.files: dict[str, bytes] = {}
        """What was committed."""
        self.objects: dict[str, bytes] = {}
        """Large files that were sent, by SHA-256."""
        self.commits: list[list[str]] = []
        self.objects_left = 10**9
        """Refuse to store more large files than this."""
        self.rotten = False
        """Commit other bytes than were sent."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path.startswith("/lfs/"):
            return self._answer(200, hub.objects[path.removeprefix("/lfs/")])
        if not hub.exists:
            return self._refuse(404, "RepoNotFound")
        if path == "/api/datasets/org/name":
            return self._json({"id": "org/name", "sha": "0" * 40})
        if path.startswith("/api/datasets/org/name/tree/main"):
            folder = path.removeprefix("/api/datasets/org/name/tree/main").strip("/")
            below = [name for name in sorted(hub.files) if name.startswith(f"{folder}/" if folder else "")]
            return (
                self._json([_entry(name, hub.files[name]) for name in below])
                if below or not folder
                else (self._refuse(404, "EntryNotFound"))
            )
        name = path.removeprefix("/datasets/org/name/resolve/main/")
        if name not in hub.files:
            return self._refuse(404, "EntryNotFound")
        if LFS.search(name):
            return self._answer(302, b"", Location=f"{hub.url}/lfs/{hashlib.sha256(hub.files[name]).hexdigest()}")
        self._answer(200, hub.files[name])

    def do_PUT(self) -> None:
        data = self._body()
        if not self.server.objects_left:
            return self._refuse(507, "Full")
        self.server.objects_left -= 1
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, b"")

    def do_POST(self) -> None:
        hub, path, body = self.server, urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            hub.exists = True
            return self._json({"url": f"{hub.url}/datasets/org/name"})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [self._mode(name) for name in names]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._instructions(item) for item in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        assert path.endswith("/commit/main"), path
        names = []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]] + (b"?" if hub.rotten else b"")
                names.append(value["path"])
            elif item["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
                names.append(value["path"])
            elif item["key"] == "deletedFile":
                del hub.files[value["path"]]
                names.append(f"-{value['path']}")
        hub.commits.append(names)
        self._json({"commitUrl": f"{hub.url}/datasets/org/name/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _mode(self, name: str) -> dict[str, Any]:
        there = _entry(name, self.server.files[name]) if name in self.server.files else {}
        oid = there.get("lfs", there).get("oid")
        mode = "lfs" if LFS.search(name) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _instructions(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.server.objects:
            return item
        return item | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", **{"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        start = 0
        asked = self.headers.get("Range")
        if status == 200 and asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:])

    def log_message(self, *arguments: Any) -> None:
        pass


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if LFS.search(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def stand_in_hub(monkeypatch: Any, token: str = TOKEN) -> Iterator[HubStandIn]:
    """HF_ENDPOINT points to it, and a token is set; Xet, which needs servers of its own, is off."""
    import huggingface_hub.constants

    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            huggingface_hub.close_session()
            hub.shutdown()
            thread.join()
