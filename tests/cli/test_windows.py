"""What doctor says under WSL, by the texts that its kernels show of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedvfm.doctor import windows

WSL1 = "Linux version 4.4.0-22621-Microsoft (Microsoft@Microsoft.com) (gcc version 5.4.0 (GCC) ) #2506-Microsoft\n"
WSL2 = "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f) (gcc (GCC) 11.2.0) #1 SMP\n"
DEBIAN = "Linux version 6.1.0-28-amd64 (debian-kernel@lists.debian.org) (gcc-12) #1 SMP PREEMPT_DYNAMIC Debian\n"
MOUNTS = """\
/dev/sdc / ext4 rw,relatime 0 0
C:\\134 /mnt/c 9p rw,noatime,aname=drvfs;path=C:\\;uid=1000;gid=1000 0 0
D:\\134 /mnt/my\\040disk drvfs rw 0 0
/dev/sdd /mnt/c/linux ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("kernel", "folder", "systemd", "severities"),
    [
        (DEBIAN, "/home/a/site", True, []),
        (DEBIAN, "/mnt/c/site", False, []),
        (WSL1, "/home/a/site", True, ["blocker"]),
        (WSL2, "/home/a/site", True, ["ok"]),
        (WSL2, "/home/a/site", False, ["warning"]),
        (WSL2, "/mnt/c/site", True, ["blocker"]),
        (WSL2, "/mnt/my disk/site", False, ["blocker", "warning"]),
        (WSL2, "/mnt/c/linux/site", True, ["ok"]),
        (WSL2, "/mnt/cc/site", True, ["ok"]),
    ],
)
def test_what_is_said_of_a_machine(
    tmp_path: Path, kernel: str, folder: str, systemd: bool, severities: list[str]
) -> None:
    version, mounts, services = tmp_path / "version", tmp_path / "mounts", tmp_path / "systemd"
    version.write_text(kernel)
    mounts.write_text(MOUNTS)
    services.mkdir() if systemd else None
    rows = windows.examine(Path(folder), version, mounts, services)
    assert [row.severity for row in rows] == severities
    assert {row.check for row in rows} <= {"windows"}


def test_a_link_to_windows_file_system_is_followed(tmp_path: Path) -> None:
    version, mounts, link = tmp_path / "version", tmp_path / "mounts", tmp_path / "state"
    version.write_text(WSL2)
    (tmp_path / "c").mkdir()
    link.symlink_to(tmp_path / "c")
    mounts.write_text(f"/dev/sdc / ext4 rw 0 0\nC:\\134 {tmp_path.resolve() / 'c'} 9p rw 0 0\n")
    rows = windows.examine(link, version, mounts, tmp_path)
    assert [row.severity for row in rows] == ["blocker"]


def test_a_machine_that_does_not_say_is_none(tmp_path: Path) -> None:
    assert windows.examine(tmp_path, tmp_path / "none") == []
