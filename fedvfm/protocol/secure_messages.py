"""What travels for secure aggregation, beside the messages of a round: session, shares, masked numbers, openings.

Whoever reads it reads what a stranger may have written: every value is of a bounded form, or raises one of
:data:`fedvfm.protocol.wire.FAULTS`, which :mod:`fedvfm.protocol.protocol` turns into one error.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedvfm.protocol import wire
from fedvfm.secure_aggregation import consistency, masks, participant, round_keys, shamir
from fedvfm.secure_aggregation import session as sessions
from fedvfm.storage import hash_chain

MAX_TEXT = 200_000
MAX_SIGNATURE = 300
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Dealing:
    """A site's answer to a session that is proposed.

    Attributes:
        site: who answers.
        session: its id; empty where the site takes no part, since the keys it was listed with are spent.
        outbox: peer -> sealed shares for it.
        commitment: what everyone may know of its seed.
        keys: its keys for the next session.
    """

    site: str
    session: str
    outbox: Mapping[str, bytes]
    commitment: str
    keys: round_keys.Advertised


@dataclass(frozen=True, slots=True)
class Masked:
    """A site's masked update."""

    site: str
    round: int
    base: str
    session: str
    numbers: masks.Numbers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Agreement:
    """A survivor's signature for one sum of a round."""

    site: str
    session: str
    signature: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A site's answer to a sum that is to be opened."""

    site: str
    session: str
    revealed: participant.Revealed


# -- texts that ride in a header ---------------------------------------------------------------------------------------


def session_text(session: sessions.Session) -> str:
    """A session as it is proposed; the recipe's hash stands in the header already."""
    members = [_keys_row(keys) for keys in session.members]
    body = {"base": session.base, "roster": session.roster, "round": session.round, "threshold": session.threshold}
    return hash_chain.canonical({**body, "members": members})


def read_session(text: Any, recipe: str) -> sessions.Session:
    """The inverse of :func:`session_text`."""
    body = _object(text, {"base", "roster", "round", "threshold", "members"})
    rows = body["members"]
    if not isinstance(rows, list) or len(rows) > sessions.MOST_SITES:
        raise ValueError("members")
    members = tuple(_keys_of(row) for row in rows)
    names = [keys.site for keys in members]
    if names != sorted(set(names)):
        raise ValueError("members are sorted by name")
    base, roster = sha256(body["base"]), sha256(body["roster"])
    return sessions.Session(recipe, wire.count(body["round"]), base, roster, wire.count(body["threshold"]), members)


def inbox_text(session: str, inbox: Mapping[str, bytes]) -> str:
    """Shares for one site, with the question for its update."""
    return hash_chain.canonical({"session": session, "inbox": {peer: _b64(data) for peer, data in inbox.items()}})


def read_inbox(text: Any) -> tuple[str, dict[str, bytes]]:
    """The inverse of :func:`inbox_text`."""
    body = _object(text, {"session", "inbox"})
    return sha256(body["session"]), _pieces(body["inbox"], participant.ENVELOPE)


def sum_text(asked: consistency.Sum, signatures: Mapping[str, str] | None = None) -> str:
    """Whose numbers are in the sum that is to be agreed on or opened; and who signed for it, once they did."""
    body = {"session": asked.session, "dealers": list(asked.dealers), "survivors": list(asked.survivors)}
    return hash_chain.canonical({**body, "signatures": dict(signatures or {})})


def read_sum(text: Any) -> tuple[consistency.Sum, dict[str, str]]:
    """The inverse of :func:`sum_text`."""
    body = _object(text, {"session", "dealers", "survivors", "signatures"})
    signatures = body["signatures"]
    if not isinstance(signatures, dict) or len(signatures) > sessions.MOST_SITES:
        raise ValueError("signatures")
    signed = {wire.text(name, wire.MAX_NAME): wire.text(data, MAX_SIGNATURE) for name, data in signatures.items()}
    dealers, survivors = (_names(body[key]) for key in ("dealers", "survivors"))
    return consistency.Sum(sha256(body["session"]), dealers, survivors), signed


def keys_text(keys: round_keys.Advertised) -> str:
    """Public keys of a site for its next session."""
    return hash_chain.canonical(_keys_row(keys))


def read_keys(text: Any) -> round_keys.Advertised:
    """The inverse of :func:`keys_text`."""
    return _keys_of(json.loads(wire.text(text, MAX_TEXT)))


# -- answers -----------------------------------------------------------------------------------------------------------


def dealing_header(dealing: Dealing) -> dict[str, Any]:
    """The header's own keys of an answer to a session."""
    return {
        "site": dealing.site,
        "session": dealing.session,
        "commitment": dealing.commitment,
        "outbox": hash_chain.canonical({peer: _b64(data) for peer, data in dealing.outbox.items()}),
        "keys": keys_text(dealing.keys),
    }


