"""Publishing: the real client of Hugging Face against a server that answers as the hub does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

import fedvfm
from fedvfm import errors
from fedvfm.backbones import convert
from fedvfm.client.adoption import decisions
from fedvfm.client.personal import statement
from fedvfm.inference import export
from fedvfm.model import adapter_folder
from fedvfm.simulation import run as runs
from tests.inference.conftest import moved
from tests.inference.test_export_formats import under
from tests.support import hub as hubs

NAME = "clinic/cells"


@pytest.fixture(scope="module")
def cache(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds weights under a name, as anybody may have them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVFM_CACHE", str(folder))
        convert.bring(tiny_dino, "tiny-dino")
        yield folder


@pytest.fixture(scope="module")
def adapter(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved with scores of a run; beside it lies what must never go."""
    arm = {"macro": 0.8, "worst": {"site": "St-Mary", "value": 0.7}}
    made = {"experiment": "cells", "primary": "dice", "arms": {"federated": arm, "local-only/St-Mary": arm}}
    folder = export.save(moved("tiny-dino"), tmp_path_factory.mktemp("run") / "adapter", made)
    (folder / "patients.csv").write_text("id\n1\n")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    import huggingface_hub
    import huggingface_hub.constants

    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with hubs.serve() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def paste(card: str, server: hubs.Hub, cache: Path, folder: Path, more: str = "") -> str:
    """What the code of a card prints that is pasted into a new Python elsewhere, with a hub and weights at hand."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    environment = {"HF_ENDPOINT": server.address, "HF_TOKEN": hubs.TOKEN, "HF_HOME": str(folder / "hf")}
    environment |= {"FEDVFM_CACHE": str(cache), "PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_XET": "1"}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code + more], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    return done.stdout


def test_an_adapter_goes_private_in_one_commit(adapter: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    result = runs.Result(adapter.parent, {})
    said = result.push_to_hub(NAME, licence="LicenseRef-Clinic")
    kept = hub.repositories[NAME]
    assert (kept.private, said["private"], said["commit"]) == (True, True, kept.commits[-1])
    assert kept.messages == ["fedvfm: adapter"]
    assert set(kept.files) - {".gitattributes"} == set(said["files"])
    assert "patients.csv" not in kept.files
    everything, here = b"".join(kept.files.values()), str(tmp_path.parent).encode()
    assert not [word for word in (b"St-Mary", here, str(adapter).encode()) if word in everything]
    card = kept.files["README.md"].decode()
    assert hub.cards == [card]
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "\nlicense: other\nlicense_name: clinic\n---\n" in card
    assert "| federated | 0.800 | 0.700 |" in card
    assert "fedvfm weights import FILE --name tiny-dino" in card


@pytest.mark.slow
def test_the_card_of_an_adapter_runs(adapter: Path, cache: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    """With fedvfm it is the same adapter; with PEFT it is one of PEFT's models."""
    fedvfm.push_to_hub(adapter, NAME)
    own, peft = hub.repositories[NAME].files["README.md"].decode().split("With PEFT into")
    told = paste(own, hub, cache, tmp_path / "own", "\nprint(model.read().fingerprint)").split()
    assert told[-1] == json.loads((adapter / "fedvfm.json").read_text())["fingerprint"]
    assert paste(peft, hub, cache, tmp_path / "peft", "\nprint(type(model).__name__)").split()[-1].startswith("Peft")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "onnx", "monai", "peft"])
