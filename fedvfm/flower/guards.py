"""Where Flower trusts more than we may, on the way in: who uses the Control API, and what a node may push.

As :mod:`fedvfm.flower.runtime`, with which it shares the contract test. What stock Flower does without this stands in
``docs/security/attacks.md``.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.common import constant
from flwr.proto import fleet_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable import inflatable_object as trees
from flwr.supercore.primitives import asymmetric

PUSH_ROUTE, PULL_ROUTE = "/v1/fleet/push-messages", "/v1/fleet/pull-messages"
ACTIVATE_ROUTE = "/v1/fleet/activate-node"
REPLY_ROUTE, TASK_ROUTE = "/v1/runtime/pull-messages", "/v1/runtime/acquire-task"
"""Where a coordinator asks its SuperLink for replies, and an executor its SuperNode for a task."""
PART_BYTES = 5 * 1024 * 1024
"""In pieces of this size Flower sends an array."""
MAX_REPLY = 2 * 1024**3
"""Bytes of a reply where nothing tighter is known."""


def control_token(secret: bytes) -> str:
    """What a caller of the Control API must show; whoever can read the SuperLink's secret can make it."""
    return hmac.new(secret, b"fedvfm control", hashlib.sha256).hexdigest()


class ShowToken:
    """Adds the token to every request of a Control client."""

    def __init__(self, secret: bytes) -> None:
        self._token = control_token(secret)

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Add the header and go on."""
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def most_parts(reply_bytes: int) -> int:
    """How many parts a reply of that many bytes may be announced in: its arrays' pieces, its records, and room."""
    return 32 + -(-reply_bytes // PART_BYTES)


def push_fault(body: bytes, most: int) -> int:
    """0 for a push that speaks for its own node alone and in few enough parts, else the status of its refusal.

    The SuperLink checks that a request comes from the node it names, not that the messages in it do: an approved node
    could answer in another's name, or send the others instructions as if it were the coordinator.
    """
    try:
        asked = fleet_pb2.PushMessagesRequest.FromString(body)
    except Exception:  # whatever the parser says: it is no push
        return 400
    return request_fault(asked, most)


def request_fault(asked: Any, most: int) -> int:
    """As :func:`push_fault`, of a parsed request. However much is in it, little of it is looked at."""
    if len(asked.messages_list) > 1 or len(asked.message_object_trees) > 1:
        return 413  # a SuperNode pushes one at a time
    for message in asked.messages_list:
        about = message.metadata
        own = about.src_node_id == asked.node.node_id and about.dst_node_id == 1
        if not own or not about.reply_to_message_id:
            return 403
    parts = chain.from_iterable(map(trees.iterate_object_tree, asked.message_object_trees))
    return 413 if next(islice(parts, most, None), None) is not None else 0


PUBLIC_KEY, SIGNATURE, SIGNED_TIME = (
    name.encode() for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, constant.TIMESTAMP_HEADER)
)
"""Headers of every request of a node: its key, and its signature of the time."""
STANDING = b"fedvfm-standing"
"""In the answer to ``GET /health`` of a node that signed it: how its site stands on the roster. Ours, not Flower's."""


def shown_key(public_key: str) -> bytes:
    """How a node shows its public key (here in OpenSSH's form) in the header."""
    key = serialization.load_ssh_public_key(public_key.encode())
    return base64.b64encode(asymmetric.public_key_to_bytes(key))  # type: ignore[arg-type]


def signed_headers(key: Any) -> dict[str, str]:
    """What a node shows with a request: its key, the time, and its signature of that."""
    stamp = datetime.datetime.now(datetime.UTC).isoformat()
    signature = asymmetric.sign_message(key, stamp.encode("ascii"))
    shown = base64.b64encode(asymmetric.public_key_to_bytes(key.public_key()))
    pairs = ((PUBLIC_KEY, shown), (SIGNED_TIME, stamp.encode()), (SIGNATURE, base64.b64encode(signature)))
    return {name.decode(): value.decode() for name, value in pairs}


def is_signed(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a node signed the time of its request with the key it shows, not long ago: as the SuperLink judges it."""
    try:
        key = asymmetric.bytes_to_public_key(base64.b64decode(headers[PUBLIC_KEY], validate=True))
        signature, signed = base64.b64decode(headers[SIGNATURE], validate=True), headers[SIGNED_TIME]
        then = datetime.datetime.fromisoformat(signed.decode("ascii"))
        age = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
        tolerance = constant.SYSTEM_TIME_TOLERANCE
        timely = -tolerance < age < constant.TIMESTAMP_TOLERANCE + tolerance
        return timely and asymmetric.verify_signature(key, signed, signature)
    except (KeyError, ValueError, TypeError):
        return False
