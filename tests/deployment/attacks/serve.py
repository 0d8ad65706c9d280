"""``python -m attacks.serve FILE``: nodes that answer by the book of lies, as the file says, until told to end."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from attacks import fleet, updates
from fedvfm.protocol import protocol


def hello(about: dict[str, Any]) -> RecordDict:
    """What the node says in the handshake."""
    return protocol.encode_hello(
        protocol.Hello(
            about["calls_itself"],
            about["backbone"],
            about["manifest"],
            about["rank"],
            {"train": 8, "val": 0, "test": 2},
            about.get("backbone_config", ""),
        )
    )


def reply(node: fleet.Node, asked: Message, about: dict[str, Any], before: list[updates.Update]) -> str:
    """Answer one message; what there is to tell of it."""
    kind = asked.metadata.message_type
    if about["speaks"] == "stock":
        language: updates.Language = updates.Stock(about["site"])
    else:
        language = updates.Fedvfm(about["site"], tuple(about["order"]))
        if kind == protocol.HANDSHAKE:
            node.push(Message(hello(about), reply_to=asked))
            return json.dumps({"handshake": about["calls_itself"]})
        if kind == protocol.EVALUATE:
            task = protocol.decode_task(asked.content)
            made = protocol.Evaluation(about["site"], task.round, 2, {"dice.disc": 0.5})
            node.push(Message(protocol.encode_evaluation(made), reply_to=asked))
            return json.dumps({"evaluate": task.split})
    return updates.answer(node, asked, language, about, before)


def main(path: Path) -> None:
    about = json.loads(path.read_text())
    log, lock = Path(about["log"]), threading.Lock()

    def tell(line: dict[str, Any]) -> None:
        with lock, log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def be(one: dict[str, Any]) -> None:
        node = fleet.Node(about["address"], Path(about["authority"]).read_bytes(), fleet.read_key(Path(one["key"])))
        node.activate(900.0)
        tell({"site": one["site"], "node": node.node.node_id})
        before: list[updates.Update] = []
        while True:
            try:
                asked = node.pull()
                if asked is None:
                    time.sleep(0.2)
                    continue
                victims = Path(about["victims"])
                one["victim"] = json.loads(victims.read_text()) if victims.exists() else ["", 0]
                who = {"site": one["site"], "from": asked.metadata.src_node_id, "group": asked.metadata.group_id}
                tell({**who, "received": asked.metadata.message_type})
                tell({**who, **json.loads(reply(node, asked, {**about, **one}, before))})
            except Exception as error:
                tell({"site": one["site"], "broke": fleet.status_of(error), "text": str(error)[:300]})
                time.sleep(0.5)

    np.seterr(all="ignore")
    threads = [threading.Thread(target=be, args=(one,), daemon=True) for one in about["nodes"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
