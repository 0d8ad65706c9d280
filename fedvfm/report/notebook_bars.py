"""Bars under a cell of a notebook: one piece of HTML that is changed in place. Needs IPython, which a notebook has."""

from __future__ import annotations

import html
import importlib
import time
from typing import Any

from rich.progress import Progress, TaskID

from fedvfm.report import terminal

LOOK_S = 0.2
"""A cell is changed so often at most."""


class Bars(Progress):
    """Rich's bars, shown by the notebook itself and not as a terminal's text; what is printed stands below them."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0
        super().__init__(console=terminal.console(stderr=True, plain_text=True), auto_refresh=False)

    def start(self) -> None:
        """Show them."""
        display = importlib.import_module("IPython.display").display
        self._handle = display(self._content(), raw=True, display_id=True)

    def stop(self) -> None:
        """Leave them as they are."""
        self.refresh()

    def refresh(self) -> None:
        """Show what is now."""
        if self._handle is not None:
            self._shown = time.monotonic()
            self._handle.update(self._content(), raw=True)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Change a bar."""
        super().update(task_id, **fields)
        if time.monotonic() - self._shown > LOOK_S:
            self.refresh()

    def _content(self) -> dict[str, str]:
        rows, lines = [], []
        for task in self.tasks:
            label, total = terminal.plain(task.description), task.total
            left = f"about {task.time_remaining:.0f} s left" if task.time_remaining else ""
            share = f"{task.completed:.3g} of {total:.6g}" if total else ""
            value = f' value="{task.completed:.6g}" max="{total:.6g}"' if total else ""
            rows.append(
                f"<tr><td style='text-align:left'>{html.escape(label)}</td><td><progress{value}></progress></td>"
                f"<td>{share}</td><td>{left}</td></tr>"
            )
            lines.append(" ".join(word for word in (label, share, left) if word))
        return {"text/html": f"<table>{''.join(rows)}</table>", "text/plain": "\n".join(lines)}
