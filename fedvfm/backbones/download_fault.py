"""Why weights could not be downloaded: a typo, a gated repository, a proxy, or no network. Each has its own remedy."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence

from fedvfm import errors, registry

PLACE = "https://huggingface.co"
UNAUTHORISED = 401


def of(hub: str, revision: str | None, error: BaseException, known: Sequence[str]) -> errors.WeightsError:
    """The error to raise for what Hugging Face's client raised.

    Args:
        hub: name of the repository.
        revision: that was asked for.
        error: what was raised; its causes tell what happened below.
        known: names of repositories, to find the nearest.
    """
    names = kinds(error)
    what = f"backbone '{hub}' is not on this machine and cannot be downloaded"
    if "GatedRepoError" in names:
        terms = f"accept its terms at {PLACE}/{hub} with your account, then set HF_TOKEN to a token of it"
        return errors.WeightsGated(f"{what}: the repository is gated; {terms}")
    if "RevisionNotFoundError" in names:
        return errors.WeightsUnknown(f"{what}: the repository has no revision '{revision}'; {PLACE}/{hub} lists them")
    answer = status(error)
    if answer == UNAUTHORISED or names & {"RepositoryNotFoundError", "HFValidationError"}:
        near = registry.nearest(hub, list(known))
        return errors.WeightsUnknown(
            f"{what}: Hugging Face has no repository of that name, or it is private{near}. Check the spelling; for a "
            "private one set HF_TOKEN, and where it is set, check that it still holds"
        )
    if fault := unreachable(what, names, _by_hand(hub)):
        return fault
    answered = f"Hugging Face answered {answer}" if answer else type(error).__name__
    return errors.WeightsError(f"{what} ({answered}). Try again later, or {_by_hand(hub)}")


def kinds(error: BaseException) -> set[str]:
    """The names of all classes of an error and its causes: the client's own, and those of httpx or httpx2."""
    return {kind.__name__ for raised in _chain(error) for kind in type(raised).__mro__}


def status(error: BaseException) -> int:
    """What the hub's HTTP answer was; 0 where there was none."""
    codes = (int(getattr(getattr(raised, "response", None), "status_code", 0) or 0) for raised in _chain(error))
    return next((code for code in codes if code), 0)


def unreachable(what: str, names: set[str], instead: str) -> errors.WeightsError | None:
    """The error for a hub that was not reached; None where it was.

    Args:
        what: did not happen.
        names: of :func:`kinds`.
        instead: what else a person may do.
    """
    if "OfflineModeIsEnabled" in names:
        return errors.NetworkDown(f"{what}: HF_HUB_OFFLINE is set, so nothing is asked. Unset it, or {instead}")
    if not names & {"ConnectError", "TimeoutException", "ProxyError", "ConnectionError", "TimeoutError"}:
        return None
    proxy = _proxy()
    if "SSLCertVerificationError" in names:
        between = f"the proxy {proxy}" if proxy else "something between here and there"
        return errors.ProxyRefused(
            f"{what}: {between} answers with a certificate that is not trusted here. Ask your IT for the authority "
            f"that it is issued by, name its file in SSL_CERT_FILE, or {instead}"
        )
    if proxy or "ProxyError" in names:
        return errors.ProxyRefused(
            f"{what}: not through the proxy {proxy or 'that is set'}. Check HTTPS_PROXY and NO_PROXY, ask its people "
            f"to let huggingface.co through, or {instead}"
        )
    return errors.NetworkDown(
        f"{what}: huggingface.co cannot be reached. Check the network, set HTTPS_PROXY where there is a proxy, or "
        f"{instead}"
    )


def _by_hand(hub: str) -> str:
    return (
        f"on a machine with internet run 'fedvfm weights fetch {hub}', bring its folder here and name it in "
        "recipe.backbone.name"
    )


def _proxy() -> str:
    """Host and port of the proxy in use, without what may be a password; empty where there is none."""
    given = urllib.request.getproxies()
    if urllib.request.proxy_bypass("huggingface.co"):
        return ""
    address = given.get("https") or given.get("all") or ""
    return urllib.parse.urlsplit(address if "//" in address else f"//{address}").netloc.rpartition("@")[2]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
