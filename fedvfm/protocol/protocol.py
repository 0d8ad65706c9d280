"""Flower records <-> our values. Every record key and message type stands here and nowhere else.

A message carries the whole resolved recipe (about 2 KB): a site needs no memory of earlier messages to check it.
Replies carry the round and the base fingerprint they answer, so that a stale one is seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import codecs, secure_messages, wire
from fedvfm.secure_aggregation import round_keys
from fedvfm.state import factors, state
from fedvfm.storage import hash_chain

VERSION = 1
MAX_RECIPE = 200_000
MAX_ROSTER = 500_000
MAX_SURVEY, MAX_ANSWER = 100_000, 900_000
"""Characters of a survey, and of a site's answer to it."""

HANDSHAKE = "query.handshake"
TRAIN = "train"
EVALUATE = "evaluate"
SHARE, AGREE, UNMASK = "query.share", "query.agree", "query.unmask"
"""Of secure aggregation: a session is proposed; who is in its sum is to be signed; the sum is to be opened."""
SURVEY = "query.survey"
"""Of statistics before training; it names no recipe."""
WORDS = {HANDSHAKE: "handshake", TRAIN: "train", EVALUATE: "evaluate", SHARE: "share", AGREE: "agree", UNMASK: "unmask"}
WORDS |= {SURVEY: "survey"}
"""What both ends' logs call a kind of message."""

_ADAPTER = "adapter"
_CORRECTION, _CORRECTION_LAYOUT = "correction", "correction_layout"
_HEADER = "fedvfm"
_LAYOUT = "layout"
_METRICS = "metrics"
_SAMPLES = "samples"
_CLASSES = "classes"
_PATIENTS = "patients"
_IDS = "ids"
_AUDIT = "audit"
_MARK = "mark"
_NOTED = "noted"
_LEDGER = "ledger"
_MASKED_NUMBERS = "masked"
_CODEC, _BASE, _TARGET = "codec", "base", "fingerprint"
_SECURE, _ROSTER, _KEYS = "secure", "roster", "keys"
_LABELLED, _LACKING, _WITHOUT_LABELS = "labelled", "lacking", "without_labels"

# The keys that a header may have, by kind of message; there is no other.
_TASK = frozenset(["protocol", "recipe", "recipe_hash", "round", "split", "surface", "per_sample", "final", "layout"])
_TASK |= {_CODEC, _BASE, _TARGET, _SECURE, _ROSTER, _CORRECTION_LAYOUT}
_HELLO = frozenset(["protocol", "site", "backbone_sha256", "backbone_config_sha256", "manifest_fingerprint"])
_HELLO |= {"rank", "precision", _CODEC, _KEYS, _LABELLED, _LACKING, _WITHOUT_LABELS}
_UPDATE = frozenset(["protocol", "site", "round", "base_fingerprint", "layout", _CODEC])
_EVALUATION = frozenset(["protocol", "site", "round", "ids", "acceptance"])
_DEALING = frozenset(["protocol", "site", "session", "commitment", "outbox", _KEYS])
_MASKED = frozenset(["protocol", "site", "round", "base_fingerprint", "session"])
_AGREEMENT = frozenset(["protocol", "site", "session", "signature"])
_SURVEY = frozenset(["protocol", "survey"])
_ANSWER = frozenset(["protocol", "site", "answer"])
_OPENING = frozenset(["protocol", "site", "session", "seeds", "masks"])

_REASON = re.compile(r"([a-z][a-z-]{0,39})(?: ([0-9]{19}:[0-9a-f]{64}))?")

