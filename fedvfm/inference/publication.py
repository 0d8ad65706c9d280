"""Publish an adapter on Hugging Face: private unless told, with a card whose code runs, and nothing that names a site.

What goes is never a folder as it lies there: the files of a checked adapter by their names, or an export that is made
for it. The token is the one that ``hf auth login`` or ``HF_TOKEN`` gave; none is taken as an argument.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import download_fault, weights
from fedvfm.config import licence as licences
from fedvfm.config import schema
from fedvfm.inference import export, forms, publication_card
from fedvfm.model import adapter_folder
from fedvfm.storage import storage

PLAIN = "adapter"
"""The form that is fedvfm's own folder; the others are those of ``fedvfm export``."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ATTRIBUTES = ".gitattributes"
SHORT = 6
UNAUTHORISED, FORBIDDEN, CHANGED = 401, 403, 412
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:[\\/]|[\\/~])[\w.-]+[\\/]")


def push_to_hub(
    adapter: str | os.PathLike[str],
    repository: str,
    *,
    form: str = PLAIN,
    public: bool = False,
    licence: str = "",
    replace: bool = False,
    backbone: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a saved adapter, or an export of it, in one commit, and say what went where.

    Args:
        adapter: folder of a saved adapter.
        repository: "OWNER/NAME" on Hugging Face; made where it is not there.
        form: "adapter", or a format of :func:`fedvfm.export_adapter`.
        public: for all to see; else only you and those you let in.
        licence: of what is published, an SPDX identifier or LicenseRef-NAME; needed where it is public.
        replace: whether what the repository holds is replaced; its history keeps it.
        backbone: another place of the same backbone (its sha256 is still checked).
        dry_run: make and check everything, and send nothing.

    Raises:
        ConfigError: if the recipe names a backbone that nobody else has, or an option does not fit.
        LicenceForbids: if the backbone's licence forbids this form.
        CheckpointError, WeightsError: if adapter or backbone are damaged or not here.
        HubLogin: if nobody is logged in, or the login may not write there.
        OutputInUse: if the repository holds something and ``replace`` is not set.
        HubError, ProxyRefused, NetworkDown: if Hugging Face does not take it.
    """
    _require_options(repository, form, public, licence)
    with tempfile.TemporaryDirectory(prefix="fedvfm-push-") as scratch:
        folder, recipe = _staged(Path(adapter), Path(scratch), form, backbone)
        card = folder / adapter_folder.CARD
        before = card if card.is_file() else folder / "docs" / adapter_folder.CARD
        whole = publication_card.text(before.read_text(encoding="utf-8"), folder, repository, form, recipe, licence)
        storage.write_text(card, whole)
        _require_nothing_of_here(folder, Path(adapter))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        said = {
            "repository": repository,
            "form": form,
            "private": not public,
            "licence": licence or None,
            "files": {name: path.stat().st_size for name, path in files.items()},
            "card": whole,
        }
        return said if dry_run else said | _send(files, repository, public, replace, form)


def _require_options(repository: str, form: str, public: bool, licence: str) -> None:
    """Refuse what cannot be meant before anything is made."""
    faults = []
    if REPOSITORY.fullmatch(repository) is None:
        faults.append(f"'{repository}' is no name of a repository: give OWNER/NAME")
    if form != PLAIN and form not in forms.TABLE:
        faults.append(f"--format {form}: give {PLAIN} or {', '.join(forms.TABLE.names())}")
    if licence and re.fullmatch(licences.PATTERN, licence) is None:
        faults.append(f"--licence {licence}: give an SPDX identifier, for instance Apache-2.0, or LicenseRef-NAME")
    if public and not licence:
        faults.append("--public needs --licence: without one nobody may use what everybody sees")
    if faults:
        raise errors.ConfigError("push", faults)


def _staged(adapter: Path, scratch: Path, form: str, backbone: str | None) -> tuple[Path, schema.Recipe]:
    """A folder with what is published and nothing besides, made from the adapter; and its recipe."""
    recipe = export.recipe_of(adapter)
    _require_not_of_one_site(adapter)
    if recipe.backbone.name != "unet" and _is_place(recipe.backbone.name):
        raise errors.ConfigError(
            "push",
            [
                f"the adapter was trained on the backbone in '{recipe.backbone.name}', a folder of this machine: "
                "nobody else could load it. Give its weights a name ('fedvfm weights import FOLDER --name NAME') and "
                "train with recipe.backbone.name = NAME"
            ],
        )
    export.load_adapter(adapter, backbone=backbone)  # whole, undamaged, and of the backbone that it names
    clean = scratch / "adapter"
    export.copy_files(adapter, clean)
    if form == PLAIN:
        return clean, recipe
    folder = scratch / "export"
    forms.export_adapter(clean, folder, form, backbone=backbone)
    return folder, recipe


def _require_not_of_one_site(adapter: Path) -> None:
    """Refuse what a hospital's folder says must not leave it.

    Raises:
        ConfigError: if the adapter holds a site's own arrays, or was trained on without the noise of its recipe.
    """
    said = adapter / adapter_folder.STATEMENT
    bare = said.is_file() and re.search(rb'"private":\s*true', said.read_bytes()) is not None
    if bare or (adapter / adapter_folder.AS_IT_CAME).exists():
        why = (
            f"{adapter_folder.STATEMENT} says that it has no differential privacy"
            if bare
            else "it holds this site's own arrays"
        )
        raise errors.ConfigError(
            "push", [f"{adapter}: must not leave this site: {why}. Push the federation's adapter: ask the coordinator"]
        )


def _is_place(name: str) -> bool:
    return weights.NAME.fullmatch(name) is None or weights.is_folder(name)


def _require_nothing_of_here(folder: Path, adapter: Path) -> None:
    """Look for places of this machine in every file.

    Raises:
        ConfigError: naming the files that hold some.
    """
    homes = {str(Path.home()), str(adapter.resolve().parent), str(Path.cwd()), str(folder.parent)}
    words = {word.encode() for word in homes if len(word) > SHORT}  # a shorter one stands in weights by chance
    faults = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            held = [word.decode() for word in words if content.find(word) >= 0]
        if path.suffix == ".json":
            held += [text for text in _texts(json.loads(path.read_text())) if _ABSOLUTE.match(text)]
        faults += [f"{path.relative_to(folder)} names '{text}', a place of this machine" for text in held[:1]]
    if faults:
        raise errors.ConfigError("push: nothing was sent", faults)


def _texts(value: Any) -> Iterator[str]:
    """Every string in what a JSON file holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in _texts(each))


