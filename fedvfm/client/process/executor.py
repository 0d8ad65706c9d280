"""The executor: one warm process that answers a SuperNode's messages with the installed fedvfm.

Flower would start a new process for every message and put the code of the run's bundle first on its path. This one
keeps the backbone in memory, never opens the bundle, and lets nothing but a reply or a typed refusal out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.flower import guards, runtime, supernode

LOG = logging.getLogger(__name__)
POLL_S = 0.25
"""The least time between two questions for a task."""
AWAY_S = 1.0

Answer = Callable[[Message, Context], Message]


def serve(
    link: runtime.Link,
    answer: Answer,
    stop: threading.Event,
    most_bytes: Callable[[], int] = lambda: guards.MAX_REPLY,
) -> None:
    """Answer messages until ``stop``; a SuperNode that is away is waited for.

    Args:
        link: the SuperNode.
        answer: message and context to reply; lets no exception out but one that must end the process.
        stop: ends it between two messages.
        most_bytes: asked for each message: how large it may be.
    """
    tasks = supernode.NodeTasks(link, stop, most_bytes)
    away = False
    while not stop.is_set():
        asked = time.monotonic()
        try:
            task = tasks.take()
        except errors.EngineError as error:
            if not away:
                LOG.warning(f"waiting for the SuperNode: {error}")
            away = True
            stop.wait(AWAY_S)
            continue
        away = False
        if task is None:  # a SuperNode of ours held the question until its time was over
            stop.wait(max(0.0, asked + POLL_S - time.monotonic()))
        else:
            _answer(task, answer)
    tasks.close()


def _answer(task: supernode.ClientTask, answer: Answer) -> None:
    try:
        reply = answer(task.message, task.context)
        if task.lost.is_set():
            LOG.warning("the SuperNode gave the task up meanwhile; its reply is kept for when it is asked again")
        else:
            task.answer(reply)
    except errors.EngineError as error:
        LOG.warning(f"the reply could not be handed over ({error}); it is kept for when it is asked again")
    finally:
        task.close()
