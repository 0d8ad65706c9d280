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
    # By name: the client's own errors, and those of httpx or httpx2, whichever it stands on.
    names = {kind.__name__ for raised in _chain(error) for kind in type(raised).__mro__}
    what = f"backbone '{hub}' is not on this machine and cannot be downloaded"
    if "GatedRepoError" in names:
        terms = f"accept its terms at {PLACE}/{hub} with your account, then set HF_TOKEN to a token of it"
        return errors.WeightsGated(f"{what}: the repository is gated; {terms}")
    if "RevisionNotFoundError" in names:
        return errors.WeightsUnknown(f"{what}: the repository has no revision '{revision}'; {PLACE}/{hub} lists them")
    status = next((code for raised in _chain(error) if (code := _status(raised))), 0)
    if status == UNAUTHORISED or names & {"RepositoryNotFoundError", "HFValidationError"}:
        near = registry.nearest(hub, list(known))
        return errors.WeightsUnknown(
            f"{what}: Hugging Face has no repository of that name, or it is private{near}. Check the spelling; for a "
            "private one set HF_TOKEN, and where it is set, check that it still holds"
        )
    if "OfflineModeIsEnabled" in names:
        return errors.NetworkDown(f"{what}: HF_HUB_OFFLINE is set, so nothing is asked. Unset it, or {_by_hand(hub)}")
    if names & {"ConnectError", "TimeoutException", "ProxyError", "ConnectionError", "TimeoutError"}:
        return _unreachable(hub, what, names)
    answered = f"Hugging Face answered {status}" if status else type(error).__name__
    return errors.WeightsError(f"{what} ({answered}). Try again later, or {_by_hand(hub)}")


def _unreachable(hub: str, what: str, names: set[str]) -> errors.WeightsError:
    proxy = _proxy()
    if proxy or "ProxyError" in names:
        return errors.ProxyRefused(
            f"{what}: not through the proxy {proxy or 'that is set'}. Check HTTPS_PROXY and NO_PROXY, ask its people "
            f"to let huggingface.co through, or {_by_hand(hub)}"
        )
    return errors.NetworkDown(
        f"{what}: huggingface.co cannot be reached. Check the network, set HTTPS_PROXY where there is a proxy, or "
        f"{_by_hand(hub)}"
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


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
