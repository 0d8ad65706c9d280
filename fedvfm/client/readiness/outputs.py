"""Files a check may write: none that holds something else is overwritten."""

from __future__ import annotations

from pathlib import Path

from fedvfm import errors


def require(path: Path, option: str, head: bytes) -> None:
    """Refuse a path that is a folder, or a file that is not from an earlier check.

    Args:
        path: where to write.
        option: the command line's, for the message.
        head: how such a file begins.

    Raises:
        OutputInUse: saying what is there.
    """
    if path.is_dir():
        raise errors.OutputInUse(f"{option} {path} is a folder. Name a file in it")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                raise errors.OutputInUse(f"{option} {path} is no file of an earlier check. Choose another name")
