"""The exception tree: every error a user can cause or meet has a class here.

The message says cause, value, limit and remedy. The command line prints it as one line and exits with ``exit_code``.
Programs read ``code``, never the message: the text may change in any release, a code does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self


class FedvfmError(Exception):
    """Any error that is shown to the user without a traceback; this class itself for those of no other kind.

    Attributes:
        code: short stable name of the kind of error.
        exit_code: what the command line ends with.
        restart: whether the same command may succeed later with nothing changed, so that systemd and the server's
            supervisor start it again.
    """

    code = "error"
    exit_code = 1
    restart = True


class ConfigError(FedvfmError):
    """A configuration has faults; all of them are listed, one a line."""

    code = "config"
    exit_code = 2
    restart = False

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        number = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{what}: {number}{lines}")


class UnknownName(ConfigError):
    """A name that stands in no table; the message lists the known names and the nearest one."""

    code = "unknown-name"

    def __init__(self, fault: str) -> None:
        FedvfmError.__init__(self, fault)
        self.faults = (fault,)


class LicenceForbids(ConfigError):
    """The licence of the backbone's weights forbids what was asked; nothing was written."""

    code = "licence"


class AdapterTooLarge(ConfigError):
    """An adapter is too large to travel between coordinator and sites, or has too many arrays; nothing was made."""

    code = "adapter-too-large"


class Fault(str):
    """What is wrong with data, in one sentence for people, with a code for programs.

    Attributes:
        code: a stable name of the kind of fault: see :mod:`fedvfm.data.defect`.
        values: numbers of a mask that it is about.
    """

    code: str
    values: tuple[int, ...]

    def __new__(cls, text: str, code: str, values: Sequence[int] = ()) -> Self:
        """A fault: text, code and values as above."""
        fault = super().__new__(cls, text)
        fault.code, fault.values = code, tuple(values)
        return fault

    def __getnewargs__(self) -> tuple[str, str, tuple[int, ...]]:  # type: ignore[override]
        """What a copy is made of."""
        return str(self), self.code, self.values


class DataError(FedvfmError):
    """An image, mask, label or folder that cannot be used as it is.

    Attributes:
        faults: every fault where several are known; the message may show only the first of them.
        code: as in :class:`Fault`, given or that of all faults; "data" where it is about something else.
        values: as in :class:`Fault`.
    """

    code = "data"
    exit_code = 3
    restart = False

    def __init__(self, message: str, faults: Sequence[str] = (), *, code: str = "", values: Sequence[int] = ()) -> None:
        codes = {fault.code if isinstance(fault, Fault) else "" for fault in faults}
        self.faults, self.values = tuple(faults), tuple(values)
        self.code = str(code or (codes.pop() if len(codes) == 1 else "") or type(self).code)
        super().__init__(message)

    def fault(self, folder: Path | None = None) -> Fault:
        """The error as an entry of a list of faults; files of ``folder`` are named from there."""
        text = str(self) if folder is None else str(self).replace(f"{folder}/", "")
        return Fault(text, self.code, self.values)

    def at(self, where: object) -> DataError:
        """The same error that says where it is."""
        return DataError(f"{where}: {self}", self.faults, code=self.code, values=self.values)


class PartitionError(DataError):
    """The samples cannot be divided as asked."""

    code = "partition"


class BoxesError(DataError):
    """Boxes given to a prediction that fit no image, class or place of it, or an image without any."""

    code = "boxes"


class WordsError(ConfigError):
    """Sentences of ``recipe.words`` that the model's tokenizer cannot read as they are meant; all are listed."""

    code = "words"


class WeightsError(FedvfmError):
    """Backbone weights are missing, damaged or not the pinned ones."""

    code = "weights"
    exit_code = 4
    restart = False


class WeightsUnknown(WeightsError):
    """Nobody publishes weights of that name or revision, as after a slip of the pen; or they are private."""

    code = "weights-unknown"


class TokenizerError(WeightsError):
    """The tokenizer.json beside the weights is missing, damaged, not the pinned one or of another model."""

    code = "tokenizer"


class WeightsGated(WeightsError):
    """The publisher asks for an account that has accepted terms."""

    code = "weights-gated"


class ProxyRefused(WeightsError):
    """Nothing can be downloaded through the proxy that is set."""

    code = "proxy"


class NetworkDown(WeightsError):
    """Where weights are published cannot be reached, or nothing may be asked there."""

    code = "network"


class CheckpointError(FedvfmError):
    """A checkpoint or an adapter file is missing, damaged or does not fit."""

    code = "checkpoint"
    exit_code = 5
    restart = False


class OutputInUse(FedvfmError):
    """The output folder already holds something."""

    code = "output-in-use"
    exit_code = 6
    restart = False


class StorageError(FedvfmError):
    """The disk refused a write (full, read-only, over a quota)."""

    code = "storage"
    exit_code = 7


