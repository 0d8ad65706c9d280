"""Writes docs/errors.md, the list of exit codes and error codes, from the code itself.

python docs/make_errors.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.data.readiness import catalogue
from fedvfm.protocol import protocol

PAGE = Path(__file__).with_name("errors.md")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines), ""]


def first(kind: type[errors.FedvfmError]) -> str:
    """The first paragraph of a class's docstring in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def text() -> str:
    """The whole page."""
    kinds = [kind for kind in errors.tree() if kind.__module__ == errors.__name__]
    kinds.sort(key=lambda kind: kind.exit_code)
    words = sorted((number, word) for word, number in protocol.ERROR_CODES.items())
    return "\n".join(
        [
            "# Errors and exit codes",
            "",
            "Made by `python docs/make_errors.py`; a test holds it equal to the code. Texts of errors may change in",
            "any release; exit codes, codes and words do not.",
            "",
            "## Exit codes",
            "",
            'Every command ends with 0 or with one of these. "Again" says whether the same command may succeed later',
            "with nothing changed: systemd units (`client unit`, `server unit`) and the server's supervisor start",
            "again only then.",
            "",
            *table(
                ("exit code", "code", "again", "meaning"),
                (
                    *((k.exit_code, f"`{k.code}`", "yes" if k.restart else "no", first(k)) for k in kinds),
                    (errors.NOT_READY, "", "no", "`data check` or `doctor` found something that must be mended first."),
                ),
            ),
            "## Words a coordinator is told",
            "",
            "A site that does not answer a message as asked says one word and a number, and nothing else of its error.",
            "",
            *table(("number", "word"), ((number, f"`{word}`") for number, word in words)),
            "## Findings of `data check`",
            "",
            "Errors about data (exit code 3) carry one of these as their code, too, where one fits.",
            "",
            *table(
                ("code", "severity", "why it matters", "remedy"),
                ((f"`{code}`", entry.severity, entry.why, entry.remedy) for code, entry in catalogue.ENTRIES.items()),
            ),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
