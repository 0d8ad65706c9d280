"""One envelope a message: what its records say, their sha256 and their bytes, each made once and only if asked for.

An end opens the envelope of a message when it comes, or closes one when it is made, and passes it along: nobody
decodes, digests or serialises the same records a second time. The marks of the sender's logs are no part of it: they
are put on the message last, and differ each time it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flwr.app import Message, RecordDict

from fedvfm.flower import internals
from fedvfm.protocol import codecs, protocol
from fedvfm.state import state


@dataclass(frozen=True, eq=False)
class Envelope:
    """The records of one message, or of many that share them. Nothing of it changes; what is asked for is kept.

    Attributes:
        content: the records; marks among them count for nothing.
        held: adapters that this end holds; a message of the coordinator may be a difference to one of them.
        base: the adapter that an update may be a difference to, where that is known.
    """

    content: RecordDict
    held: protocol.Held = protocol.nothing
    base: state.AdapterState | None = None

    def __post_init__(self) -> None:
        """Keep a list of the records of its own: others may put other records into theirs."""
        object.__setattr__(self, "content", RecordDict({**self.content}))

    @classmethod
    def of_update(cls, content: RecordDict, update: state.SiteUpdate) -> Envelope:
        """The envelope of an update that was just written into these records, so that nobody has to read it again."""
        envelope = cls(content)
        envelope.__dict__["update"] = update
        return envelope

    @classmethod
    def of_evaluation(cls, evaluation: protocol.Evaluation) -> Envelope:
        """The same of scores."""
        envelope = cls(protocol.encode_evaluation(evaluation))
        envelope.__dict__["evaluation"] = evaluation
        return envelope

    @cached_property
    def task(self) -> protocol.Task:
        """What a coordinator asks; raises as :func:`fedvfm.protocol.protocol.decode_task`."""
        return protocol.decode_task(self.content, self.held)

    @cached_property
    def coded(self) -> bool:
        """Whether an update holds a difference in place of its arrays."""
        return bool(protocol.base_of(self.content))

    @cached_property
    def update(self) -> state.SiteUpdate:
        """What a site trained; raises as :func:`fedvfm.protocol.protocol.decode_update`."""
        return protocol.decode_update(self.content, self.base)

    def update_on(self, base: state.AdapterState, codec: str) -> state.SiteUpdate:
        """What a site trained, where both ends agreed to a codec: a difference is added to ``base``.

        Raises:
            ProtocolError: if it is not of that form or codec.
        """
        if codec == codecs.PLAIN and not self.coded:
            return self.update
        return protocol.decode_update(self.content, base, codec)

    @cached_property
    def evaluation(self) -> protocol.Evaluation:
        """The scores of a site; raises as :func:`fedvfm.protocol.protocol.decode_evaluation`."""
        return protocol.decode_evaluation(self.content)

    @cached_property
    def digest(self) -> str:
        """sha256 of the records; see :func:`fedvfm.protocol.protocol.digest`."""
        return protocol.digest(self.content)

    @cached_property
    def records(self) -> bytes:
        """The records serialised. Kept, so ask for it only where they are needed; for their number see ``length``."""
        return internals.records(protocol.unmarked(self.content))

    @cached_property
    def length(self) -> int:
        """How many bytes the serialised records are."""
        known: bytes | None = self.__dict__.get("records")
        return len(internals.records(protocol.unmarked(self.content)) if known is None else known)

    @property
    def body(self) -> bytes:
        """The records as they follow the head of a message; see :func:`fedvfm.flower.internals.head`."""
        return internals.frame(len(self.records)) + self.records

    def holds(self, content: RecordDict) -> bool:
        """Whether these are its records, whatever marks were put beside them."""
        mine, theirs = protocol.unmarked(self.content), protocol.unmarked(content)
        return set(mine) == set(theirs) and all(mine[name] is theirs[name] for name in mine)


def of(message: Message, held: protocol.Held = protocol.nothing) -> Envelope:
    """The envelope of a message, opened the first time."""
    known = internals.attached(message)
    if isinstance(known, Envelope) and message.has_content() and known.holds(message.content):
        return known
    opened = Envelope(message.content if message.has_content() else RecordDict(), held)
    internals.attach(message, opened)
    return opened


def close(envelope: Envelope, asked: Message) -> Message:
    """The reply to a message with the records of an envelope."""
    reply = Message(envelope.content, reply_to=asked)
    internals.attach(reply, envelope)
    return reply


def share(messages: Sequence[Message]) -> None:
    """Let messages to many sites that have the same records have one envelope, serialised once."""
    opened: dict[int, Envelope] = {}
    for message in messages:
        envelope = opened.setdefault(id(message.content), Envelope(message.content))
        internals.attach(message, envelope)


def size(message: Message) -> int:
    """Bytes of the serialised message, its marks among them; what of it is known already is not serialised again."""
    known = internals.known_size(message)
    if known is not None:
        return known
    if not message.has_content():
        return internals.size(message)
    length = of(message).length + len(internals.records(protocol.only_marks(message.content)))
    return len(internals.head(message)) + len(internals.frame(length)) + length
