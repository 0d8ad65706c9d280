#!/usr/bin/env bash
# A Flower SuperNode that could not confirm one message sends the answer to it in place of the answer to the next one.
#
# A SuperNode handles one message at a time: it pulls a message and its parts, confirms the receipt to the SuperLink,
# waits for a reply of the ClientApp, sends it, and pulls the next. A message whose receipt cannot be confirmed (the
# connection is lost for a moment) is given up: it is deleted, and its task ends as failed. But its parts were whole
# before that, so that a quick ClientApp has answered while the receipt was still tried. That answer stays in the node's
# state, and the loop, which waits after the next message for "any reply", takes it for the reply that it waits for. From
# then on the node is one answer behind: each message is answered when the one after it has come.
#
# Guess before the run: the answer of a message that was given up is thrown away with it, or sent beside the next one.
# Seen with flwr 1.42.0: after message 1 was given up, message 2 was pulled, and what was sent then was the answer to 1;
# after message 3 was pulled, the answer to 2.
#
# The node's own loop functions, state and object store, in one process; this script is the SuperLink and the ClientApp.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install flwr==1.42.0
cat > "$work/behind.py" <<'PYTHON'
import logging
import sys
from importlib.metadata import version

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable import inflatable_object as objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory

logging.getLogger("flwr").setLevel(logging.CRITICAL)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
factory = NodeStateFactory(ObjectStoreFactory())
state, store = factory.state(), factory.objectstore_factory.store()
state.set_node_id(7)
state.store_run(Run.create_empty(1))
names, sent, working = {}, [], []


def asked(number):
    """Pull one message; its receipt meets a lost connection where ``number`` is 1."""
    message = Message(RecordDict({"config": ConfigRecord({"number": number})}), 7, "query", group_id=str(number))
    message.metadata.__dict__["_message_id"] = message.object_id
    names[message.object_id] = number
    with objects.no_object_id_recompute():
        tree = objects.get_object_tree(message)
        parts = {key: part.deflate() for key, part in objects.get_all_nested_objects(message).items()}

    def confirm(run_id, message_id):
        if number == 1:  # all parts are here; the ClientApp answers while this is tried
            finish()
            raise ConnectionError("the connection was lost for a moment")

    working.append(message)
    return loop._pull_and_store_message(
        state=state,
        object_store=store,
        node_config={},
        receive=lambda: (remove_content_from_message(message), tree),
        get_run=None,
        get_fab=None,
        pull_object=lambda run_id, object_id: parts[object_id],
        confirm_message_received=confirm,
        trusted_entities=None,
    )


def finish():
    """The ClientApp ends its oldest work, and its answer waits to be sent."""
    loop._insert_message(Message(RecordDict(), reply_to=working.pop(0)), state, store)


def send(reply, tree, seconds):
    sent.append(names[reply.metadata.reply_to_message_id])
    return set(), "session"


print(f"flwr {version('flwr')}: three messages; the receipt of the first could not be told, and it was answered by then")
seen = {}
for number in (1, 2, 3):
    if asked(number) is None:
        print(f"message {number}: given up, nothing is sent after it")
        continue
    before = len(sent)
    loop._push_messages(state=state, object_store=store, send=send, push_object=None)
    seen[number] = sent[before:]
    print(f"message {number}: whole, and the ClientApp is at work on it; sent after it: answers to {seen[number]}")
    finish()
sys.exit(0 if seen == {2: [1], 3: [2]} else 1)
PYTHON
"$work/env/bin/python" "$work/behind.py" 2>/dev/null