# Error codes of a site's typed refusals; the reason is one of these words and never free text.
ERROR_CODES = {"error": 1001, "data": 1002, "weights": 1003, "training": 1004, "refused": 1005, "config": 1006}
ERROR_CODES |= {"deadline": 1007, "adapter": 1008, "storage": 1009}
# A difference came to an adapter that the site does not hold: it is sent the whole one; a codec it does not know.
MISSING = "adapter-missing"
ERROR_CODES |= {MISSING: 1010, "codec": 1011}
# What a site's person in charge or policy does not accept.
ERROR_CODES |= {
    "approval-pending": 1020,
    "policy-adapter": 1021,
    "policy-backbone": 1022,
    "policy-hours": 1023,
    "policy-licence": 1044,
    "policy-message": 1024,
    "policy-metrics": 1025,
    "policy-parameters": 1026,
    "policy-privacy": 1027,
    "policy-rounds": 1028,
    "policy-units": 1029,
    "policy-split": 1034,
    "policy-task": 1030,
    "policy-closed": 1031,
    # An adapter that is neither the recipe's first nor near one that came before; a score that was given already.
    "policy-base": 1035,
    "policy-evaluations": 1036,
    # One step, or one patient, would show in the update; too few sites would be joined.
    "policy-training": 1037,
    "policy-sites": 1038,
    # Its privacy budget does not hold the round, or is none; its privacy ledger cannot be charged.
    "privacy-budget": 1032,
    "privacy-ledger": 1033,
}
# Of secure aggregation: an update that is to be hidden cannot be hidden here; nobody here approved the roster document;
# a session, its shares or its list of survivors is none that this site takes part in; a sum of this round was opened.
ERROR_CODES |= {"secure-aggregation": 1060, "roster-pending": 1061, "secure-session": 1062, "secure-shares": 1063}
ERROR_CODES |= {"secure-survivors": 1064, "secure-opened": 1065, "secure-numbers": 1066, "policy-secure": 1067}
# ... too few of the survivors signed for one and the same sum; a round starts where another one did.
ERROR_CODES |= {"secure-agreement": 1068, "secure-base": 1069}
# The policy does not let out a statistic that a survey asks for, or so many surveys; the patients differ by few from
# those of an earlier answer, and the difference of the two would tell of them.
ERROR_CODES |= {"policy-survey": 1042, "survey-difference": 1043}
# The site's state folder was put back to an earlier day: it forgot what it sent since.
ERROR_CODES |= {"went-back": 1039}
# A job of the site's cluster ended without an answer, or did not begin in time; the site's device does not compute.
ERROR_CODES |= {"batch": 1070, "device": 1071}
# What the coordinator itself puts in place of an answer that it waits for no more.
ERROR_CODES |= {"away": 1050, "dropped": 1051, "revoked": 1052}
# ... and of one whose privacy ledger is shorter than it was in this recipe.
LEDGER_WENT_BACK = "ledger-went-back"
ERROR_CODES[LEDGER_WENT_BACK] = 1053

# What the coordinator's Grid puts in place of a reply that cannot be read, or is larger than any asked for.
ERROR_CODES |= {"malformed": 1040, "oversized": 1041}

ACCEPTANCE = ("accepted", "declined", "pending")
"""What a site says of the final adapter once it has scored it: its policy takes it, does not, or a person decides."""

Arrays: TypeAlias = state.AdapterState


