"""App bundles in Flower's format, with code in them that leaves a canary where it runs."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

_PROJECT = """\
[project]
name = "bundle"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"
[tool.flwr.app.config]
"""
CANARY = "from pathlib import Path\nPath({path!r}).write_text('the code of a stranger ran here')\n"
_SERVER = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
import time
app = ServerApp()

@app.main()
def main(grid, context):
    until = time.monotonic() + 600
    while time.monotonic() < until and not list(grid.get_node_ids()):
        time.sleep(0.5)
    asked = [Message(RecordDict({"a": ConfigRecord({"x": 1})}), node, "train") for node in grid.get_node_ids()]
    list(grid.send_and_receive(asked, timeout=60))
"""
_CLIENT = """
import fedvfm
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


def make(files: dict[str, str], server: str, client: str) -> bytes:
    """A bundle of these files."""
    every = {**files, "pyproject.toml": _PROJECT.format(server=server, client=client)}
    rows = [f"{name},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text)}" for name, text in every.items()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as bundle:
        for name, text in (*sorted(every.items()), (".info/CONTENT", "\n".join(sorted(rows)))):
            bundle.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text)
    return file.getvalue()


def foreign(canary: Path) -> bytes:
    """A stranger's app that ships its own ``fedvfm``: importing it at a site writes a file."""
    files = {
        "fedvfm/__init__.py": CANARY.format(path=str(canary / "foreign-bundle")),
        "app/__init__.py": "",
        "app/server_app.py": _SERVER,
        "app/client_app.py": _CLIENT,
    }
    return make(files, "app.server_app:app", "app.client_app:app")
