"""What a person sees while a run goes on: a Rich display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from rich.progress import Progress

from fedvfm import progress
from fedvfm.privacy import stated


def watch(quiet: bool) -> contextlib.AbstractContextManager[progress.Observer]:
    """The observer for this output: silent, live or plain."""
    return progress.watch(quiet, Live, Lines)


def _scores(record: dict[str, Any]) -> str:
    """Mean training loss and mean validation of a round, in a few words."""
    losses = [row["loss"] for row in record["train"].values() if "loss" in row]
    words = [f"loss {sum(losses) / len(losses):.3f}"] if losses else []
    for metric in ("dice", "balanced_accuracy"):
        values = [row[metric] for row in record["validation"].values() if metric in row]
        mark = f" ({record['prompt']})" if "prompt" in record else ""
        words += [f"val {metric} {sum(values) / len(values):.3f}{mark}"] if values else []
    if record.get("factor_error") is not None:
        words.append(f"factor error {record['factor_error']:.1%}")
    if "privacy" in record:
        words.append(stated.so_far(record["privacy"]))
    return ", ".join(words)


class Live:
    """Two bars: arms, and replies of the arm's rounds, with site, loss and time remaining."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._arms = bar.add_task("arms", total=None)
        self._rounds = bar.add_task("rounds", total=None)

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        if event == "arm":
            self._bar.update(
                self._arms, total=fields["count"], completed=fields["index"], description=f"arm {fields['name']}"
            )
            self._bar.reset(self._rounds, total=fields["rounds"] * fields["sites"], description="round 1")
        elif event == "round":
            done = (fields["round"] - 1) * len(fields["sites"])
            self._bar.update(self._rounds, completed=done, description=f"round {fields['round']}/{fields['rounds']}")
        elif event == "reply" and fields["phase"] == "train":
            loss = f" loss {fields['loss']:.3f}" if fields["loss"] is not None else ""
            self._bar.update(self._rounds, advance=1, description=f"round {fields['round']} {fields['site']}{loss}")
        elif event == "round-end":
            self._bar.console.print(
                f"{fields['arm']} round {fields['round']}: {_scores(fields['record'])}", highlight=False
            )
        elif event == "note":
            self._bar.console.print(str(fields["text"]), highlight=False, soft_wrap=True)


class Lines:
    """One line an event, with the time since the start and an estimate of what remains of the arm."""

    def __init__(self) -> None:
        self._start = self._arm_start = time.monotonic()
        self._rounds = 1
        self._resumed = 0

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        if event == "arm":
            self._arm_start, self._rounds, self._resumed = time.monotonic(), fields["rounds"], -1
            self._print(
                f"arm {fields['index'] + 1}/{fields['count']} {fields['name']}: {fields['sites']} "
                f"sites, {fields['rounds']} rounds"
            )
        elif event == "round" and self._resumed < 0:
            self._resumed = fields["round"] - 1
        elif event == "reply" and fields["phase"] == "train" and fields["loss"] is not None:
            self._print(f"{fields['arm']} round {fields['round']} site {fields['site']}: loss {fields['loss']:.4f}")
        elif event == "round-end":
            done = fields["round"] - self._resumed
            remaining = (time.monotonic() - self._arm_start) / done * (self._rounds - fields["round"])
            self._print(
                f"{fields['arm']} round {fields['round']}/{self._rounds}: "
                f"{_scores(fields['record'])}; arm's ETA {remaining:.0f} s"
            )
        elif event == "note":
            self._print(str(fields["text"]))

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:7.1f} s] {text}", file=sys.stderr, flush=True)