@dataclass(frozen=True, slots=True)
class Task:
    """What the server asks of a site in one message.

    Attributes:
        recipe: the resolved recipe.
        round: the round asked for (0 in the handshake).
        state: the adapter to start from or to evaluate; None in the handshake.
        split: "val" or "test" (evaluate only).
        surface: whether the slow surface metrics are wanted (evaluate only).
        per_sample: whether per-sample values may be answered (simulation only).
        final: this is the adapter the federation ends with, for the site to keep (evaluate of "test" only).
        secure: what of secure aggregation rides on it; see :mod:`fedvfm.protocol.secure_messages`.
        roster: the roster document, as its file (handshake under secure aggregation only).
        correction: what is added to the gradient of every step (train under control variates only).
    """

    recipe: schema.Recipe
    round: int = 0
    state: state.AdapterState | None = None
    split: str = ""
    surface: bool = False
    per_sample: bool = False
    final: bool = False
    secure: str = ""
    roster: str = ""
    correction: Arrays | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """A site's answer to the handshake; the two hashes name the backbone's weights and its settings.

    ``precision`` is what the site computes in: one of :data:`fedvfm.config.schema.COMPUTED_IN`.
    ``codec`` is the one that it will send and take, the recipe's: it agrees to it by name.
    ``keys`` are those of its next session, where the recipe has secure aggregation.
    ``labelled`` are the classes that it labels, by the recipe's names; empty for all. ``without_labels`` says that it
    labels nothing.
    ``lacking`` are the recipe's channels that it has no files of.
    """

    site: str
    backbone_sha256: str
    manifest_fingerprint: str
    rank: int
    examples: Mapping[str, int]
    backbone_config_sha256: str = ""
    precision: str = schema.COMPUTED_IN[0]
    codec: str = codecs.PLAIN
    keys: round_keys.Advertised | None = None
    labelled: tuple[str, ...] = ()
    without_labels: bool = False
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A site's answer to an evaluate message: site values, and per-sample values where asked for.

    ``acceptance`` is one of :data:`ACCEPTANCE` where the adapter was the final one and the site has terms, else empty.
    ``classes`` says how many patients have each class, ``patients`` what metrics come to where each patient counts once
    (see :meth:`fedvfm.tasks.metrics.MetricSet.bounded`); the gate of the site goes by them and takes them off.
    """

    site: str
    round: int
    num_examples: int
    metrics: Mapping[str, float]
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    acceptance: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    patients: Mapping[str, float] = field(default_factory=dict)


_STYPE = "numpy.ndarray"


def _pack(values: state.AdapterState) -> tuple[str, ArrayRecord]:
    layout, data = wire.pack(values)
    return layout, ArrayRecord({_ADAPTER: Array("float32", (values.parameters,), _STYPE, data)})


def _unpack(layout: Any, record: ArrayRecord) -> state.AdapterState:
    if set(record) != {_ADAPTER} or record[_ADAPTER].stype != _STYPE:
        raise ValueError("no adapter")
    return wire.unpack(layout, record[_ADAPTER].data)


def _pack_difference(difference: codecs.Difference) -> tuple[dict[str, Any], ArrayRecord]:
    header = {_CODEC: difference.codec, _LAYOUT: wire.layout_of(difference.shapes)}
    return header, ArrayRecord({_ADAPTER: Array("uint8", (len(difference.data),), _STYPE, difference.data)})


def _unpack_difference(header: Mapping[str, Any], base: str, target: str, record: ArrayRecord) -> codecs.Difference:
    codec = wire.text(header[_CODEC], 64)
    if set(record) != {_ADAPTER} or record[_ADAPTER].stype != _STYPE or codec not in codecs.TABLE:
        raise ValueError("no difference")
    return codecs.Difference(codec, base, target, wire.shapes_of(header[_LAYOUT]), record[_ADAPTER].data)


def _header(content: RecordDict, keys: frozenset[str], *records: str) -> Mapping[str, Any]:
    """The header of a message with these keys and, beside a mark, these records: what is not known is refused.

    Raises:
        ProtocolError: if it is of another version, or holds more.
    """
    header: Mapping[str, Any] | None = content.config_records.get(_HEADER)
    if header is None or header.get("protocol") != VERSION:
        found = None if header is None else repr(header.get("protocol"))[:20]
        raise errors.ProtocolError(
            f"message of protocol version {found}; this is version {VERSION}. Install the same fedvfm at both ends"
        )
    extra = len(set(content) - {_HEADER, _AUDIT, *records}) + len(set(header) - keys)
    if extra:
        raise errors.ProtocolError(f"message holds {extra} records or keys that are not of the known form")
    _marks(content)
    return header


def _marks(content: RecordDict) -> dict[str, hash_chain.Mark]:
    if _AUDIT not in content:
        return {}
    record = content.config_records.get(_AUDIT)
    if record is None or not {_MARK} <= set(record) <= {_MARK, _LEDGER, _NOTED}:
        return {_MARK: _parse_mark(None)}  # which says what is wrong
    return {key: _parse_mark(text) for key, text in record.items()}


def _parse_mark(text: Any) -> hash_chain.Mark:
    try:
        return hash_chain.Mark.parse(text)
    except ValueError:
        raise errors.ProtocolError("the mark of the sender's audit log is not of the known form") from None


def find_mark(message: Message) -> hash_chain.Mark | None:
    """Length and head of the sender's audit log as a message carries them; None in simulation, which has no log.

    Raises:
        ProtocolError: if what it carries is no mark.
    """
    if not message.has_error():
        return _marks(message.content).get(_MARK) if message.has_content() else None
    found = _REASON.fullmatch(message.error.reason or "")
    return _parse_mark(found[2]) if found is not None and found[2] else None


def find_ledger(message: Message) -> hash_chain.Mark | None:
    """Length and head of the sender's privacy ledger, as an update that was charged and a private greeting carry them.

    Raises:
        ProtocolError: if what it carries is no mark.
    """
    return _marks(message.content).get(_LEDGER) if message.has_content() else None


def find_noted(message: Message) -> hash_chain.Mark | None:
    """The longest mark of the receiver's own audit log that the sender noted in this recipe; None where it has none.

    Raises:
        ProtocolError: if what it carries is no mark.
    """
    return _marks(message.content).get(_NOTED) if message.has_content() else None


def put_mark(
    message: Message,
    mark: hash_chain.Mark,
    ledger: hash_chain.Mark | None = None,
    noted: hash_chain.Mark | None = None,
) -> None:
    """Let a message carry the mark of its sender's audit log in place of one it has.

    With it go the mark of the sender's privacy ledger, and ``noted``, that of the receiver's audit log. The records
    themselves are not touched: they may be shared with other messages, or kept to be sent again.
    """
    if message.has_error():
        message.error = Error(message.error.code, f"{error_word(message)} {mark}")
    else:
        marks = {_MARK: mark, _LEDGER: ledger, _NOTED: noted}
        texts = {name: str(each) for name, each in marks.items() if each is not None}
        message.content = RecordDict({**message.content, _AUDIT: ConfigRecord({**texts})})


def unmarked(content: RecordDict) -> RecordDict:
    """The records of a message but for its sender's marks; the records themselves are shared."""
    return RecordDict({name: record for name, record in content.items() if name != _AUDIT})


