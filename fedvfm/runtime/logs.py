"""Where this program's log goes: words on a person's terminal, or a line of JSON for each record of a child process.

Modules log by ``logging.getLogger(__name__)``, and importing them configures nothing. A process of ours says here where
its records go; the root logger, and with it any handler of another library, gets none of them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Iterator

NAME = "fedvfm"


class _Output(logging.Handler):
    """A stream of this process, whichever it is now: a display of bars may have taken its place."""

    def __init__(self, stream: str, as_json: bool) -> None:
        super().__init__()
        self._stream, self._as_json = stream, as_json

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()  # and never a traceback: it may name a file or a patient
        if not self._as_json:  # names of files come from strangers: none of their control characters gets through
            return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        values = getattr(record, "fields", {"text": text})
        return json.dumps({"time": time, "level": record.levelname.lower(), "logger": record.name, **values})

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a full disk takes no log; what must be kept says so by itself
            print(self.format(record), file=getattr(sys, self._stream), flush=True)


@contextlib.contextmanager
def output(*, as_json: bool = False, stream: str = "stderr", level: int = logging.INFO) -> Iterator[None]:
    """Send this program's records to a stream of this process while the block runs.

    Args:
        as_json: a line of JSON each: time, level, logger, and the record's text or, in its place, its ``fields``, a
            dictionary given as ``extra``. Else its text, for a person.
        stream: ``stdout`` or ``stderr``.
        level: what is below it is left out.
    """
    logger = logging.getLogger(NAME)
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Output(stream, as_json)], False
    try:
        with limited(level, NAME):
            yield
    finally:
        logger.handlers, logger.propagate = before


@contextlib.contextmanager
def limited(level: int, *names: str) -> Iterator[None]:
    """Leave out what these loggers, of any library, log below a level while the block runs."""
    before = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    try:
        for logger, _ in before:
            logger.setLevel(level)
        yield
    finally:
        for logger, was in before:
            logger.setLevel(was)
