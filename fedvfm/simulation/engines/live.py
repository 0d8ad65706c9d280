"""What a person sees while a run goes on: a Rich display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from rich.progress import Progress, TaskID

from fedvfm.privacy import statements
from fedvfm.report import progress, rounds, terminal


def watch(quiet: bool) -> contextlib.AbstractContextManager[progress.Observer]:
    """The observer for this output: silent, live or plain."""
    return progress.watch(quiet, Live, Lines)


def _scores(record: dict[str, Any]) -> str:
    """Mean training loss and mean validation of a round, in a few words."""
    loss = rounds.mean_loss(record)
    words = [] if loss is None else [f"loss {loss:.3f}"]
    for metric in ("dice", "balanced_accuracy", "f1"):
        values = [row[metric] for row in record["validation"].values() if metric in row]
        mark = f" ({record['prompt']})" if "prompt" in record else ""
        words += [f"val {metric} {sum(values) / len(values):.3f}{mark}"] if values else []
    if record.get("factor_error") is not None and len(record["train"]) > 1:  # of one site nothing is averaged
        words.append(f"factor error {record['factor_error']:.1%}")
    if "privacy" in record:
        words.append(statements.so_far(record["privacy"]))
    return ", ".join(words)


class Live:
    """A bar of the arms that are finished, and one of each arm that goes on: its sites' work in all rounds."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._arms = bar.add_task("arms", total=None)
        self._bars: dict[str, TaskID] = {}
        self._replies: dict[str, int] = {}
        self._begun: dict[str, dict[str, float]] = {}

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        arm = str(fields.get("arm", ""))
        if event == "arm":
            self._bar.update(self._arms, total=fields["count"])
            total = fields["rounds"] * fields["sites"]
            self._bars[fields["name"]] = self._bar.add_task(fields["name"], total=total)
        elif event == "round":
            asked = len(fields["sites"])  # a cohort, maybe, and not all
            self._replies[arm], self._begun[arm] = (fields["round"] - 1) * asked, {}
            self._bar.update(self._bars[arm], total=fields["rounds"] * asked)
            self._show(arm, f"round {fields['round']}/{fields['rounds']}")
        elif event == "step":
            if fields["phase"] == "train" and arm in self._begun:
                self._begun[arm][fields["site"]] = fields["done"] / fields["total"]
            self._show(arm, f"round {fields['round']} {fields['site']} {_step(fields)}")
        elif event == "reply" and fields["phase"] == "train":
            self._replies[arm] += 1
            self._begun[arm].pop(fields["site"], None)
            loss = f" loss {fields['loss']:.3f}" if fields["loss"] is not None else ""
            self._show(arm, f"round {fields['round']} {fields['site']}{loss}")
        elif event == "round-end":
            self._bar.console.print(f"{arm} round {fields['round']}: {_scores(fields['record'])}", highlight=False)
        elif event == "test":
            self._show(arm, "test")
        elif event == "finished":
            self._bar.remove_task(self._bars.pop(arm))
            self._bar.advance(self._arms)
        elif event == "note":
            self._bar.console.print(str(fields["text"]), highlight=False, soft_wrap=True)

    def _show(self, arm: str, text: str) -> None:
        if arm in self._bars:
            done = self._replies.get(arm, 0) + sum(self._begun.get(arm, {}).values())
            self._bar.update(self._bars[arm], completed=done, description=f"{arm} {text}")


def _step(fields: dict[str, Any]) -> str:
    noun = "sample" if fields["phase"] == "evaluate" else "step"
    return f"{noun} {fields['done']} of {fields['total']}"


QUIET_S = 20.0
"""Plain lines tell of a step where nothing else was printed for so long."""


class Lines:
    """One line an event, with the time since the start and an estimate of what remains of the arm."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._begun: dict[str, tuple[float, int]] = {}
        self._resumed: dict[str, int] = {}

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        arm = str(fields.get("arm", ""))
        if event == "arm":
            self._begun[fields["name"]] = (time.monotonic(), fields["rounds"])
            self._resumed.pop(fields["name"], None)
            size = (f"{fields[key]} {key[: -1 if fields[key] == 1 else None]}" for key in ("sites", "rounds"))
            self._print(f"arm {fields['index'] + 1}/{fields['count']} {fields['name']}: {', '.join(size)}")
        elif event == "round":
            self._resumed.setdefault(arm, fields["round"] - 1)
        elif event == "step" and time.monotonic() - self._last > QUIET_S:
            self._print(f"{arm} round {fields['round']} site {fields['site']}: {_step(fields)}")
        elif event == "reply" and fields["phase"] == "train" and fields["loss"] is not None:
            self._print(f"{arm} round {fields['round']} site {fields['site']}: loss {fields['loss']:.4f}")
        elif event == "round-end":
            began, rounds = self._begun[arm]
            remaining = (time.monotonic() - began) / (fields["round"] - self._resumed[arm]) * (rounds - fields["round"])
            scores = _scores(fields["record"])
            self._print(f"{arm} round {fields['round']}/{rounds}: {scores}; about {remaining:.0f} s left in this arm")
        elif event == "note":
            self._print(str(fields["text"]))

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        print(f"[{self._last - self._start:7.1f} s] {terminal.plain(text)}", file=sys.stderr, flush=True)
