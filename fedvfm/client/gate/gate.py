"""The gate of a site: every message passes it on the way in, and every reply on the way out.

Nothing is computed for a message that the gate refuses. What leaves is on disk first, and what it spends of the site's
privacy is in the ledger before it leaves. An exception becomes a typed refusal here, so that no text of it travels.

The order that never under-counts: judge, reserve, train, keep the update, charge it, settle what coding it lost, note
that it leaves, send. Killed at any line, the site has sent nothing that was not charged; asked again, it sends what it
kept and charges it once, and what coding lost counts once, and only if the update may leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Context, Message, RecordDict

from fedvfm import errors
from fedvfm.client.gate import reply_cache
from fedvfm.protocol import codecs, protocol
from fedvfm.storage import storage

KINDS = (protocol.HANDSHAKE, protocol.TRAIN, protocol.EVALUATE)

App = Callable[[Message, Context], Message]
Report = Callable[[str, Exception], None]


def _nothing(content: RecordDict) -> None:
    """Charges nothing."""


@dataclass(frozen=True)
class Reserved:
    """What an answer spends, reserved while it is computed.

    Attributes:
        charge: charges it, by the records that leave; must have returned before they do.
        token: of the reservation, kept beside the update; "" where nothing is reserved.
    """

    charge: Callable[[RecordDict], None] = _nothing
    token: str = ""


class Terms(Protocol):
    """What a site checks and records. A hospital's stand on its policy, approvals and audit log."""

    def unread(self, message: Message) -> None:
        """A message came that is none of ours; it is refused."""
        ...

    def received(self, kind: str, task: protocol.Task, message: Message) -> None:
        """Before anything is computed.

        Raises:
            PolicyRefused: if the message must not be answered.
        """
        ...

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """What may leave of a reply; recorded as computed."""
        ...

    def reserving(self, kind: str, task: protocol.Task) -> contextlib.AbstractContextManager[Reserved]:
        """Around computing an answer: what it spends is reserved meanwhile, and charged by what is given.

        Raises:
            PolicyRefused: if it would spend more than there is, or the message was accepted because its answer was
                kept, and it is computed anew where that is refused; then nothing is computed.
        """
        ...

    def scored(self, task: protocol.Task) -> RecordDict | None:
        """What may leave of scores that were given before; None where they are to be computed."""
        ...

    def again(self, task: protocol.Task, content: RecordDict, token: str) -> RecordDict | None:
        """What may leave of an update that was kept; the same as before unless the terms are tighter now.

        Args:
            task: what it answers.
            content: the update.
            token: of the reservation that it was trained under.

        Returns: None where it may not leave and the answer is to be computed anew.

        Raises:
            PolicyRefused: if what it spends cannot be charged.
        """
        ...

    def sends(self, kind: str, task: protocol.Task | None, reply: Message) -> None:
        """Last, before the reply leaves, a refusal too: noted, and marked with what the log is then."""
        ...


class NoTerms:
    """A virtual hospital has none."""

    def unread(self, message: Message) -> None:
        """Nothing is noted."""

    def received(self, kind: str, task: protocol.Task, message: Message) -> None:
        """Anything may come in."""

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """All of it."""
        return content

    def reserving(self, kind: str, task: protocol.Task) -> contextlib.AbstractContextManager[Reserved]:
        """Nothing is charged: no ledger is kept of images that nobody is behind."""
        return contextlib.nullcontext(Reserved())

    def scored(self, task: protocol.Task) -> RecordDict | None:
        """Scores are computed whenever they are asked for."""
        return None

    def again(self, task: protocol.Task, content: RecordDict, token: str) -> RecordDict | None:
        """All of it."""
        return content

    def sends(self, kind: str, task: protocol.Task | None, reply: Message) -> None:
        """Nothing is noted, and there is no log whose mark it could carry."""


class Gate:
    """A ClientApp behind the site's terms.

    Args:
        app: the installed ClientApp.
        kept: the updates that were sent.
        terms: the site's.
        report: told of an exception; its text never travels.
    """

    def __init__(self, app: App, kept: reply_cache.Sent, terms: Terms, report: Report) -> None:
        self._app, self._kept, self._terms, self._report = app, kept, terms, report

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to one message; never an exception's text."""
        kind, task = message.metadata.message_type, None
        try:
            if kind not in KINDS:
                raise errors.ProtocolError("a message of an unknown kind")
            task = protocol.decode_task(message.content, self._kept.adapters.find)
            reply = self._judged(kind, task, message, context)
        except errors.Interrupted:
            raise
        except Exception as error:
            self._report("message", error)
            reply = Message(protocol.refusal(error), reply_to=message)
        try:
            if task is None:
                self._terms.unread(message)
            self._terms.sends(kind, task, reply)
        except errors.Interrupted:
            raise
        except Exception as error:  # what cannot be recorded must not leave
            self._report("audit log", error)
            reply = Message(protocol.refusal(error), reply_to=message)
        return reply

    def _judged(self, kind: str, task: protocol.Task, message: Message, context: Context) -> Message:
        self._terms.received(kind, task, message)
        if task.state is not None and task.recipe.codec != codecs.PLAIN:
            self._kept.adapters.keep(task.recipe.hash, task.state)
        scores = self._terms.scored(task) if kind == protocol.EVALUATE else None
        if scores is not None:
            return Message(scores, reply_to=message)
        known = self._kept.find(task) if kind == protocol.TRAIN else None
        free = None if known is None else self._terms.again(task, known, self._kept.token(task))
        if free is not None:
            self._settle(task)
            return Message(free, reply_to=message)
        with self._terms.reserving(kind, task) as reserved:
            if known is not None:  # refused, it stays: the data may come back as they were
                self._kept.drop(task)
            reply = self._app(message, context)
            if reply.has_error():
                return reply
            storage.fault_point("trained")
            reply = Message(self._terms.release(kind, task, reply.content), reply_to=message)
            if kind == protocol.TRAIN:
                self._kept.keep(task, reply, reserved.token)
                storage.fault_point("update-on-disk")
                reserved.charge(reply.content)
                storage.fault_point("update-charged")
                self._settle(task)
                storage.fault_point("residual-settled")
        return reply

    def _settle(self, task: protocol.Task) -> None:
        if task.state is not None:
            self._kept.residuals.settle(task.recipe.hash, task.round, task.state.fingerprint)