class ProtocolError(FedvfmError):
    """A message between server and site does not say what it must."""

    code = "protocol"
    exit_code = 8
    restart = False


class HandshakeRefused(ProtocolError):
    """A site and the server do not hold the same backbone, manifest or version."""

    code = "handshake-refused"


class ClassUnlabelled(ProtocolError):
    """A class of the recipe is labelled by none of the sites, so nothing would be learned of it."""

    code = "class-unlabelled"
    restart = False


class Refused(ProtocolError):
    """A site's reply was not admitted; ``reason`` is a short stable name, ``detail`` the numbers."""

    code = "update-refused"

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class AdapterMissing(ProtocolError):
    """A difference came to an adapter that this end does not hold; the whole adapter is sent in its place."""

    code = "adapter-missing"


class SecureAggregationError(ProtocolError):
    """A step of secure aggregation cannot be taken; ``reason`` is a short stable name, ``detail`` stays at this end."""

    code = "secure-aggregation"

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class EmptyCohort(ProtocolError):
    """No update was left to aggregate."""

    code = "empty-cohort"


class QuorumMissed(ProtocolError):
    """Fewer sites answered than the quorum asks for."""

    code = "quorum-missed"


class TrainingError(FedvfmError):
    """Training went wrong: a loss that is not finite, an adapter that did not move."""

    code = "training"
    exit_code = 9
    restart = False


class DeadlinePassed(TrainingError):
    """The message's time was over before the work was done; nobody waits for it any more."""

    code = "deadline-passed"


class MissingExtra(FedvfmError):
    """An optional package is needed; the message says how to install it."""

    code = "missing-extra"
    exit_code = 10
    restart = False


class EngineError(FedvfmError):
    """What carries the messages (Ray) could not be started, or broke."""

    code = "engine"
    exit_code = 11


class DecoderError(EngineError):
    """The process that decodes images cannot be started on this machine; no fault of a file."""

    code = "decoder"


class DeviceError(EngineError):
    """The device of a site does not compute, computes wrong numbers, or is full; asked before each round."""

    code = "device"


class JobError(EngineError):
    """A batch job gave no answer; ``reason`` is a word of ``protocol.ERROR_CODES``, ``detail`` stays at the site."""

    code = "job"

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


class TrustError(FedvfmError):
    """An invite, request, key, fingerprint, signature or approval that cannot be trusted, or was used before."""

    code = "trust"
    exit_code = 12
    restart = False


class PolicyRefused(ProtocolError):
    """The site's policy, or its person in charge, does not accept what was asked.

    ``reason`` is one of the words of ``protocol.ERROR_CODES`` and all that the coordinator is told; ``detail`` stays at
    the site.
    """

    code = "policy-refused"
    exit_code = 13
    restart = False

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class AuditError(FedvfmError):
    """An audit log is not what it was: edited, cut, rolled back or rewritten."""

    code = "audit"
    exit_code = 14
    restart = False


class NothingCompared(FedvfmError):
    """A receipt or log says nothing that the one at hand can be compared with; that is no fault of either."""

    code = "nothing-compared"
    exit_code = 17
    restart = False


class BudgetExceeded(PolicyRefused):
    """A round would take more of a site's privacy budget than is left; the coordinator is told "privacy-budget"."""

    code = "budget-exceeded"
    exit_code = 15

    def __init__(self, detail: str) -> None:
        super().__init__("privacy-budget", detail)

    def __str__(self) -> str:
        return self.detail


class LedgerError(PolicyRefused):
    """A site's privacy ledger cannot be charged: it was rolled back, lost its key, or counts another unit."""

    code = "ledger"
    exit_code = 16

    def __init__(self, detail: str) -> None:
        super().__init__("privacy-ledger", detail)

    def __str__(self) -> str:
        return self.detail


class ClaimRefuted(FedvfmError):
    """An audit shows that the epsilon an experiment claims is false, with the confidence that was asked for."""

    code = "claim-refuted"
    exit_code = 18
    restart = False


class HubError(FedvfmError):
    """Hugging Face did not take what was to be published; a commit is whole there, or not at all."""

    code = "hub"
    exit_code = 19
    restart = False


class HubLogin(HubError):
    """Nobody is logged in to Hugging Face here, or the login may not write there; nothing was sent."""

    code = "hub-login"


class Interrupted(FedvfmError):
    """The user stopped the run; what was finished is saved."""

    code = "interrupted"
    exit_code = 130


def tree(top: type[FedvfmError] = FedvfmError) -> tuple[type[FedvfmError], ...]:
    """A class and all below it in this module, each before those that it is the base of."""
    own = (child for child in top.__subclasses__() if child.__module__ == __name__)
    return (top, *(each for child in own for each in tree(child)))


NOT_READY = 20
"""The exit code of ``data check`` and ``doctor`` where something must be mended first; no error is raised for it."""
LASTING = tuple(sorted({NOT_READY} | {each.exit_code for each in tree() if not each.restart}))
"""Exit codes that another start does not mend."""
