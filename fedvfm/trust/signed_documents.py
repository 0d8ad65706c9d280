"""Small signed JSON files that travel between strangers: bounded, strictly parsed, and never quoted in an error.

An invite holds a token, so an error names the place of a fault and the rule it breaks, never the value that stands
there.
"""

from __future__ import annotations

import datetime
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.storage import hash_chain, storage

MAX_BYTES = 2_000_000
MAX_FAULTS = 8
FILE = "file"
"""Context of a validation: what is validated came from a file."""

Time = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
Signature = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{40,200}={0,2}$")]
PublicKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/]{100,300}={0,2}$")]


class Document(schema.Strict):
    """Base of what is signed.

    Attributes:
        SIGNATURES: fields that no signature covers, because they are the signatures.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ()

    def signed_bytes(self) -> bytes:
        """What signatures are made over; it begins with the kind, so that none is good for another kind of document."""
        body = {key: value for key, value in self.model_dump(mode="json").items() if key not in self.SIGNATURES}
        return f"fedvfm {type(self).__name__.lower()}\n{hash_chain.canonical(body)}".encode()


Model = TypeVar("Model", bound=schema.Strict)


def parse(data: bytes, model: type[Model], what: str) -> Model:
    """Strict JSON into a model.

    Raises:
        TrustError: naming places and rules, never values.
    """
    if len(data) > MAX_BYTES:
        raise errors.TrustError(f"{what}: {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        values = json.loads(data.decode(), object_pairs_hook=_no_twins, parse_constant=_no_constant)
        hash_chain.canonical(values).encode()
    except (ValueError, RecursionError):
        raise errors.TrustError(f"{what}: is no strict JSON (UTF-8, no repeated key, no NaN)") from None
    if not isinstance(values, dict):
        raise errors.TrustError(f"{what}: is no JSON object")
    try:
        return model.model_validate(values, context=FILE)
    except (pydantic.ValidationError, RecursionError) as error:
        raise errors.TrustError(f"{what}: {_faults(error)}") from None


def read(path: Path, model: type[Model], what: str) -> Model:
    """:func:`parse` for a regular file, which is not read if it is too large.

    Raises:
        TrustError: if it is missing, no regular file, too large or not of the form.
    """
    return parse(read_bytes(path, what), model, f"{what} {path}")


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a bounded regular file.

    Raises:
        TrustError: if there is none.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise errors.TrustError(f"{what} {path}: is no file")
        if found.st_size > MAX_BYTES:
            raise errors.TrustError(f"{what} {path}: {found.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or "not a file name"
        raise errors.TrustError(f"{what} {path}: cannot be read: {reason}") from None


def to_text(document: schema.Strict) -> str:
    """A document as a file holds it; ASCII alone, so that a terminal shows what is there."""
    return json.dumps(document.model_dump(mode="json"), indent=2, ensure_ascii=True) + "\n"


def format_of(data: bytes) -> str:
    """What a file says it is, or empty: for choosing the strict reader that then judges it."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    return str(found.get("format", "")) if isinstance(found, dict) else ""


def write(path: Path, document: schema.Strict) -> Path:
    """Write a document for its owner alone; it goes to others by the owner's hand."""
    storage.write_text(path, to_text(document))
    return path


def now() -> datetime.datetime:
    """The time, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def stamp(moment: datetime.datetime) -> str:
    """``2026-11-03T12:00:00Z``."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime.datetime:
    """The inverse of :func:`stamp`.

    Raises:
        TrustError: for a day or hour that does not exist.
    """
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        raise errors.TrustError("a time in the file does not exist") from None


def shown(text: str) -> str:
    """Foreign text for a terminal: what could move the cursor, colour or reorder is written as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _faults(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return "is nested too deeply"
    rows = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{shown('.'.join(map(str, row['loc'])))[:80] or 'the whole'}: {row['msg'].lower()}" for row in rows]
    more = f"; and {len(lines) - MAX_FAULTS} more" if len(lines) > MAX_FAULTS else ""
    return "is not of the known form: " + "; ".join(lines[:MAX_FAULTS]) + more


def _no_twins(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("repeated key")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)