def _send(files: dict[str, Path], repository: str, public: bool, replace: bool, form: str) -> dict[str, Any]:
    """One commit with these files; nothing is sent before repository and login are known to be as they should."""
    import huggingface_hub

    _require_login()
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        there = api.model_info(repository)
        _require_kept_apart(repository, bool(there.private), public)
        others = [each.rfilename for each in there.siblings or () if each.rfilename != ATTRIBUTES]
        if others and not replace:
            raise errors.OutputInUse(
                f"{repository} holds {len(others)} files already (first: {others[0]}), and nothing was sent. Give "
                "--replace, which replaces all of them in one commit (its history keeps them), or another name"
            )
        changes: list[Any] = [huggingface_hub.CommitOperationAdd(name, path) for name, path in files.items()]
        changes += [huggingface_hub.CommitOperationDelete(name) for name in others if name not in files]
        commit = api.create_commit(
            repository, changes, commit_message=f"fedvfm: {form}", parent_commit=there.sha if others else None
        )
    except errors.FedvfmError:
        raise
    except Exception as error:  # of a client that raises OSError, ValueError and errors of its HTTP library
        raise _fault(repository, error) from None
    return {"url": f"{api.endpoint}/{repository}", "commit": commit.oid}


def _require_login() -> None:
    """Refuse without a token, and one that would travel in the clear.

    Raises:
        HubLogin: in both cases.
    """
    import huggingface_hub
    import huggingface_hub.constants

    if not huggingface_hub.get_token():
        raise errors.HubLogin(
            "nobody is logged in to Hugging Face here, and nothing was sent. Run 'hf auth login', or set HF_TOKEN to a "
            "token that may write"
        )
    address = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if address.scheme != "https" and address.hostname not in LOOPBACK:
        raise errors.HubLogin(
            f"HF_ENDPOINT is {address.scheme}://{address.hostname}: your token would travel there for all to read, and "
            "nothing was sent. Give an address with https"
        )


def _require_kept_apart(repository: str, private: bool, public: bool) -> None:
    """A repository that is there already is as its owner made it, whatever was asked for.

    Raises:
        ConfigError: if all could see what is to be private.
    """
    if not private and not public:
        raise errors.ConfigError(
            "push",
            [
                f"{repository} is public, and nothing was sent. Give --public if all may see it, or the name of a "
                "private repository"
            ],
        )


def _fault(repository: str, error: BaseException) -> errors.FedvfmError:
    """What to tell of what Hugging Face's client raised. The texts of its answers are not passed on."""
    names, status = download_fault.kinds(error), download_fault.status(error)
    what = f"{repository} was not published"
    if status == UNAUTHORISED:
        return errors.HubLogin(f"{what}: Hugging Face does not take your token. Run 'hf auth login' again")
    if status == FORBIDDEN:
        owner = repository.partition("/")[0]
        return errors.HubLogin(
            f"{what}: your token may not write there. Give it the right to write to '{owner}' at "
            f"{download_fault.PLACE}/settings/tokens, or name a repository of your own"
        )
    if status == CHANGED:
        return errors.HubError(f"{what}: it was changed by somebody meanwhile. Look at it, then run this again")
    if unreachable := download_fault.unreachable(what, names, "publish from a machine with internet"):
        return unreachable
    answered = f"Hugging Face answered {status}" if status else type(error).__name__
    return errors.HubError(f"{what} ({answered}). Nothing is half there: a commit is whole or not at all. Try again")


def summary(said: dict[str, Any]) -> Sequence[str]:
    """What a person is told of :func:`push_to_hub`, line by line."""
    size = sum(said["files"].values())
    seen = "only you and those you let in" if said["private"] else "everybody"
    lines = [f"  {bytes_:>14,}  {name}" for name, bytes_ in said["files"].items()]
    if "commit" in said:
        return [*lines, f"{said['url']}: {said['form']}, {size:,} bytes, seen by {seen}, commit {said['commit'][:12]}"]
    return [*lines, f"{said['repository']}: {said['form']}, {size:,} bytes, would be seen by {seen}; nothing was sent"]
