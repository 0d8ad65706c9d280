"""systemd units for the server and for a site's client: started at boot, restarted, and shut in as far as they bear.

What is left out, and why: ``MemoryDenyWriteExecute`` (torch makes machine code as it runs), ``PrivateDevices`` and
``ProtectClock`` where a GPU is used (either hides its device files), ``ProcSubset`` (both read the machine's memory and
processors from ``/proc``).
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.runtime import processes

STOP_S = 60
PRIVILEGED = 1024
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - looked for, not written to

SHUT_IN = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "PrivateMounts=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "RemoveIPC=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
)


@dataclass(frozen=True)
class Service:
    """What a unit runs.

    Attributes:
        description: one line.
        arguments: of the command line of fedvfm.
        state: the folder it writes to, and no other but ``writes``.
        user: whom it runs as.
        reads: files and folders it must see.
        environment: set on top of systemd's.
        gpu: whether it computes on a GPU.
        threads: CPU threads at most; 0 leaves it open.
        port: where it listens; 0 where nowhere.
        writes: further folders that it writes to.
    """

    description: str
    arguments: tuple[str, ...]
    state: Path
    user: str
    reads: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    gpu: bool = False
    threads: int = 0
    port: int = 0
    writes: tuple[Path, ...] = ()

    def text(self) -> str:
        """The unit file."""
        return "\n".join([*self._unit(), "", *self._service(), "", "[Install]", "WantedBy=multi-user.target", ""])

    def _unit(self) -> list[str]:
        return [
            "[Unit]",
            f"Description={_line(self.description)}",
            "Wants=network-online.target",
            "After=network-online.target",
            "StartLimitIntervalSec=0",
        ]

    def _service(self) -> list[str]:
        program = processes.console_script("fedvfm")
        return [
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(_word(word).replace('$', '$$') for word in (program, *self.arguments))}",
            f"User={self.user}",
            "Restart=on-failure",
            "RestartSec=10",
            f"RestartPreventExitStatus={' '.join(map(str, errors.LASTING))}",
            "# Only the first process is asked to end; it ends its own, so that the other end learns of it.",
            "KillMode=mixed",
            f"TimeoutStopSec={STOP_S}",
            *(f"Environment={_word(f'{name}={value}')}" for name, value in sorted(self.environment.items())),
            *([f"CPUQuota={100 * self.threads}%"] if self.threads else []),
            f"ReadWritePaths={' '.join(_word(str(path)) for path in (self.state, *self.writes))}",
            *SHUT_IN,
            *self._by_place(),
        ]

    def _by_place(self) -> list[str]:
        """What hangs on where files lie, on the device and on the port."""
        seen = (self.state, *self.reads, *self.writes, Path(processes.console_script("fedvfm")))
        bind = "CAP_NET_BIND_SERVICE" if 0 < self.port < PRIVILEGED else ""
        return [
            "PrivateTmp=" + ("no" if _below(seen, TEMPORARY) else "yes"),
            "ProtectHome=" + ("read-only" if _below(seen, HOMES) else "yes"),
            *([] if self.gpu else ["PrivateDevices=yes", "ProtectClock=yes"]),
            f"CapabilityBoundingSet={bind}",
            f"AmbientCapabilities={bind}",
        ]


def client(settings: Path, site: schema.SiteConfig, state: Path, user: str | None) -> Service:
    """The unit of ``fedvfm client start``.

    Args:
        settings: the site's own file.
        site: what it says.
        state: the site's state folder.
        user: whom it runs as; None for the folder's owner.
    """
    settings, state = settings.absolute(), state.absolute()
    data = () if site.data.path is None else (settings.parent / site.data.path,)
    cache = os.environ.get("FEDVFM_CACHE")
    return Service(
        description=f"fedvfm client of site {site.name}",
        arguments=("client", "start", str(settings), "--state", str(state)),
        state=state,
        user=owner(state, user),
        reads=(settings, *data, *((Path(cache),) if cache else ())),
        environment={"HF_HUB_OFFLINE": "1"} | ({"FEDVFM_CACHE": cache} if cache else {}),
        gpu=site.device not in ("cpu", "mps") and site.batch is None,
        writes=() if site.batch is None else (Path(site.batch.spool),),
        threads=site.limits.threads,
    )


def server(state: Path, address: str, options: Sequence[str] = (), user: str | None = None) -> Service:
    """The unit of ``fedvfm server start``.

    Args:
        state: the server's state folder.
        address: ``host:port`` that it listens at.
        options: further options of ``server start``, with absolute paths.
        user: whom it runs as; None for the folder's owner.
    """
    state = state.absolute()
    reads = tuple(Path(option) for option in options if option.startswith("/"))
    return Service(
        description=f"fedvfm server at {address}",
        arguments=("server", "start", "--state", str(state), *options),
        state=state,
        user=owner(state, user),
        reads=reads,
        port=int(address.rpartition(":")[2]),
    )


def _below(paths: Sequence[Path], roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(root) for path in paths for root in roots)


def _line(text: str) -> str:
    """Text of a setting: a percent sign would begin a specifier."""
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """One word of a command line or list.

    Raises:
        ConfigError: for a path that no unit file can hold.
    """
    if not text.isprintable():
        raise errors.ConfigError("unit", [f"{text!r}: a unit file cannot hold a path with control characters"])
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_line(escaped)}"'


def owner(state: Path, user: str | None) -> str:
    """Whom the service runs as: who is asked for, else who owns the state folder.

    Raises:
        ConfigError: if that is root, or nobody this machine knows.
    """
    if user is None:
        number = state.stat().st_uid if state.exists() else os.getuid()
        try:
            user = pwd.getpwuid(number).pw_name
        except KeyError:
            fault = f"user {number} owns {state} and has no name here; give --user"
            raise errors.ConfigError("--user", [fault]) from None
    if user in ("root", "0") or not user.replace("-", "").replace("_", "").replace(".", "").isalnum():
        fault = f"'{user}': give the name of a user who owns the state folder and is not root; one is made by: useradd"
        raise errors.ConfigError("--user", [f"{fault} --system fedvfm"])
    return user