def only_marks(content: RecordDict) -> RecordDict:
    """The marks of a message's sender alone."""
    return RecordDict({name: record for name, record in content.items() if name == _AUDIT})


def digest(content: RecordDict) -> str:
    """sha256 of a message's records but for the marks; the same at both ends, so that their logs can be compared."""
    total = hashlib.sha256()
    for name in sorted(set(content) - {_AUDIT}):
        record = content[name]
        total.update(f"{type(record).__name__} {name!r} {len(record)}\n".encode())
        for key in sorted(record):
            value: Any = record[key]
            array = isinstance(value, Array)
            data = value.data if array else repr(value).encode()
            about = (value.dtype, tuple(value.shape), value.stype) if array else ()
            total.update(f"{key!r} {about!r} {len(data)}\n".encode())
            total.update(data)
    return total.hexdigest()


Held = Callable[[str], state.AdapterState | None]
"""The adapter of a fingerprint, where this end holds it."""


def nothing(fingerprint: str) -> None:
    """This end holds no adapter."""


def encode_task(task: Task, difference: codecs.Difference | None = None) -> RecordDict:
    """The records of a server's message.

    Args:
        task: what is asked.
        difference: travels in place of the adapter, to a site that holds its base.
    """
    header: dict[str, Any] = {
        "protocol": VERSION,
        "recipe": task.recipe.model_dump_json(),
        "recipe_hash": task.recipe.hash,
        "round": task.round,
        "split": task.split,
        "surface": task.surface,
        "per_sample": task.per_sample,
        "final": task.final,
    }
    # A site of an earlier release knows no such keys, and no recipe that has them.
    header |= {key: text for key, text in ((_SECURE, task.secure), (_ROSTER, task.roster)) if text}
    content = RecordDict()
    if difference is not None:
        coded, content[_ADAPTER] = _pack_difference(difference)
        header |= {**coded, _BASE: difference.base, _TARGET: difference.target}
    elif task.state is not None:
        header[_LAYOUT], content[_ADAPTER] = _pack(task.state)
    if task.correction is not None:
        header[_CORRECTION_LAYOUT], content[_CORRECTION] = _pack(task.correction)
    content[_HEADER] = ConfigRecord(header)
    return content


