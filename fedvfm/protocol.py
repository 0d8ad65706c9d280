"""Flower records <-> our values. Every record key and message type stands here and nowhere else.

A message carries the whole resolved recipe (about 2 KB): a site needs no memory of earlier messages to check it.
Replies carry the round and the base fingerprint they answer, so that a stale one is seen.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedvfm import config, errors, state

VERSION = 1
MAX_LAYOUT = 1_000_000

HANDSHAKE = "query.handshake"
TRAIN = "train"
EVALUATE = "evaluate"

_ADAPTER = "adapter"
_HEADER = "fedvfm"
_LAYOUT = "layout"
_METRICS = "metrics"
_SAMPLES = "samples"
_IDS = "ids"

# Error codes of a site's typed refusals; the reason is one of these words and never free text.
ERROR_CODES = {"error": 1001, "data": 1002, "weights": 1003, "training": 1004, "refused": 1005, "config": 1006}
ERROR_CODES["deadline"] = 1007
# What a site's person in charge or policy does not accept.
ERROR_CODES |= {
    "approval-pending": 1020,
    "policy-adapter": 1021,
    "policy-backbone": 1022,
    "policy-hours": 1023,
    "policy-message": 1024,
    "policy-metrics": 1025,
    "policy-parameters": 1026,
    "policy-privacy": 1027,
    "policy-rounds": 1028,
    "policy-samples": 1029,
    "policy-task": 1030,
    "policy-closed": 1031,
}

ACCEPTANCE = ("accepted", "declined", "pending")
"""What a site says of the final adapter once it has scored it: its policy takes it, does not, or a person decides."""


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
    """

    recipe: config.Recipe
    round: int = 0
    state: state.AdapterState | None = None
    split: str = ""
    surface: bool = False
    per_sample: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """A site's answer to the handshake; the two hashes name the backbone's weights and its settings."""

    site: str
    backbone_sha256: str
    manifest_fingerprint: str
    rank: int
    examples: Mapping[str, int]
    backbone_config_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A site's answer to an evaluate message: site values, and per-sample values where asked for.

    ``acceptance`` is one of :data:`ACCEPTANCE` where the adapter was the final one and the site has terms, else empty.
    """

    site: str
    round: int
    num_examples: int
    metrics: Mapping[str, float]
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    acceptance: str = ""


_STYPE = "numpy.ndarray"


@functools.lru_cache(maxsize=64)
def _npy_header(size: int) -> bytes:
    """The ``.npy`` header (version 1.0) of ``size`` little-endian float32 numbers in one row."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
    return file.getvalue()


@functools.lru_cache(maxsize=64)
def _parse_layout(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the arrays that lie one behind another.

    Raises:
        ValueError, TypeError, RecursionError: if the text does not say it.
    """
    if len(text) > MAX_LAYOUT:
        raise ValueError("a layout that long is of no adapter")
    rows = []
    for name, shape in json.loads(text):
        if not isinstance(name, str) or any(type(side) is not int or side < 0 for side in shape):
            raise TypeError("a name and a shape")
        rows.append((name, tuple(shape)))
    if len({name for name, _ in rows}) < len(rows):
        raise ValueError("a name is repeated")
    return tuple(rows)


def _pack(values: state.AdapterState) -> tuple[str, ArrayRecord]:
    """All arrays one behind another in a single one, and where each lies.

    Flower's transport moves every array as an object of its own and builds each anew at both ends; fifty small ones
    cost more time than their numbers.
    """
    layout = json.dumps([[name, array.shape] for name, array in values.items()], separators=(",", ":"))
    numbers = [np.ascontiguousarray(array, dtype="<f4").tobytes() for array in values.values()]
    data = b"".join([_npy_header(values.parameters), *numbers])
    return layout, ArrayRecord({_ADAPTER: Array("float32", (values.parameters,), _STYPE, data)})


def _unpack(layout: Any, record: ArrayRecord) -> state.AdapterState:
    """The inverse of :func:`_pack`; numbers are never unpickled.

    Raises:
        KeyError, TypeError, ValueError: if layout and numbers do not fit.
    """
    array, rows = record[_ADAPTER], _parse_layout(layout)
    size = sum(math.prod(shape) for _, shape in rows)
    header = _npy_header(size)
    if array.stype != _STYPE or len(array.data) != len(header) + 4 * size or not array.data.startswith(header):
        raise ValueError("not the numbers of this layout")
    numbers = np.frombuffer(array.data, dtype="<f4", offset=len(header))
    arrays, start = {}, 0
    for name, shape in rows:
        stop = start + math.prod(shape)
        arrays[name] = numbers[start:stop].reshape(shape)
        start = stop
    return state.AdapterState(arrays)


def _header(content: RecordDict) -> Mapping[str, Any]:
    header: Mapping[str, Any] | None = content.config_records.get(_HEADER)
    if header is None or header.get("protocol") != VERSION:
        found = None if header is None else header.get("protocol")
        raise errors.ProtocolError(
            f"message of protocol version {found!r}; this is version {VERSION}. Install the same fedvfm at both ends"
        )
    return header


def encode_task(task: Task) -> RecordDict:
    """The records of a server's message."""
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
    content = RecordDict()
    if task.state is not None:
        header[_LAYOUT], content[_ADAPTER] = _pack(task.state)
    content[_HEADER] = ConfigRecord(header)
    return content


def decode_task(content: RecordDict) -> Task:
    """The inverse of :func:`encode_task`, at the site.

    Raises:
        ProtocolError: if the recipe is not the one its hash names, or a record is missing.
        ConfigError: if the recipe has faults.
    """
    header = _header(content)
    try:
        values = json.loads(header["recipe"])
        recipe = config.parse(config.Recipe, values, "recipe from the server")
        arrays = content.array_records.get(_ADAPTER)
        task = Task(
            recipe=recipe,
            round=int(header["round"]),
            state=None if arrays is None else _unpack(header[_LAYOUT], arrays),
            split=str(header["split"]),
            surface=bool(header["surface"]),
            per_sample=bool(header["per_sample"]),
            final=_flag(header["final"]),
        )
        if task.final and (task.state is None or task.split != "test"):
            raise ValueError("a final adapter comes with the test")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
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
    }
    return RecordDict({_HEADER: ConfigRecord(header), _METRICS: MetricRecord(dict(hello.examples))})