def read_dealing(header: Mapping[str, Any]) -> Dealing:
    """The inverse of :func:`dealing_header`."""
    taken = header["session"] != ""
    outbox = _pieces(json.loads(wire.text(header["outbox"], MAX_TEXT)), participant.ENVELOPE)
    if not taken and (outbox or header["commitment"] != ""):
        raise ValueError("shares of no session")
    return Dealing(
        wire.text(header["site"]),
        sha256(header["session"]) if taken else "",
        outbox,
        sha256(header["commitment"]) if taken else "",
        read_keys(header["keys"]),
    )


def pack_numbers(numbers: masks.Numbers) -> ArrayRecord:
    """Masked numbers as they lie in memory, 8 bytes each."""
    data = np.ascontiguousarray(numbers, dtype="<u8").tobytes()
    return ArrayRecord({"numbers": Array("uint64", (len(numbers),), "numpy.ndarray", data)})


def unpack_numbers(record: ArrayRecord) -> masks.Numbers:
    """The inverse of :func:`pack_numbers`."""
    if set(record) != {"numbers"} or record["numbers"].stype != "numpy.ndarray":
        raise ValueError("no masked numbers")
    array = record["numbers"]
    if array.dtype != "uint64" or len(array.data) != 8 * math.prod(array.shape) or len(array.shape) != 1:
        raise ValueError("no masked numbers")
    return np.frombuffer(array.data, dtype="<u8")


def agreement_header(agreement: Agreement) -> dict[str, Any]:
    """The header's own keys of an answer to a sum that is to be agreed on."""
    return {"site": agreement.site, "session": agreement.session, "signature": agreement.signature}


def read_agreement(header: Mapping[str, Any]) -> Agreement:
    """The inverse of :func:`agreement_header`."""
    signature = wire.text(header["signature"], MAX_SIGNATURE)
    return Agreement(wire.text(header["site"]), sha256(header["session"]), signature)


def opening_header(opening: Opening) -> dict[str, Any]:
    """The header's own keys of an answer to a list of survivors."""
    return {
        "site": opening.site,
        "session": opening.session,
        "seeds": hash_chain.canonical({peer: _b64(data) for peer, data in opening.revealed.seeds.items()}),
        "masks": hash_chain.canonical({peer: _b64(data) for peer, data in opening.revealed.masks.items()}),
    }


def read_opening(header: Mapping[str, Any]) -> Opening:
    """The inverse of :func:`opening_header`."""
    seeds, keys = (
        _pieces(json.loads(wire.text(header[key], MAX_TEXT)), shamir.SHARE_SIZE) for key in ("seeds", "masks")
    )
    return Opening(wire.text(header["site"]), sha256(header["session"]), participant.Revealed(seeds, keys))


# -- forms -------------------------------------------------------------------------------------------------------------


def sha256(value: Any) -> str:
    """64 hexadecimal digits."""
    text = wire.text(value, 64)
    if len(text) != 64 or not set(text) <= _HEX:
        raise ValueError("sha256")
    return text


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(value: Any, size: int) -> bytes:
    try:
        data = base64.b64decode(wire.text(value, 2 * size + 4), validate=True)
    except binascii.Error:
        raise ValueError("base64") from None
    if len(data) != size:
        raise ValueError("size")
    return data


def _pieces(values: Any, size: int) -> dict[str, bytes]:
    if not isinstance(values, dict) or len(values) > sessions.MOST_SITES:
        raise ValueError("pieces")
    return {wire.text(name, wire.MAX_NAME): _bytes(data, size) for name, data in values.items()}


def _names(values: Any) -> tuple[str, ...]:
    names = tuple(wire.texts(values))
    if len(names) > sessions.MOST_SITES or list(names) != sorted(set(names)):
        raise ValueError("names are sorted, and none stands twice")
    return names


def _object(text: Any, keys: set[str]) -> dict[str, Any]:
    body = json.loads(wire.text(text, MAX_TEXT))
    if not isinstance(body, dict) or set(body) != keys:
        raise ValueError("keys")
    return body


def _keys_row(keys: round_keys.Advertised) -> dict[str, str]:
    return {
        "site": keys.site,
        "channel": _b64(keys.channel),
        "mask": _b64(keys.mask),
        "signature": keys.signature,
    }


def _keys_of(row: Any) -> round_keys.Advertised:
    if not isinstance(row, dict) or set(row) != {"site", "channel", "mask", "signature"}:
        raise ValueError("keys")
    channel, mask = (_bytes(row[half], round_keys.SIZE) for half in ("channel", "mask"))
    name = wire.text(row["site"], wire.MAX_NAME)
    return round_keys.Advertised(name, channel, mask, wire.text(row["signature"], MAX_SIGNATURE))
