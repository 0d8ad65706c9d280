"""The check in a terminal: progress while it reads, then a table of findings and the verdict."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fedvfm.client.readiness import check, document, webpage
from fedvfm.data.readiness import finding
from fedvfm.report import progress
from fedvfm.report import terminal as screens

COLOURS = {"blocker": "bold red", "warning": "yellow", "note": "dim"}
TENTHS = 10


def watch(quiet: bool) -> contextlib.AbstractContextManager[progress.Observer]:
    """The observer for this output: silent, a bar, or a line every tenth of the way."""
    return progress.watch(quiet, _bar, lambda: _line)


def _bar(bar: Progress) -> progress.Observer:
    task = bar.add_task("reading samples", total=None)

    def see(event: str, /, **fields: Any) -> None:
        if event == "check":
            bar.update(task, total=fields["total"], completed=fields["done"])
        elif event == "note":
            bar.update(task, description=str(fields["text"]))

    return see


def _line(event: str, /, **fields: Any) -> None:
    if event == "note":
        print(screens.plain(str(fields["text"])), file=sys.stderr, flush=True)
    elif event == "check":
        done, total = fields["done"], fields["total"]
        if done == total or done * TENTHS // total > (done - 1) * TENTHS // total:
            print(f"read {done} of {total} samples", file=sys.stderr, flush=True)


def show(made: check.Checked, console: Console) -> None:
    """Print numbers, findings and verdict. No file and no patient is named."""
    made_of = document.build(made)
    _numbers(made_of, console)
    if made.findings:
        console.print(_table(made.findings))
    counts = ", ".join(finding.number(made_of["counts"][name], name) for name in finding.SEVERITIES)
    verdict = Text("READY", "bold green") if made.ready else Text("NOT READY", "bold red")
    console.print(Text.assemble(f"{made.own.site.name}: ", verdict, f" ({counts})"), soft_wrap=True)


def _numbers(made_of: dict[str, Any], console: Console) -> None:
    data, images, step = made_of["data"], made_of["images"], made_of["training_step"]
    if data is not None:
        splits = ", ".join(f"{count:,} {name}" for name, count in data["splits"].items())
        patients = "patients unknown" if data["patients"] is None else finding.number(data["patients"], "patient")
        _say(console, f"{data['task']}: {finding.number(data['samples'], 'sample')}, {patients}; {splits}")
        _say(console, "classes: " + ", ".join(f"{name} {count:,}" for name, count in data["per_class"].items()))
    if images is not None:
        sides = " x ".join(f"{images[key]['min']:g}-{images[key]['max']:g}" for key in ("height", "width"))
        spacing = images["spacing_mm"]
        size = "unknown" if spacing is None else f"{spacing['row']['min']:g}-{spacing['row']['max']:g} mm"
        _say(console, f"images: {sides} pixels; pixel size {size}; mean intensity {images['intensity']['mean']:.3f}")
    if made_of["machine"] is not None:
        machine = made_of["machine"]
        room = "; ".join(
            f"{what} about {machine[key]['needed']:,.0f} MiB needed, {machine[key]['available']:,.0f} free"
            for key, what in (("memory_mib", "memory"), ("disk_mib", "disk"))
        )
        _say(console, f"machine: {machine['device_name'] or machine['device']}; {room}")
        _say(console, f"precision: {machine['precision']}")
    if step is not None:
        _say(
            console,
            f"training step: {step['step_s']:.2f} s (first {step['first_s']:.2f} s); a round of {step['steps']:,} "
            f"steps would take about {webpage.duration(step['round_s'])}",
        )


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _table(found: list[finding.Finding]) -> Table:
    table = Table(show_lines=True)
    for column in ("severity", "problem", "why it matters", "remedy"):
        table.add_column(column)
    for one in found:
        problem = Text.assemble(f"{one.problem} ", (f"[{one.code}] {one.where}".strip(), "dim"))
        table.add_row(Text(one.severity, COLOURS[one.severity]), problem, Text(one.why), Text(one.remedy))
    return table