def _adapter(header: Mapping[str, Any], recipe: schema.Recipe, arrays: ArrayRecord, held: Held) -> state.AdapterState:
    """The adapter of a server's message: whole, or by its difference to one that is held here.

    Raises:
        AdapterMissing: if it is not held.
    """
    if _CODEC not in header:
        return _unpack(header[_LAYOUT], arrays)
    names = wire.text(header[_BASE], 64), wire.text(header[_TARGET], 64)
    difference = _unpack_difference(header, *names, arrays)
    if difference.codec != recipe.codec:
        raise ValueError("another codec than the recipe's")
    base = held(difference.base)
    if base is None:
        raise errors.AdapterMissing("the message holds a difference to an adapter that is not held here")
    adapter = factors.completed(codecs.decode(difference, base), base)
    if adapter.fingerprint != difference.target:
        raise errors.AdapterMissing("the difference does not lead to the adapter that the message names")
    return adapter


def decode_task(content: RecordDict, held: Held = nothing) -> Task:
    """The inverse of :func:`encode_task`, at the site.

    Args:
        content: the records.
        held: adapters that came before; a difference is to one of them.

    Raises:
        ProtocolError: if the recipe is not the one its hash names, or a record is missing.
        AdapterMissing: if a difference is to an adapter that is not held.
        ConfigError: if the recipe has faults.
    """
    header = _header(content, _TASK, _ADAPTER, _CORRECTION)
    try:
        values = json.loads(wire.text(header["recipe"], MAX_RECIPE))
        recipe = schema.parse(schema.Recipe, values, "recipe from the server")
        arrays, correction = content.array_records.get(_ADAPTER), content.array_records.get(_CORRECTION)
        task = Task(
            recipe=recipe,
            round=wire.whole(header["round"]),
            state=None if arrays is None else _adapter(header, recipe, arrays, held),
            split=wire.text(header["split"], 10),
            surface=wire.flag(header["surface"]),
            per_sample=wire.flag(header["per_sample"]),
            final=wire.flag(header["final"]),
            secure=wire.text(header.get(_SECURE, ""), secure_messages.MAX_TEXT),
            roster=wire.text(header.get(_ROSTER, ""), MAX_ROSTER),
            correction=None if correction is None else _unpack(header[_CORRECTION_LAYOUT], correction),
        )
        if task.final and (task.state is None or task.split != "test"):
            raise ValueError("a final adapter comes with the test")
    except wire.FAULTS as error:
        raise errors.ProtocolError(
            f"message from the server is not of the known form ({type(error).__name__})"
        ) from None
    if recipe.hash != header.get("recipe_hash"):
        raise errors.ProtocolError("the recipe is not the one its hash names")
    return task


def encode_hello(hello: Hello) -> RecordDict:
    """The records of a handshake reply."""
    header: dict[str, Any] = {
        "protocol": VERSION,
        "site": hello.site,
        "backbone_sha256": hello.backbone_sha256,
        "backbone_config_sha256": hello.backbone_config_sha256,
        "manifest_fingerprint": hello.manifest_fingerprint,
        "rank": hello.rank,
        "precision": hello.precision,
    }
    if hello.codec != codecs.PLAIN:  # a coordinator of an earlier release knows no such key, and asks for no other
        header[_CODEC] = hello.codec
    if hello.keys is not None:
        header[_KEYS] = secure_messages.keys_text(hello.keys)
    if hello.labelled:  # only of a recipe that asks for it
        header[_LABELLED] = list(hello.labelled)
    if hello.lacking:  # the same
        header[_LACKING] = list(hello.lacking)
    if hello.without_labels:  # the same
        header[_WITHOUT_LABELS] = True
    return RecordDict({_HEADER: ConfigRecord(header), _METRICS: MetricRecord(dict(hello.examples))})


