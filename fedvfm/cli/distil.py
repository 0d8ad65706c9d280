"""``fedvfm distil``: a smaller backbone learns a trained adapter's answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fedvfm import errors
from fedvfm.runtime import extras


def distil(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter, the teacher: a run's adapter/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist or be empty.")],
    student: Annotated[str, typer.Option(help="Backbone of the student: litemedsam, mobilesam, dinov2-small, ...")],
    data: Annotated[Path, typer.Option(help="Pictures and volumes, a file or folder; labels are not looked at.")],
    score: Annotated[
        Path | None, typer.Option(help="Folder of labelled images: teacher and student are scored on it.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=VALUE of the student's recipe. Repeatable.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 20,
    most: Annotated[int, typer.Option(help="Images and slices at most; of more some, evenly spaced.")] = 2000,
    temperature: Annotated[float, typer.Option(help="That answers are divided by before they are compared.")] = 2.0,
    features: Annotated[float, typer.Option(help="Weight of the features' loss; 0 leaves it out.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of first weights, order and what is held back.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    backbone: Annotated[str | None, typer.Option(help="Another place of the teacher's backbone.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")] = False,
) -> None:
    """Distil a saved adapter into another backbone, without labels; the result is an adapter folder."""
    extras.require()
    from fedvfm.inference import distillation, live, student_training

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    settings = student_training.Settings(temperature, features, seed)
    try:
        with live.watch(quiet or as_json) as see:
            report = distillation.run(
                adapter,
                data,
                output,
                student,
                sets=sets or [],
                epochs=epochs,
                settings=settings,
                most=most,
                score=score,
                backbone=backbone,
                device=device,
                observer=see,
            )
    except KeyboardInterrupt:
        raise errors.Interrupted("stopped; nothing was written. The same command gives the same adapter") from None
    if as_json:
        print(json.dumps(report, indent=2))
        return
    near, shown = report["agreement"], report["images"]
    print(
        f"{report['folder']}: adapter {report['fingerprint'][:12]} on {student}, {report['student']['parameters']:,} "
        f"numbers beside the teacher's {report['teacher']['parameters']:,}"
    )
    print(
        f"fitted on {shown['fitted']} images; on {shown['held']} held back, {near['by']} beside the "
        f"teacher {near['after']:.4f} (at the start {near['before']:.4f})"
    )
    for name, own in report["scores"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in own.items() if key != "samples"))


__all__ = ["distil"]