def test_the_card_of_every_form_runs(adapter: Path, cache: Path, hub: hubs.Hub, tmp_path: Path, form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    fedvfm.push_to_hub(adapter, NAME, form=form, public=True, licence="Apache-2.0")
    kept = hub.repositories[NAME]
    assert not kept.private
    assert "license: apache-2.0\n" in kept.files["README.md"].decode()
    assert not [name for name in kept.files if name.endswith(".csv")]
    shown = {"onnx": "logits.shape", "monai": "type(network)"}.get(form, "type(model)")
    assert paste(kept.files["README.md"].decode(), hub, cache, tmp_path / "elsewhere", f"\nprint({shown})")


def test_what_a_repository_holds_is_replaced_only_if_told(adapter: Path, hub: hubs.Hub) -> None:
    hub.repositories[NAME] = hubs.Repository(True, {"old.safetensors": b"1", ".gitattributes": b"2"})
    with pytest.raises(errors.OutputInUse, match=r"holds 1 files already \(first: old.safetensors\)"):
        fedvfm.push_to_hub(adapter, NAME)
    assert set(hub.repositories[NAME].files) == {"old.safetensors", ".gitattributes"}
    fedvfm.push_to_hub(adapter, NAME, replace=True)
    assert "old.safetensors" not in hub.repositories[NAME].files
    before = dict(hub.repositories[NAME].files)
    hub.repositories[NAME].private = False
    with pytest.raises(errors.ConfigError, match="is public, and nothing was sent"):
        fedvfm.push_to_hub(adapter, NAME, replace=True)
    assert hub.repositories[NAME].files == before


def refused(adapter: Path, **options: Any) -> errors.FedvfmError:
    with pytest.raises(errors.FedvfmError) as caught:
        fedvfm.push_to_hub(adapter, NAME, **options)
    assert hubs.TOKEN not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("part", "answer", "code"),
    [
        ("/repos/create", (401, ""), "hub-login"),
        ("/repos/create", (403, ""), "hub-login"),
        ("/preupload/", (403, ""), "hub-login"),
        ("/commit/", (412, ""), "hub"),
        ("/commit/", (400, ""), "hub"),
    ],
)
def test_what_the_hub_refuses(adapter: Path, hub: hubs.Hub, part: str, answer: tuple[int, str], code: str) -> None:
    hub.refuse[part] = answer
    assert refused(adapter).code == code
    assert all(not kept.messages for kept in hub.repositories.values())


def test_without_a_login_nothing_is_asked(adapter: Path, hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.example")
    assert "travel there for all to read" in str(refused(adapter))
    monkeypatch.delenv("HF_TOKEN")
    error = refused(adapter)
    assert (error.code, error.exit_code, hub.asked) == ("hub-login", 19, [])
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(adapter).code == "network"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused(adapter).code == "network"


def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    adapter: Path, saved: Callable[..., Path], hub: hubs.Hub, tmp_path: Path
) -> None:
    for options in ({"public": True}, {"form": "pickle"}, {"licence": "my own"}):
        assert refused(adapter, **options).code == "config"
    with pytest.raises(errors.ConfigError, match="no name of a repository"):
        fedvfm.push_to_hub(adapter, "cells")
    assert "a folder of this machine" in str(refused(saved()))
    kept = under(adapter, tmp_path / "kept", "CC-BY-NC-ND-4.0")
    for form in ("hf", "onnx"):
        assert refused(kept, form=form).code == "licence"
    assert fedvfm.push_to_hub(kept, NAME, dry_run=True)["files"]
    about = json.loads((kept / "fedvfm.json").read_text())
    (kept / "distilled.json").write_text(json.dumps({"teacher": str(tmp_path / "teacher" / "adapter")}))
    assert about
    assert "a place of this machine" in str(refused(kept))
    assert hub.asked == []


def test_what_must_not_leave_a_site_is_not_pushed(adapter: Path, tmp_path: Path) -> None:
    assert (adapter_folder.AS_IT_CAME, adapter_folder.STATEMENT) == (decisions.GLOBAL, statement.STATEMENT)
    for name, text, why in (
        (decisions.GLOBAL, "", "it holds this site's own arrays"),
        (statement.STATEMENT, '{"private": true}', "statement.json says that it has no differential privacy"),
    ):
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        (folder / name).write_text(text)
        with pytest.raises(errors.ConfigError, match=f"must not leave this site: {why}"):
            fedvfm.push_to_hub(folder, "ward/cells", dry_run=True)


def test_the_command(cli: Callable[..., Any], adapter: Path, hub: hubs.Hub) -> None:
    said = cli("push", adapter, NAME, "--dry-run")
    assert (said.code, hub.asked) == (0, [])
    assert "would be seen by only you and those you let in; nothing was sent" in said.out
    assert f'snapshot_download("{NAME}")' in said.out
    said = cli("push", adapter, NAME, "--json")
    assert (said.code, json.loads(said.out)["private"]) == (0, True)
    arrays = safetensors.numpy.load(hub.repositories[NAME].files["fedvfm_adapter.safetensors"])
    assert arrays.keys() == safetensors.numpy.load_file(adapter / "fedvfm_adapter.safetensors").keys()
