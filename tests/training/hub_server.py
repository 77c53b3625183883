"""The few routes of a model hub that fetching a snapshot uses, on this machine alone."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "a" * 40, "older": "b" * 40}


@dataclass
class Hub:
    """Repositories by id, each a mapping of file names to bytes; every branch holds the same files."""

    repositories: dict[str, dict[str, bytes]]
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    """Files that were asked for."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path, _, _ = self.path.partition("?")
            status, headers, data = _route(hub, path, body)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _route(hub: Hub, path: str, body: bool) -> tuple[int, dict[str, str], bytes]:
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        repository, what, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", parts[-1]
        if repository not in hub.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = COMMITS.get(revision, revision)
        if what == "revision" and commit not in COMMITS.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = hub.repositories[repository]
        told: object = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        if what == "tree":
            told = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
    if len(parts) < 5 or parts[2] != "resolve":
        return 404, {}, b""
    repository, commit, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
    data = hub.repositories.get(repository, {}).get(name)
    if data is None:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    if body:
        hub.fetched.append(name)
    return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data
