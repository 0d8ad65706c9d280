"""One message at the gate and the reply to it: all that the steps of the gate know. Nothing of it outlives them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.client.gate import reply_cache
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.protocol import envelope as envelopes
from fedvfm.protocol import protocol
from fedvfm.state import state
from fedvfm.storage import hash_chain

KINDS = tuple(kind for kind in protocol.WORDS if kind != protocol.SURVEY)
"""Kinds of message that are about a recipe."""

App = Callable[[Message, Context], Message]


def no_charge(digest: str) -> None:
    """Charges nothing."""


@dataclass
class Exchange:
    """A message, and what the steps of the gate come to know of it one after the other.

    Attributes:
        message: as it came.
        context: Flower's.
        app: the installed ClientApp.
        sent: the updates and scores that are kept.
        envelope: of the message.
        task: what it asks; None until it is read, and where it cannot be.
        survey: the same of a message that asks for statistics.
        came: what the audit log notes of the message.
        started: when work on it began, by the monotonic clock; anew where time was noted already.
        rules: the policy that it is judged by.
        accepted: whether it was, so that time spent on it counts.
        as_kept: whether it was accepted because its answer lies here.
        known: the update that was sent for it before and may leave no more.
        charge: charges what it spends, by the sha256 of the records that leave.
        token: of the reservation in the ledger; "" where there is none.
        ledger: the mark of the ledger that the reply carries.
        computed: what the app answered.
        reply: what leaves.
        held: what is held while it is answered: a reservation.
    """

    message: Message
    context: Context
    app: App
    sent: reply_cache.Sent
    envelope: envelopes.Envelope
    task: protocol.Task | None = None
    survey: surveys.Survey | None = None
    came: Mapping[str, Any] = field(default_factory=dict)
    started: float = 0.0
    rules: schema.PolicyConfig | None = None
    accepted: bool = False
    as_kept: bool = False
    known: envelopes.Envelope | None = None
    charge: Callable[[str], None] = no_charge
    token: str = ""
    ledger: hash_chain.Mark | None = None
    computed: envelopes.Envelope | None = None
    reply: Message | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def kind(self) -> str:
        """Of the message."""
        return str(self.message.metadata.message_type)

    @property
    def asked(self) -> protocol.Task:
        """What the message asks; a step that comes after it was read.

        Raises:
            ProtocolError: if it was not read.
        """
        if self.task is None:
            raise errors.ProtocolError("a message that cannot be read")
        return self.task

    @property
    def about(self) -> dict[str, str]:
        """What it is about, as the audit log names it."""
        return {"recipe": self.recipe.hash} if self.survey is None else {"fingerprint": self.survey.hash}

    @property
    def recipe(self) -> schema.Recipe:
        """Of the message."""
        return self.asked.recipe

    @property
    def policy(self) -> schema.PolicyConfig:
        """The policy that it is judged by; a step that comes after it was read.

        Raises:
            ProtocolError: if it was not read.
        """
        if self.rules is None:
            raise errors.ProtocolError("a message that no policy judged")
        return self.rules

    @property
    def base(self) -> state.AdapterState:
        """The adapter that came with the message.

        Raises:
            ProtocolError: if none came.
        """
        if self.asked.state is None:
            raise errors.ProtocolError("a message without an adapter")
        return self.asked.state

    @property
    def made(self) -> envelopes.Envelope:
        """What the app answered; a step that comes after it did.

        Raises:
            ProtocolError: if it did not.
        """
        if self.computed is None:
            raise errors.ProtocolError("a message that nothing was computed for")
        return self.computed

    @property
    def leaving(self) -> envelopes.Envelope:
        """The envelope of the reply."""
        return envelopes.of(self.answer)

    @property
    def answer(self) -> Message:
        """The reply; a step that comes after it was made.

        Raises:
            ProtocolError: if it was not made.
        """
        if self.reply is None:
            raise errors.ProtocolError("a message without a reply")
        return self.reply

    def leave(self, records: envelopes.Envelope) -> None:
        """Let these records be the reply."""
        self.reply = envelopes.close(records, self.message)

    def refuse(self, error: Exception) -> None:
        """Let a word be the reply; never the text of an exception."""
        self.reply = Message(protocol.refusal(error), reply_to=self.message)