def decode_hello(content: RecordDict) -> Hello:
    """The inverse of :func:`encode_hello`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content)
    try:
        return Hello(
            site=_text(header["site"]),
            backbone_sha256=_text(header["backbone_sha256"]),
            backbone_config_sha256=_text(header["backbone_config_sha256"]),
            manifest_fingerprint=_text(header["manifest_fingerprint"]),
            rank=_rank(header["rank"]),
            examples={name: _whole(value) for name, value in content.metric_records[_METRICS].items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise errors.ProtocolError(f"handshake reply is not of the known form ({type(error).__name__})") from None


def encode_update(update: state.SiteUpdate) -> RecordDict:
    """The records of a train reply."""
    layout, arrays = _pack(update.state)
    header: dict[str, Any] = {
        "protocol": VERSION,
        "site": update.site,
        "round": update.base_round + 1,
        "base_fingerprint": update.base_fingerprint,
        _LAYOUT: layout,
    }
    metrics: dict[str, Any] = {"num_examples": update.num_examples, **update.metrics}
    return RecordDict({_HEADER: ConfigRecord(header), _METRICS: MetricRecord(metrics), _ADAPTER: arrays})


def decode_update(content: RecordDict) -> state.SiteUpdate:
    """The inverse of :func:`encode_update`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content)
    try:
        metrics = dict(content.metric_records[_METRICS])
        return state.SiteUpdate(
            site=_text(header["site"]),
            state=_unpack(header[_LAYOUT], content.array_records[_ADAPTER]),
            num_examples=_whole(metrics.pop("num_examples")),
            base_round=_whole(header["round"]) - 1,
            base_fingerprint=_text(header["base_fingerprint"]),
            metrics={name: _real(value) for name, value in metrics.items()},
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise errors.ProtocolError(f"train reply is not of the known form ({type(error).__name__})") from None


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
    return content


def decode_evaluation(content: RecordDict) -> Evaluation:
    """The inverse of :func:`encode_evaluation`.

    Raises:
        ProtocolError: if it is not of that form.
    """
    header = _header(content)
    try:
        metrics = dict(content.metric_records[_METRICS])
        samples: Mapping[str, Any] = content.metric_records.get(_SAMPLES) or {}
        ids = header[_IDS]
        return Evaluation(
            site=_text(header["site"]),
            round=_whole(header["round"]),
            num_examples=_whole(metrics.pop("num_examples")),
            metrics={name: _real(value) for name, value in metrics.items()},
            samples={name: [_real(v) for v in values] for name, values in samples.items() if isinstance(values, list)},
            ids=tuple(_text(i) for i in ids) if isinstance(ids, list) else (),
            acceptance=_acceptance(header["acceptance"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise errors.ProtocolError(f"evaluate reply is not of the known form ({type(error).__name__})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 500:
        raise TypeError("text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("yes or no")
    return value


def _acceptance(value: Any) -> str:
    if not isinstance(value, str) or value not in ("", *ACCEPTANCE):
        raise ValueError("acceptance")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("whole number")
    return value


def _rank(value: Any) -> int:
    if not 1 <= _whole(value) <= config.MAX_RANK:
        raise ValueError("rank")
    return int(value)


def _real(value: Any) -> float:
    # The journal is JSON, which has no NaN: it must not come in.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("finite number")
    return float(value)


def refusal(error: Exception) -> Error:
    """A typed error for the coordinator: a code and a word. Never the exception's text: it may name patients."""
    kinds = {
        errors.DataError: "data",
        errors.WeightsError: "weights",
        errors.DeadlinePassed: "deadline",
        errors.TrainingError: "training",
        errors.ProtocolError: "refused",
        errors.ConfigError: "config",
    }
    word = next((word for kind, word in kinds.items() if isinstance(error, kind)), "error")
    if isinstance(error, errors.PolicyRefused) and error.reason in ERROR_CODES:
        word = error.reason
    return Error(code=ERROR_CODES[word], reason=word)


def error_word(message: Message) -> str:
    """The word of a typed error reply, or "unknown" for any other text."""
    reason = message.error.reason or ""
    return reason if reason in ERROR_CODES else "unknown"
