"""A look-out while an end runs: what ``fedvfm doctor`` would call a blocker is told once, and when it is over.

Flower's SuperNode asks for ever and says nothing where a proxy wants a password or nobody listens, and a full disk
takes no log. Their people read it here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

from fedvfm import errors
from fedvfm.report import finding
from fedvfm.runtime import processes

LOG = logging.getLogger(__name__)
FIRST_S, EVERY_S, AGAIN_S = 5.0, 60.0, 10.0
"""After the start; then so often; sooner while something is wrong."""


class Lookout:
    """Looks again and again, and logs what changed.

    Args:
        look: what is looked at; each look is short and sends nothing but a question for the health.
    """

    def __init__(self, look: Callable[[], Iterable[finding.Row]]) -> None:
        self._look = look
        self._wrong: dict[str, str] = {}

    def once(self) -> bool:
        """Look now; whether all is well. What is still as wrong as at the last look is not told again."""
        found = {one.check: one for one in finding.caught("state", self._look) if one.severity == finding.BLOCKER}
        for check, one in found.items():
            # Numbers in the problem may change with every look; what to do does not.
            if self._wrong.get(check) != one.remedy:
                LOG.error(f"{check}: {one.problem}. Remedy: {one.remedy}")
        for check in self._wrong.keys() - found.keys():
            LOG.info(f"{check}: is well again")
        self._wrong = {check: one.remedy for check, one in found.items()}
        return not found

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look in a thread while the block runs."""

        def watch() -> float:
            with contextlib.suppress(OSError, errors.FedvfmError):
                return EVERY_S if self.once() else AGAIN_S
            return AGAIN_S

        with processes.repeated(watch, FIRST_S, "fedvfm-lookout", patient=False):  # a look at the network may take long
            yield
