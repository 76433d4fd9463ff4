"""A hub on loopback: just enough of the Hugging Face hub's HTTP interface for its own client to fetch from and push to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_ofthetests"


@dataclass
class Repository:
    """Files by commit; ``refs``: branch or tag → commit; gated: None of it without `TOKEN`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit with these files over main's; ``names`` (and main) point to it."""
        whole = {**self.commits.get(self.refs.get("main", ""), {}), **files}
        sha = hashlib.sha1(
            repr(sorted((k, hashlib.sha256(v).hexdigest()) for k, v in whole.items())).encode()
        ).hexdigest()
        self.commits[sha] = whole
        self.refs |= dict.fromkeys(("main", *names), sha)
        return sha


class Hub:
    """What the server holds. requests: every request as (method, path, Range header); cut_after: the next file is broken off
    after so many bytes, once."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], *refs: str, kind: str = "models", gated: bool = False) -> str:
        """A repository (or one more commit of it); returns the commit."""
        found = self.repositories.setdefault(f"{kind}/{name}", Repository(gated=gated))
        return found.commit(files, *refs)


class Handler(BaseHTTPRequestHandler):
    """Routes: ``/api/…`` for repositories, trees and commits, ``/owner/name/resolve/revision/file`` for files, git LFS's batch."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlparse(self.path).path)
        hub.requests.append((method, path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in self._routes().items():
            if found := re.fullmatch(pattern, path):
                return answer(found, body)
        self._json({"error": f"no such address: {path}"}, 404)

    def _routes(self) -> dict[str, Any]:
        api = r"/api/(models|datasets)/([^/]+/[^/]+)"
        return {
            r"/api/whoami-v2": lambda m, b: self._json(
                {"name": "owner", "type": "user", "orgs": []}, 200 if self._known() else 401
            ),
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": lambda m, b: self._json({"errors": [], "warnings": []}),
            rf"{api}/preupload/(.+)": self._preupload,
            rf"{api}/commit/(.+)": self._commit,
            rf"{api}/tree/([^/]+)/?(.*)": self._tree,
            rf"{api}/paths-info/(.+)": self._paths,
            rf"{api}(?:/revision/(.+))?": self._info,
            r"/blobs/([0-9a-f]{64})": self._store,
            r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._file,
        }

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, data: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **headers})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, kind: str, name: str, revision: str | None = None) -> tuple[Repository, str] | None:
        """The repository and the commit meant; None after the refusal was sent."""
        found = self.server.hub.repositories.get(f"{kind}/{name}")
        if found is None:
            return self._json({"error": "Repository not found"}, 401, **{"X-Error-Code": "RepoNotFound"})
        if found.gated and not self._known():
            message = f"Access to {kind[:-1]} {name} is restricted. You must be authenticated to access it."
            return self._json({"error": message}, 401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        commit = found.refs.get(revision or "main", revision or "")
        if commit not in found.commits and found.commits:
            return self._json({"error": f"Invalid rev id: {revision}"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        return found, commit

    def _info(self, match: re.Match[str], body: bytes) -> None:
        kind, name, revision = match.groups()
        if found := self._repository(kind, name, revision):
            files = [{"rfilename": path} for path in found[0].commits.get(found[1], {})]
            self._json({"_id": "0", "id": name, "modelId": name, "sha": found[1], "private": False, "tags": [], "siblings": files,
                        "gated": "auto" if found[0].gated else False, "disabled": False, "downloads": 0, "likes": 0})  # fmt: skip

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _tree(self, match: re.Match[str], body: bytes) -> None:
        kind, name, revision, folder = match.groups()
        if found := self._repository(kind, name, revision):
            files = found[0].commits.get(found[1], {}).items()
            self._json([self._entry(p, c) for p, c in files if p.startswith(folder)])

    def _paths(self, match: re.Match[str], body: bytes) -> None:
        kind, name, revision = match.groups()
        if found := self._repository(kind, name, revision):
            files = found[0].commits.get(found[1], {})
            asked = (
                json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]+)", unquote(body.decode()))
            )
            self._json([self._entry(path, files[path]) for path in asked if path in files])

    def _file(self, match: re.Match[str], body: bytes) -> None:
        dataset, name, revision, path = match.groups()
        found = self._repository("datasets" if dataset else "models", name, revision)
        if found is None:
            return
        content = found[0].commits[found[1]].get(path)
        common = {"X-Repo-Commit": found[1]}
        if content is None:
            return self._json({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound", **common})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes", **common}
        start, status = 0, 200
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[start : last + 1], 206
        hub: Hub = self.server.hub
        if hub.cut_after is not None and self.command == "GET" and len(content) > hub.cut_after:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: hub.cut_after])
            hub.cut_after, self.close_connection = None, True
            return
        self._send(content, status, headers)

    def _create(self, match: re.Match[str], body: bytes) -> None:
        asked = json.loads(body)
        if not self._known():
            return self._json({"error": "Invalid username or password."}, 401)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        key = f"{asked.get('type') or 'model'}s/{name}"
        if key in self.server.hub.repositories:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.server.hub.url}/{name}"}, 409
            )
        self.server.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind=key.split("/")[0])
        self._json({"url": f"{self.server.hub.url}/{name}", "name": name, "id": "0"})

    def _preupload(self, match: re.Match[str], body: bytes) -> None:
        names = [each["path"] for each in json.loads(body)["files"]]
        large = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        modes = [{"path": n, "uploadMode": mode, "shouldIgnore": False, "oid": None} for n, mode in large.items()]
        self._json({"files": modes})

    def _batch(self, match: re.Match[str], body: bytes) -> None:
        made = [
            {**each, "actions": {"upload": {"href": f"{self.server.hub.url}/blobs/{each['oid']}"}}} for each in json.loads(body)["objects"]
        ]  # fmt: skip
        self._send(
            json.dumps({"transfer": "basic", "objects": made}).encode(),
            200,
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def _store(self, match: re.Match[str], body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == match[1]
        self.server.hub.blobs[match[1]] = body
        self._json({})

    def _commit(self, match: re.Match[str], body: bytes) -> None:
        kind, name, _ = match.groups()
        if not self._known():
            return self._json({"error": "Invalid username or password."}, 401)
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        files = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
        files |= {v["value"]["path"]: self.server.hub.blobs[v["value"]["oid"]] for v in lines if v["key"] == "lfsFile"}
        sha = self.server.hub.repositories[f"{kind}/{name}"].commit(files)
        self._json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.server.hub.url}/{name}/commit/{sha}",
                "hookOutput": "",
            }
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at ``hub.url`` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
