"""What another user of the same machine reaches: files, and ports on loopback. Needs root, to be somebody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from attacks import ours
from fedvfm.runtime import processes

NOBODY = 65534
# Root becomes the other user once all is imported: he need not be able to read this Python, or fedvfm.
_AS_NOBODY = """
import encodings.idna, http.client, json, os, ssl, sys
asked = json.load(sys.stdin)
os.setgroups([])
os.setgid(asked["user"])
os.setuid(asked["user"])
found = {"uid": os.getuid(), "read": [], "http": {}}
for path in asked["paths"]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
        found["read"].append(path)
    except OSError:
        pass
for name, (secure, port, method, route) in asked["http"].items():
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    more = {"context": ssl._create_unverified_context()} if secure else {}
    try:
        wire = kind("127.0.0.1", port, timeout=60, **more)
        wire.request(method, route, b"", {"content-type": "application/protobuf"})
        found["http"][name] = str(wire.getresponse().status)
    except OSError as error:
        found["http"][name] = type(error).__name__
print(json.dumps(found))
"""


def supernode_port(folder: Path) -> int:
    """On which port of the loopback a hospital's SuperNode listens; everybody can read its arguments."""
    pid = processes.running(processes.pid_path(folder / "run", "supernode"))
    words = psutil.Process(pid).cmdline()
    return int(words[words.index("--port") + 1])


def asked(fed: ours.Federation) -> dict[str, Any]:
    """Everything another user could try at both ends."""
    server, site = fed.link.port, supernode_port(fed.sites["east"].folder)
    routes = {
        "Control: list nodes": (True, server, "POST", "/v1/control/list-nodes"),
        "Control: register a node": (True, server, "POST", "/v1/control/register-node"),
        "Control: start a run": (True, server, "POST", "/v1/control/start-run"),
        "Control: stop a run": (True, server, "POST", "/v1/control/stop-run"),
        "Runtime: take the ServerApp's task": (True, server, "POST", "/v1/runtime/acquire-task"),
        "Runtime: pull messages": (True, server, "POST", "/v1/runtime/pull-messages"),
        "Fleet: pull messages": (True, server, "POST", "/v1/fleet/pull-messages"),
        "documentation": (True, server, "GET", "/openapi.json"),
        "health": (True, server, "GET", "/health"),
        "site, Runtime: take a task": (False, site, "POST", "/v1/runtime/acquire-task"),
        "site, Runtime: pull a task's input": (False, site, "POST", "/v1/runtime/pull-task-input"),
        "site, Runtime: push an answer": (False, site, "POST", "/v1/runtime/push-messages"),
    }
    return {"user": NOBODY, "paths": [str(path) for path in private(fed)], "http": routes}


def private(fed: ours.Federation) -> list[Path]:
    """Every file and folder of both ends' state."""
    folders = [fed.server.folder, *(fed.sites[name].folder for name in ours.HONEST)]
    return [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]


def attempt(fed: ours.Federation) -> dict[str, Any]:
    """What nobody got: files read, and the status of every request."""
    if os.getuid() != 0:
        raise PermissionError("only root can become another user")
    answer = subprocess.run(
        [sys.executable, "-I", "-c", _AS_NOBODY],
        input=json.dumps(asked(fed)),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
        check=True,
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def open_to_others(fed: ours.Federation) -> list[str]:
    """Files that are not 0600 and folders that are not 0700 in the state of both ends."""
    wrong = []
    for path in private(fed):
        if path.is_symlink() or path.is_socket():
            continue
        mode = path.stat().st_mode & 0o777
        if mode != (0o700 if path.is_dir() else 0o600):
            wrong.append(f"{path.relative_to(fed.folder)} {mode:04o}")
    return wrong


def told_secrets(fed: ours.Federation) -> list[str]:
    """Secrets that stand in an argument of any process seen, or in a log, journal or audit log."""
    texts = {f"arguments: {line[:80]}": line.encode() for line in fed.arguments}
    for path in fed.folder.rglob("*"):
        if path.suffix in (".log", ".jsonl", ".txt", ".1") and path.is_file():
            texts[str(path.relative_to(fed.folder))] = path.read_bytes()
    return [
        f"{Path(secret).name} in {where}"
        for secret, value in fed.secrets.items()
        for where, text in texts.items()
        if value in text
    ]
