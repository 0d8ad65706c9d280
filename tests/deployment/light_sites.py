"""A real SuperLink behind the real proxy, and nodes that echo what they are asked, each a thread with its own key."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.server.network import node_keys, proxy, superlink
from fedvfm.trust import keys
from tests.deployment.attacks import fleet

AGAIN = (502, 503, 504)
PARTS = 4
"""Arrays of a message; a SuperNode sends as many at a time."""


@dataclass
class Sites:
    """What runs.

    Attributes:
        grid: the coordinator's.
        family: SuperLink and proxy.
        pauses: status of every answer after which a node asked again, as a SuperNode does.
        faults: what ended a node.
    """

    front: proxy.Settings
    link: superlink.SuperLink
    family: processes.Family
    grid: Grid
    pauses: list[int] = field(default_factory=list)
    faults: list[Exception] = field(default_factory=list)

    def process(self, name: str) -> psutil.Process:
        running = self.family.children[name].process
        assert running is not None
        return psutil.Process(running.pid)

    def log(self, name: str) -> str:
        return processes.log_path(self.family.children[name].folder, name).read_text()

    def round(self, number: int, numbers: int, seconds: float = 600.0) -> float:
        """One message to each node and back; how long it took.

        Raises:
            TimeoutError: if not all answered in time.
        """
        began, rng = time.monotonic(), np.random.default_rng(number)
        arrays = {str(at): Array(rng.random(numbers // PARTS, dtype=np.float32)) for at in range(PARTS)}
        content = RecordDict({"a": ArrayRecord(arrays)})
        asked = [Message(content, node, "train", ttl=900.0, group_id=str(number)) for node in self.grid.get_node_ids()]
        waiting = set(self.grid.push_messages(asked))
        while waiting:
            for reply in self.grid.pull_messages(sorted(waiting)):
                assert not reply.has_error(), reply.error
                waiting.discard(reply.metadata.reply_to_message_id)
            if time.monotonic() > began + seconds:
                raise TimeoutError(f"{len(waiting)} of {len(asked)} did not answer in {seconds:g} s")
            time.sleep(0.05)
        return time.monotonic() - began


@contextlib.contextmanager
def wired(folder: Path, count: int) -> Iterator[Sites]:
    """Everything started and every node online; all of it ended afterwards."""
    family, stop, over = processes.Family(folder), threading.Event(), threading.Event()
    with family.watched(), contextlib.ExitStack() as held:
        link = superlink.prepare(folder / "superlink")
        superlink.wait_ready(link, family.start(link.program))
        front = proxy.Settings(
            superlink.HOST,
            processes.free_port(),
            str(link.certificate),
            str(link.key),
            link.address,
            str(link.authority),
            str(folder / "keys.txt"),
            str(folder / "refused.jsonl"),
        )
        known = [keys.make() for _ in range(count)]
        node_keys.write(Path(front.keys), map(keys.public_text, known))
        family.start(front.program(folder / "proxy.json"))
        control = runtime.Control(link.link)
        for number, key in enumerate(known):
            control.register(keys.public_text(key), f"site-{number}")
        grid, _ = held.enter_context(runtime.server_task(link.link, control.start_run(), stop))
        sites = Sites(front, link, family, grid)
        threads = [threading.Thread(target=_be_site, args=(sites, key, over)) for key in known]
        held.callback(lambda: [thread.join(300) for thread in threads])
        held.callback(over.set)
        for thread in threads:
            thread.start()
        until = time.monotonic() + 600.0
        while len(list(grid.get_node_ids())) < count:
            assert time.monotonic() < until
            assert not sites.faults
            time.sleep(0.1)
        control.close()
        yield sites


def _be_site(sites: Sites, key: keys.Private, over: threading.Event) -> None:
    node = fleet.Node(f"{sites.front.host}:{sites.front.port}", sites.link.authority.read_bytes(), key)

    def patiently(ask: Callable[[], Any]) -> Any:
        pause = 0.5
        while True:
            try:
                return ask()
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in AGAIN or over.is_set():
                    raise
                sites.pauses.append(error.response.status_code)
            except httpx.TransportError as error:
                if over.is_set() or any(word in str(error).lower() for word in ("certificate", "ssl", "tls")):
                    raise
                sites.pauses.append(0)
            over.wait(pause)
            pause = min(2 * pause, 20.0)

    for name in ("ActivateNode", "PullMessages", "PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject"):
        call = getattr(node.client, name)
        setattr(node.client, name, lambda request, call=call: patiently(lambda: call(request)))
    try:
        node.activate(600.0)
        while not over.is_set():
            message = node.pull()
            if message is not None:
                node.push_at_once(Message(message.content, reply_to=message), PARTS)
    except Exception as error:
        if not over.is_set():
            sites.faults.append(error)
