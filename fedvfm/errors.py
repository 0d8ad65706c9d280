"""The exception tree: every error a user can cause or meet has a class here.

The message says cause, value, limit and remedy. The command line prints it as one line and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedvfmError(Exception):
    """Base of every error that is shown to the user without a traceback."""

    exit_code = 1


class ConfigError(FedvfmError):
    """A configuration has faults; all of them are listed, one a line."""

    exit_code = 2

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        number = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{what}: {number}{lines}")


class UnknownName(ConfigError):
    """A name that stands in no table; the message lists the known names and the nearest one."""

    def __init__(self, fault: str) -> None:
        FedvfmError.__init__(self, fault)
        self.faults = (fault,)


class DataError(FedvfmError):
    """An image, mask, label or folder that cannot be used as it is.

    ``faults`` holds every fault where several are known; the message may show only the first of them.
    """

    exit_code = 3

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(message)


class PartitionError(DataError):
    """The samples cannot be divided as asked."""


class WeightsError(FedvfmError):
    """Backbone weights are missing, damaged or not the pinned ones."""

    exit_code = 4


class CheckpointError(FedvfmError):
    """A checkpoint or an adapter file is missing, damaged or does not fit."""

    exit_code = 5


class OutputInUse(FedvfmError):
    """The output folder already holds something."""

    exit_code = 6


class StorageError(FedvfmError):
    """The disk refused a write (full, read-only, over a quota)."""

    exit_code = 7


class ProtocolError(FedvfmError):
    """A message between server and site does not say what it must."""

    exit_code = 8


class HandshakeRefused(ProtocolError):
    """A site and the server do not hold the same backbone, manifest or version."""


class Refused(ProtocolError):
    """A site's reply was not admitted; ``reason`` is a short stable name, ``detail`` the numbers."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class AdapterMissing(ProtocolError):
    """A difference came to an adapter that this end does not hold; the whole adapter is sent in its place."""


class EmptyCohort(ProtocolError):
    """No update was left to aggregate."""


class QuorumMissed(ProtocolError):
    """Fewer sites answered than the quorum asks for."""


class TrainingError(FedvfmError):
    """Training went wrong: a loss that is not finite, an adapter that did not move."""

    exit_code = 9


class DeadlinePassed(TrainingError):
    """The message's time was over before the work was done; nobody waits for it any more."""


class MissingExtra(FedvfmError):
    """An optional package is needed; the message says how to install it."""

    exit_code = 10


class EngineError(FedvfmError):
    """What carries the messages (Ray) could not be started, or broke."""

    exit_code = 11


class TrustError(FedvfmError):
    """An invite, request, key, fingerprint, signature or approval that cannot be trusted, or was used before."""

    exit_code = 12


class PolicyRefused(ProtocolError):
    """The site's policy, or its person in charge, does not accept what was asked.

    ``reason`` is one of the words of ``protocol.ERROR_CODES`` and all that the coordinator is told; ``detail`` stays at
    the site.
    """

    exit_code = 13

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class AuditError(FedvfmError):
    """An audit log is not what it was: edited, cut, rolled back or rewritten."""

    exit_code = 14


class NothingCompared(FedvfmError):
    """A receipt or log says nothing that the one at hand can be compared with; that is no fault of either."""

    exit_code = 17


class BudgetExceeded(PolicyRefused):
    """A round would take more of a site's privacy budget than is left; the coordinator is told "privacy-budget"."""

    exit_code = 15

    def __init__(self, detail: str) -> None:
        super().__init__("privacy-budget", detail)

    def __str__(self) -> str:
        return self.detail


class LedgerError(PolicyRefused):
    """A site's privacy ledger cannot be charged: it was rolled back, lost its key, or counts another unit."""

    exit_code = 16

    def __init__(self, detail: str) -> None:
        super().__init__("privacy-ledger", detail)

    def __str__(self) -> str:
        return self.detail


class Interrupted(FedvfmError):
    """The user stopped the run; what was finished is saved."""

    exit_code = 130