def decode_hello(content: RecordDict) -> Hello:
    """The inverse of :func:`encode_hello`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _HELLO, _METRICS)
    try:
        return Hello(
            site=wire.text(header["site"]),
            backbone_sha256=wire.text(header["backbone_sha256"]),
            backbone_config_sha256=wire.text(header["backbone_config_sha256"]),
            manifest_fingerprint=wire.text(header["manifest_fingerprint"]),
            rank=wire.rank(header["rank"]),
            examples=wire.counts(content.metric_records[_METRICS]),
            precision=_word(header["precision"], schema.COMPUTED_IN),
            codec=wire.text(header.get(_CODEC, codecs.PLAIN), 64),
            keys=secure_messages.read_keys(header[_KEYS]) if _KEYS in header else None,
            labelled=wire.texts(header.get(_LABELLED, [])),
            lacking=wire.texts(header.get(_LACKING, [])),
            without_labels=wire.flag(header.get(_WITHOUT_LABELS, False)),
        )
    except wire.FAULTS as error:
        raise errors.ProtocolError(f"handshake reply is not of the known form ({type(error).__name__})") from None


def encode_update(update: state.SiteUpdate, difference: codecs.Difference | None = None) -> RecordDict:
    """The records of a train reply.

    Args:
        update: what was trained.
        difference: travels in place of its arrays.
    """
    if difference is None:
        layout, arrays = _pack(update.state)
        coded: dict[str, Any] = {_LAYOUT: layout}
    else:
        coded, arrays = _pack_difference(difference)
    header: dict[str, Any] = {
        "protocol": VERSION,
        "site": update.site,
        "round": update.base_round + 1,
        "base_fingerprint": update.base_fingerprint,
        **coded,
    }
    return RecordDict({_HEADER: ConfigRecord(header), _METRICS: _train_metrics(update), _ADAPTER: arrays})


def _train_metrics(update: state.SiteUpdate) -> MetricRecord:
    metrics: dict[str, Any] = {"num_examples": update.num_examples, **update.metrics}
    return MetricRecord(metrics)


def with_metrics(content: RecordDict, update: state.SiteUpdate) -> RecordDict:
    """A train reply with the example count and metrics of ``update``; its arrays travel as they are."""
    return RecordDict({**content, _METRICS: _train_metrics(update)})


def base_of(content: RecordDict) -> str:
    """Fingerprint of the adapter that a train reply holds a difference to; empty where it holds whole arrays.

    Raises:
        ProtocolError: if it is no train reply.
    """
    header = _header(content, _UPDATE, _METRICS, _ADAPTER)
    return str(header.get("base_fingerprint", ""))[:64] if _CODEC in header else ""


def decode_update(
    content: RecordDict, base: state.AdapterState | None = None, codec: str | None = None
) -> state.SiteUpdate:
    """The inverse of :func:`encode_update`.

    Args:
        content: the records.
        base: the adapter that training started from, whole; a difference is added to it.
        codec: the one that both ends agreed to; None where any will do.

    Raises:
        ProtocolError: if it is not of that form, of another codec, or a difference to another adapter.
    """
    header = _header(content, _UPDATE, _METRICS, _ADAPTER)
    try:
        if codec is not None and header.get(_CODEC, codecs.PLAIN) != codec:
            raise ValueError("another codec than the recipe's")
        metrics = dict(content.metric_records[_METRICS])
        name = wire.text(header["base_fingerprint"])
        return state.SiteUpdate(
            site=wire.text(header["site"]),
            state=_trained(header, name, content.array_records[_ADAPTER], base),
            num_examples=wire.whole(metrics.pop("num_examples")),
            base_round=wire.whole(header["round"]) - 1,
            base_fingerprint=name,
            metrics=wire.reals(metrics),
        )
    except wire.FAULTS as error:
        raise errors.ProtocolError(f"train reply is not of the known form ({type(error).__name__})") from None


def _trained(
    header: Mapping[str, Any], name: str, arrays: ArrayRecord, base: state.AdapterState | None
) -> state.AdapterState:
    if _CODEC not in header:
        return _unpack(header[_LAYOUT], arrays)
    difference = _unpack_difference(header, name, "", arrays)
    if base is None or base.fingerprint != name:
        raise ValueError("a difference to an adapter that is not at hand")
    return codecs.decode(difference, base)


def encode_masked(masked: secure_messages.Masked) -> RecordDict:
    """The records of a train reply under secure aggregation: 8 bytes a number, nothing in plain."""
    header: dict[str, Any] = {
        "protocol": VERSION,
        "site": masked.site,
        "round": masked.round,
        "base_fingerprint": masked.base,
        "session": masked.session,
    }
    return RecordDict({_HEADER: ConfigRecord(header), _MASKED_NUMBERS: secure_messages.pack_numbers(masked.numbers)})


def is_masked(content: RecordDict) -> bool:
    """Whether a train reply holds masked numbers."""
    return _MASKED_NUMBERS in content


def decode_masked(content: RecordDict) -> secure_messages.Masked:
    """The inverse of :func:`encode_masked`.

    Raises:
        ProtocolError: if it is not of that form; a plain update is not.
    """
    header = _header(content, _MASKED, _MASKED_NUMBERS)
    with _known_form("masked update"):
        return secure_messages.Masked(
            site=wire.text(header["site"]),
            round=wire.count(header["round"]),
            base=secure_messages.sha256(header["base_fingerprint"]),
            session=secure_messages.sha256(header["session"]),
            numbers=secure_messages.unpack_numbers(content.array_records[_MASKED_NUMBERS]),
        )


def encode_dealing(dealing: secure_messages.Dealing) -> RecordDict:
    """The records of an answer to a session that is proposed."""
    header: dict[str, Any] = {"protocol": VERSION, **secure_messages.dealing_header(dealing)}
    return RecordDict({_HEADER: ConfigRecord(header)})


def decode_dealing(content: RecordDict) -> secure_messages.Dealing:
    """The inverse of :func:`encode_dealing`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _DEALING)
    with _known_form("answer to a session"):
        return secure_messages.read_dealing(header)


