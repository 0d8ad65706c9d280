"""Hugging Face's API as its own client asks it, on loopback: repositories, files, large files, commits, downloads.

Written from the requests of huggingface_hub 2.4; nothing of the hub's own code is here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_writes"
LARGE = (".safetensors", ".onnx")


@dataclass
class Repository:
    """One model's repository: its files, its commits, and who sees it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)

    def info(self, name: str) -> dict[str, Any]:
        siblings = [{"rfilename": each} for each in sorted(self.files)]
        return {"id": name, "modelId": name, "private": self.private, "sha": self.commits[-1], "siblings": siblings}


class Hub:
    """What the server holds, and all that it was asked, as (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}  # part of a path -> status, X-Error-Code
        self.cards: list[str] = []
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any] | bytes, dict[str, str]]:
        """Status, body and headers; the token was looked at before."""
        match [urllib.parse.unquote(part) for part in path.strip("/").split("/")]:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                if name in self.repositories:
                    return 409, {"error": "there is one already", "url": f"{self.address}/{name}"}, {}
                private = asked.get("private", asked.get("visibility") == "private")
                self.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
                return 200, {"url": f"{self.address}/{name}"}, {}
            case ["api", "validate-yaml"]:
                self.cards.append(json.loads(body)["content"])
                return 200, {"errors": [], "warnings": []}, {}
            case ["api", "models", owner, name, *rest]:
                full = f"{owner}/{name}"
                if full not in self.repositories:
                    return 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"}
                return self._model(full, self.repositories[full], rest, body)
            case [owner, git, "info", "lfs", "objects", "batch"] if git.endswith(".git"):
                objects = json.loads(body)["objects"]
                href = f"{self.address}/upload/{owner}"
                for each in objects:
                    each["actions"] = {"upload": {"href": f"{href}/{each['oid']}"}}
                return 200, {"transfer": "basic", "objects": objects}, {}
            case ["upload", _, oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return 400, {"error": "other bytes"}, {}
                self.large[oid] = body
                return 200, b"", {}
            case [owner, name, "resolve", _, *parts]:
                kept = self.repositories[f"{owner}/{name}"]
                content = kept.files.get("/".join(parts))
                if content is None:
                    return 404, b"", {"X-Error-Code": "EntryNotFound"}
                tag = hashlib.sha256(content).hexdigest()
                return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": kept.commits[-1]}
        return 404, {"error": "no"}, {}

    def _model(
        self, name: str, kept: Repository, rest: list[str], body: bytes
    ) -> tuple[int, dict[str, Any] | bytes | list[Any], dict[str, str]]:
        match rest:
            case [] | ["revision", _]:
                return 200, kept.info(name), {}
            case ["tree", _, *_]:
                tree = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in sorted(kept.files.items())
                ]
                return 200, tree, {}
            case ["preupload", _]:
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                return 200, {"files": files}, {}
            case ["commit", _]:
                return self._commit(name, kept, [json.loads(line) for line in body.splitlines() if line])
        return 404, {"error": "no"}, {}

    def _commit(
        self, name: str, kept: Repository, lines: list[dict[str, Any]]
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        files, values = dict(kept.files), [(line["key"], line["value"]) for line in lines]
        header = values[0][1]
        if header.get("parentCommit") not in (None, kept.commits[-1]):
            return 412, {"error": "changed"}, {}
        for key, value in values[1:]:
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        kept.files = files
        kept.messages.append(header["summary"])
        kept.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
        oid = kept.commits[-1]
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}"}, {}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """The hub on a free port of loopback; ``address`` is what HF_ENDPOINT takes."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _do(self) -> None:
            path = urllib.parse.urlsplit(self.path).path
            hub.asked.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            refused = next((row for part, row in hub.refuse.items() if part in path), None)
            public = path.startswith("/upload/") or path == "/api/validate-yaml"
            status: int
            content: Any
            headers: dict[str, str]
            if refused is not None:
                status, content, headers = refused[0], {"error": "no"}, {"X-Error-Code": refused[1]}
            elif not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, content, headers = 401, {"error": "no"}, {}
            else:
                status, content, headers = hub.answer(self.command, path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value) if value else None
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _do

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
