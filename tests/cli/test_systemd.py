"""systemd units: every directive is one that systemd knows, and what must be shut is shut."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.cli import systemd
from fedvfm.config import schema

KNOWN = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec"},
    "Install": {"WantedBy"},
    "Service": {
        *(
            "Type",
            "PrivateMounts",
            "ExecStart",
            "User",
            "Restart",
            "RestartSec",
            "RestartPreventExitStatus",
            "KillMode",
        ),
        *("TimeoutStopSec", "Environment", "CPUQuota", "ReadWritePaths", "NoNewPrivileges", "ProtectSystem"),
        *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups"),
        *("ProtectHostname", "ProtectProc", "ProtectHome", "ProtectClock", "PrivateTmp", "PrivateDevices"),
        *("RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
        *("LockPersonality", "RemoveIPC", "KeyringMode", "SystemCallArchitectures", "SystemCallFilter"),
        *("SystemCallErrorNumber", "UMask", "CapabilityBoundingSet", "AmbientCapabilities"),
    },
}
"""As systemd.unit(5), .service(5), .exec(5), .kill(5) and .resource-control(5) name them."""


def site(**values: Any) -> schema.SiteConfig:
    data = {"source": "folder", "path": "data"}
    return schema.parse(schema.SiteConfig, {"name": "north", "data": data, **values}, "site")


def settings(text: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = rows = []
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            rows.append((name, value))
    return found


def service(text: str) -> dict[str, str]:
    return dict(settings(text)["Service"])


def made(folder: Path) -> dict[str, str]:
    odd = folder / 'a "state" of 100% $HOME'
    return {
        "client": systemd.client(
            folder / "site.toml", site(limits={"threads": 2}), folder / "state", "hospital"
        ).text(),
        "client-gpu": systemd.client(folder / "site.toml", site(device="cuda:0"), folder / "state", "hospital").text(),
        "server": systemd.server(folder / "state", "hub.example:8443", (), "hospital").text(),
        "server-low": systemd.server(
            folder / "state", "hub.example:443", ("--listen", "0.0.0.0:443"), "hospital"
        ).text(),
        "odd": systemd.client(odd / "site.toml", site(), odd, "hospital").text(),
    }


def test_only_known_directives_each_once(tmp_path: Path) -> None:
    for text in made(tmp_path).values():
        found = settings(text)
        assert list(found) == ["Unit", "Service", "Install"]
        for section, rows in found.items():
            names = [name for name, _ in rows if name != "Environment"]
            assert set(names) <= KNOWN[section]
            assert len(names) == len(set(names))


def test_what_is_shut(tmp_path: Path) -> None:
    for name, text in made(tmp_path).items():
        found = service(text)
        assert found["NoNewPrivileges"] == "yes"
        assert found["ProtectSystem"] == "strict"
        assert found["User"] == "hospital"
        assert found["Restart"] == "on-failure"
        assert found["TimeoutStopSec"] == "60"
        assert found["UMask"] == "0077"
        assert found["KillMode"] == "mixed"
        assert found["CapabilityBoundingSet"] == ("CAP_NET_BIND_SERVICE" if name == "server-low" else "")
        assert ("PrivateDevices" in found) == (name != "client-gpu"), "a GPU has device files"
        assert ("ProtectClock" in found) == (name != "client-gpu")
        assert found["PrivateTmp"] == "no", "the state of this test lies in a temporary folder"
    assert service(made(tmp_path)["client"])["CPUQuota"] == "200%"


def test_what_hangs_on_where_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wherever this clone lies.
    monkeypatch.setattr(systemd.processes, "console_script", lambda name: f"/opt/fedvfm/bin/{name}")
    monkeypatch.setenv("FEDVFM_CACHE", "/var/cache/fedvfm")

    def placed(state: str, data: str) -> dict[str, str]:
        own = site(data={"source": "folder", "path": data})
        return service(systemd.client(Path("/etc/fedvfm/site.toml"), own, Path(state), "hospital").text())

    inside = placed("/var/lib/fedvfm", "/srv/study")
    assert inside["PrivateTmp"] == "yes"
    assert inside["ReadWritePaths"] == '"/var/lib/fedvfm"'
    assert placed("/home/it/state", "/srv/study")["ProtectHome"] == "read-only"
    assert placed("/var/lib/fedvfm", "/home/it/study")["ProtectHome"] == "read-only"
    assert placed("/var/lib/fedvfm", "/tmp/study")["PrivateTmp"] == "no"


def test_paths_are_words_whatever_they_hold(tmp_path: Path) -> None:
    text = made(tmp_path)["odd"]
    start = service(text)["ExecStart"]
    assert r"a \"state\" of 100%% $$HOME" in start
    assert r"a \"state\" of 100%% $HOME" in service(text)["ReadWritePaths"]
    with pytest.raises(errors.ConfigError, match="control characters"):
        systemd.client(tmp_path / "site.toml", site(), tmp_path / "a\nExecStartPre=evil", "hospital").text()


@pytest.mark.parametrize("user", ["root", "0", "", "a b", "a\nb", "%u", "a=b"])
def test_users_that_none_is(user: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="is not root"):
        systemd.client(tmp_path / "site.toml", site(), tmp_path, user)


def test_the_owner_of_the_folder_by_default(tmp_path: Path) -> None:
    if os.getuid() == 0:
        with pytest.raises(errors.ConfigError, match="'root': give the name of a user"):
            systemd.owner(tmp_path, None)
        os.chown(tmp_path, 123456, -1)
        with pytest.raises(errors.ConfigError, match=r"user 123456 owns .* give --user"):
            systemd.owner(tmp_path, None)
    else:
        assert systemd.owner(tmp_path, None) == getpass.getuser()


ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_takes_them_and_finds_them_shut(tmp_path: Path) -> None:
    """``verify`` reads them as systemd would; ``security`` rates what is left open, 10 the worst."""
    assert ANALYZE is not None
    texts = made(tmp_path)
    for name in ("client", "server-low", "odd"):
        path = tmp_path / f"fedvfm-{name}.service"
        path.write_text(texts[name].replace("User=hospital", "User=daemon"))
        done = subprocess.run(
            [ANALYZE, "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=120, check=False
        )
        said = [line for line in (done.stdout + done.stderr).splitlines() if path.name in line]
        assert (done.returncode, said) == (0, []), done.stderr
        rated = subprocess.run(
            [ANALYZE, "security", "--offline=true", str(path)], capture_output=True, text=True, timeout=120, check=False
        )
        found = re.search(r"exposure level for .*: ([0-9.]+)", rated.stdout)
        assert found is not None, rated.stderr
        assert float(found[1]) <= 2.5, rated.stdout