def encode_agreement(agreement: secure_messages.Agreement) -> RecordDict:
    """The records of a signature for a sum."""
    header: dict[str, Any] = {"protocol": VERSION, **secure_messages.agreement_header(agreement)}
    return RecordDict({_HEADER: ConfigRecord(header)})


def decode_agreement(content: RecordDict) -> secure_messages.Agreement:
    """The inverse of :func:`encode_agreement`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _AGREEMENT)
    with _known_form("signature for a sum"):
        return secure_messages.read_agreement(header)


def encode_opening(opening: secure_messages.Opening) -> RecordDict:
    """The records of an answer to a list of survivors."""
    header: dict[str, Any] = {"protocol": VERSION, **secure_messages.opening_header(opening)}
    return RecordDict({_HEADER: ConfigRecord(header)})


def decode_opening(content: RecordDict) -> secure_messages.Opening:
    """The inverse of :func:`encode_opening`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _OPENING)
    with _known_form("answer to a list of survivors"):
        return secure_messages.read_opening(header)


def encode_survey(text: str) -> RecordDict:
    """The records of a message that asks for statistics: the survey, as its file."""
    header: dict[str, Any] = {"protocol": VERSION, "survey": text}
    return RecordDict({_HEADER: ConfigRecord(header)})


def decode_survey(content: RecordDict) -> str:
    """The inverse of :func:`encode_survey`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _SURVEY)
    with _known_form("survey"):
        return wire.text(header["survey"], MAX_SURVEY)


def encode_answer(site: str, text: str) -> RecordDict:
    """The records of a site's answer to a survey."""
    header: dict[str, Any] = {"protocol": VERSION, "site": site, "answer": text}
    return RecordDict({_HEADER: ConfigRecord(header)})


def decode_answer(content: RecordDict) -> tuple[str, str]:
    """The inverse of :func:`encode_answer`: the site, and what it answers.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _ANSWER)
    with _known_form("answer to a survey"):
        return wire.text(header["site"]), wire.text(header["answer"], MAX_ANSWER)


@contextlib.contextmanager
def _known_form(what: str) -> Iterator[None]:
    try:
        yield
    except wire.FAULTS as error:
        raise errors.ProtocolError(f"{what} is not of the known form ({type(error).__name__})") from None


def encode_evaluation(evaluation: Evaluation) -> RecordDict:
    """The records of an evaluate reply."""
    header: dict[str, Any] = {
        "protocol": VERSION,
        "site": evaluation.site,
        "round": evaluation.round,
        "acceptance": evaluation.acceptance,
        _IDS: list(evaluation.ids),
    }
    metrics: dict[str, Any] = {"num_examples": evaluation.num_examples, **evaluation.metrics}
    content = RecordDict({_HEADER: ConfigRecord(header), _METRICS: MetricRecord(metrics)})
    if evaluation.samples:
        content[_SAMPLES] = MetricRecord(
            {name: [float(v) for v in values] for name, values in evaluation.samples.items()}
        )
    if evaluation.classes:
        content[_CLASSES] = MetricRecord(dict(evaluation.classes))
    if evaluation.patients:
        content[_PATIENTS] = MetricRecord(dict(evaluation.patients))
    return content


def decode_evaluation(content: RecordDict, *, inside: bool = False) -> Evaluation:
    """The inverse of :func:`encode_evaluation`.

    Args:
        content: the records.
        inside: the site reads what it made itself; what must not leave is refused everywhere else.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content, _EVALUATION, _METRICS, _SAMPLES, *((_CLASSES, _PATIENTS) if inside else ()))
    try:
        metrics = dict(content.metric_records[_METRICS])
        samples: Mapping[str, Any] = content.metric_records[_SAMPLES] if _SAMPLES in content else {}
        return Evaluation(
            site=wire.text(header["site"]),
            round=wire.whole(header["round"]),
            num_examples=wire.count(metrics.pop("num_examples")),
            metrics=wire.reals(metrics),
            samples=wire.columns(samples),
            ids=wire.texts(header[_IDS]),
            acceptance=_word(header["acceptance"], ("", *ACCEPTANCE)),
            classes=_counts(content.metric_records[_CLASSES]) if _CLASSES in content else {},
            patients=wire.reals(content.metric_records[_PATIENTS]) if _PATIENTS in content else {},
        )
    except wire.FAULTS as error:
        raise errors.ProtocolError(f"evaluate reply is not of the known form ({type(error).__name__})") from None


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: wire.count(value) for name, value in values.items()}


def _word(value: Any, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError("word")
    return value


def refusal(error: Exception) -> Error:
    """A typed error for the coordinator: a code and a word. Never the exception's text: it may name patients."""
    kinds = {
        errors.DataError: "data",
        errors.WeightsError: "weights",
        errors.DeadlinePassed: "deadline",
        errors.AdapterMissing: MISSING,
        errors.TrainingError: "training",
        errors.ProtocolError: "refused",
        errors.ConfigError: "config",
        errors.CheckpointError: "adapter",
        errors.StorageError: "storage",
        errors.DeviceError: "device",
    }
    word = next((word for kind, word in kinds.items() if isinstance(error, kind)), "error")
    with_word = errors.PolicyRefused | errors.SecureAggregationError | errors.JobError
    if isinstance(error, with_word) and error.reason in ERROR_CODES:
        word = error.reason
    return Error(code=ERROR_CODES[word], reason=word)


def in_place_of_answer(word: str, asked: Message) -> Message:
    """What stands for the answer of a site that is gone or takes no part: a word of the coordinator's own."""
    return Message(Error(code=ERROR_CODES[word], reason=word), reply_to=asked)


def error_word(message: Message) -> str:
    """The word of a typed error reply, or "unknown" for any other text."""
    found = _REASON.fullmatch(message.error.reason or "")
    return found[1] if found is not None and found[1] in ERROR_CODES else "unknown"
