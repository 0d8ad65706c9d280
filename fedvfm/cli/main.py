"""The verbs. Thin: every verb calls one function of a wing; errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# Waiting OpenMP threads that spin burn the other core; they must be told before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=DeprecationWarning)

import typer  # noqa: E402
from rich.table import Table  # noqa: E402

import fedvfm  # noqa: E402
from fedvfm import errors, registry  # noqa: E402
from fedvfm.cli import audit, client, distil, doctor, drafts, evidence, explain, ledger, privacy, server, weights  # noqa: E402
from fedvfm.cli import recipe as cli_recipe  # noqa: E402
from fedvfm.cli import survey as cli_survey  # noqa: E402
from fedvfm.report import quantity  # noqa: E402
from fedvfm.report import terminal as screens  # noqa: E402
from fedvfm.runtime import extras, logs  # noqa: E402
from fedvfm.storage import storage  # noqa: E402
from fedvfm.tracking import targets  # noqa: E402

app = typer.Typer(
    name="fedvfm",
    help="Adapt vision foundation models across hospitals without moving one image.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
LOG = logging.getLogger(__spec__.name)  # this module may run as "__main__"
data_app = typer.Typer(help="The hospital's own data, and public sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
for _verbs in (server, client, audit, doctor, ledger, privacy, cli_recipe, weights):
    app.add_typer(_verbs.app, name=_verbs.NAME)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]


@logs.output()
def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        code = app(standalone_mode=False)
    except errors.FedvfmError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in storage.REFUSALS:
            raise
        _fail(storage.refusal(error.filename or "a file", error))
    except ModuleNotFoundError as error:
        lacking = extras.missing(error)
        if lacking is None:
            raise
        _fail(lacking)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        if usage():  # empty where the help was shown instead
            LOG.error(f"Error: {usage()}")
        sys.exit(2)
    if code == 130:  # what typer makes of Ctrl-C
        LOG.error("Stopped; nothing was running yet.")
    sys.exit(code or 0)


def _fail(error: errors.FedvfmError) -> None:
    from fedvfm.runtime import processes  # psutil takes a tenth of what the help takes
    from fedvfm.simulation.results import site_errors

    if site_errors.debugging():
        traceback.print_exception(error)
    processes.write_failure(error)
    LOG.error(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedvfm {fedvfm.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt vision foundation models across hospitals without moving one image."""


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.ConfigError(
            "--seeds", [f"'{text}': give whole numbers separated by commas: --seeds 0,1,2"]
        ) from None
    if len(set(numbers)) < len(numbers) or any(not 0 <= seed < 2**63 for seed in numbers):
        raise errors.ConfigError("--seeds", [f"'{text}': each seed once, from 0 to 9223372036854775807"])
    return numbers


def _workers(text: str | None) -> int | str | None:
    if text in (None, "auto"):
        return text
    number = int(text) if text is not None and text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 1024:
        raise errors.ConfigError("--workers", [f"'{text}': give a number from 1 to 1024, or auto"])
    return number


def _bundled_names() -> list[str]:
    return list(_bundled())


@app.command()
def simulate(
    experiment: Annotated[
        str | None,
        typer.Argument(help="A bundled experiment's name or a TOML file.", autocompletion=_bundled_names),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=VALUE; the value is TOML. Repeatable.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, in place of the experiment's.")] = None,
    engine: Annotated[str | None, typer.Option(help="in-process, ray or deployment.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="Processes that compute, or auto; results are the same with any number.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; must not exist or be empty.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run, or the runs of several seeds, in this folder.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Run once per seed: 0,1,2. The output holds a folder each.")] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Your own Python file, which registers parts first. Repeatable.")
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Serve a live page on this machine's loopback while it runs.")
    ] = False,
    page_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the live page; any free one by default.")
    ] = 0,
    track: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard:FOLDER, mlflow:URI or wandb:PROJECT takes every round's numbers. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop. Needs neither weights nor network.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Train federated, local-only and pooled on virtual hospitals of this machine."""
    wanted, processes = _seeds(seeds), _workers(workers)
    watching = _Watching(quiet or as_json, page_port if page else None, tuple(targets.parse(track or [])))
    if resume is not None or experiment is not None:
        extras.require()
    from fedvfm.simulation import plugin as plugins

    plugins.load(plugin or [])
    if resume is not None:
        if experiment is not None or sets or rounds is not None or engine or device or output or wanted or dry_run:
            raise errors.ConfigError(
                "--resume", ["goes on with a run as it was set up; give no EXPERIMENT, and only --workers and --plugin"]
            )
        _resume(resume, watching, as_json, processes)
        return
    if experiment is None:
        known = ", ".join(_bundled())
        raise errors.ConfigError(
            "simulate", [f"name an EXPERIMENT (bundled: {known}) or a TOML file, or give --resume RUN"]
        )
    from fedvfm.simulation import experiment as experiments

    # A bar for weights read from the disk is noise in a log; only "weights fetch" downloads.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    what = experiments.load(experiment, sets or [], rounds=rounds, engine=engine, device=device, workers=processes)
    plugins.require_engine(what, plugin or [])
    if dry_run:
        if device is not None:
            from fedvfm.model import device as devices

            devices.choose(device)
        _dry_run(what.with_seed(wanted[0]) if wanted else what, as_json)
        return
    from fedvfm.simulation import run as runs

    _simulate(what, wanted, output or runs.default_output(what.name), watching, as_json)


class _Watching(NamedTuple):
    """How a run is looked at: whether the terminal says nothing, the port of its page (None for none), its trackers."""

    quiet: bool
    page_port: int | None
    trackers: tuple[targets.Target, ...]


def _simulate(what: Any, wanted: list[int], output: Path, watching: _Watching, as_json: bool) -> None:
    from fedvfm.simulation import run as runs
    from fedvfm.simulation import seeds

    def work(observer: Any) -> list[Any]:
        if wanted:
            return list(seeds.simulate(what, wanted, output=output, observer=observer))
        return [runs.simulate(what, output=output, observer=observer)]

    _show(_run(work, output, watching), as_json, many=bool(wanted))


def _bundled() -> dict[str, Path]:
    from fedvfm.simulation import experiment as experiments

    return experiments.bundled()


def _resume(folder: Path, watching: _Watching, as_json: bool, workers: Any) -> None:
    from fedvfm.simulation import run as runs
    from fedvfm.simulation import run_folder, seeds

    many = run_folder.RunFolder(folder).seeds.exists()

    def work(observer: Any) -> list[Any]:
        if many:
            return list(seeds.resume(folder, observer=observer, workers=workers))
        return [runs.resume(folder, observer=observer, workers=workers)]

    _show(_run(work, folder, watching), as_json, many=many)


def _run(work: Callable[[Any], list[Any]], folder: Path, watching: _Watching) -> list[Any]:
    from fedvfm.simulation import run_folder
    from fedvfm.simulation.engines import live

    try:
        with contextlib.ExitStack() as during:
            observer: Any = None
            if watching.page_port is not None:  # its address is said even where the run is quiet
                from fedvfm.simulation import live_page

                observer = during.enter_context(live_page.shown(folder, watching.page_port))
            during.enter_context(logs.output(level=logging.CRITICAL if watching.quiet else logging.INFO))
            terminal = during.enter_context(live.watch(watching.quiet))
            if watching.trackers:
                from fedvfm.simulation import tracked_runs

                during.enter_context(tracked_runs.tracked(folder, watching.trackers, terminal))
            return work(terminal if observer is None else live_page.both(terminal, observer))
    except KeyboardInterrupt:
        if not run_folder.RunFolder(folder).begun:
            raise errors.Interrupted("stopped before a round was finished; nothing was saved") from None
        raise errors.Interrupted(
            f"stopped; every finished round is saved. Go on with: fedvfm simulate --resume {shlex.quote(str(folder))}"
        ) from None


def _show(results: list[Any], as_json: bool, *, many: bool) -> None:
    from fedvfm.privacy import statements
    from fedvfm.report import scores

    if as_json:
        summaries = [dict(result.summary) for result in results]
        print(json.dumps({"runs": summaries} if many else summaries[0], indent=2))
        return
    console = screens.console()
    for result in results:
        summary = result.summary
        table = Table(title=f"{summary['experiment']}, seed {summary['seed']}: test {summary['primary']}")
        for column in ("arm", "macro", "weighted", "worst site", "gap"):
            table.add_column(column)
        for name, arm in summary["arms"].items():
            worst = f"{arm['worst']['site']} {arm['worst']['value']:.3f}"
            name = scores.shown(name, arm)
            table.add_row(name, f"{arm['macro']:.3f}", f"{arm['weighted']:.3f}", worst, f"{arm['gap']:.3f}")
        console.print(table)
        if summary.get("privacy"):
            console.print(f"{statements.bound(summary['privacy'])}; {statements.SIMULATED}", soft_wrap=True)
        console.print(f"report: {result.path / 'report.html'}   adapter: {result.path / 'adapter'}", soft_wrap=True)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Imports without a look for garbage: they make none, and the looking takes a seventh of what a plan does."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _dry_run(what: Any, as_json: bool) -> None:
    with _uncollected():
        from fedvfm.privacy import statements
        from fedvfm.simulation import experiment as experiments
        from fedvfm.simulation import plan

    shapes = experiments.examine(what)
    planned = plan.plan(what, experiments.hospitals(what), shapes)
    if as_json:
        print(json.dumps(planned, indent=2))
        return
    console, moved = screens.console(), planned["bytes"]
    rounds = quantity.of(planned["rounds"], "round")
    table = Table(
        title=f"plan of {planned['experiment']}: {rounds}, engine {planned['engine']}, seed {planned['seed']}"
    )
    for column in ("site", "train", "val", "test"):
        table.add_column(column)
    for name, counts in planned["sites"].items():
        table.add_row(name, *(str(counts[split]) for split in ("train", "val", "test")))
    console.print(table)
    backbone = planned["backbone"]
    console.print(f"backbone {backbone['name']}: {backbone['parameters']:,} frozen parameters")
    console.print(f"trainable: {planned['trainable_parameters']:,} ({planned['share']:.2%} of the backbone)")
    per_round = moved["per_round"]
    console.print(
        f"bytes a round: {per_round['up']:,} up, {per_round['down']:,} down; whole model once: {moved['full_model']:,}"
    )
    if planned["privacy"]:
        console.print(f"privacy, at most: {statements.bound(planned['privacy'])}", soft_wrap=True)
    console.print(f"expected peak memory: about {planned['peak_mib']:,.0f} MiB")
    console.print("arms: " + ", ".join(planned["arms"]), soft_wrap=True)
    for note in planned["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or parents of seed-N folders.")],
    as_json: Json = False,
) -> None:
    """Set finished runs side by side, with confidence intervals."""
    from fedvfm.simulation.results import compare as comparing

    comparison = comparing.compare(runs)
    if as_json:
        print(json.dumps(comparison, indent=2))
    else:
        comparing.show(comparison, screens.console())


experiments_app = typer.Typer(invoke_without_command=True)
experiments_app.command("new")(drafts.experiment)
app.add_typer(experiments_app, name="experiments")
app.command()(distil.distil)
app.command()(explain.explain)
app.command()(evidence.evidence)
app.command()(cli_survey.survey)


@experiments_app.callback()
def experiments(context: typer.Context, as_json: Json = False) -> None:
    """List the bundled experiments, show one, or begin one of your own."""
    from fedvfm.config import schema

    if context.invoked_subcommand is not None:
        return
    rows = {name: schema.read_toml(path) for name, path in _bundled().items()}
    if as_json:
        print(
            json.dumps(
                {name: {"title": row.get("title", ""), "note": row.get("note", "")} for name, row in rows.items()},
                indent=2,
            )
        )
        return
    table = Table()
    for column in ("name", "what", "note"):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, row.get("title", ""), row.get("note", ""))
    screens.console().print(table)


@experiments_app.command("show")
def experiments_show(
    name: Annotated[str, typer.Argument(help="A bundled experiment's name.", autocompletion=_bundled_names)],
    as_json: Json = False,
) -> None:
    """Print an experiment's file, to copy and change; with --json every value, resolved to the last default."""
    from fedvfm.simulation import experiment as bundle

    if name not in (known := _bundled()):
        hint = registry.nearest(name, list(known))
        raise errors.UnknownName(f"unknown experiment '{name}'; bundled: {', '.join(known)}{hint}")
    if as_json:
        print(json.dumps(bundle.load(name).model_dump(mode="json"), indent=2))
        return
    print(known[name].read_text(encoding="utf-8"), end="")


@data_app.command("check")
def data_check(
    site: Annotated[Path, typer.Argument(help="The hospital's own file; 'fedvfm client init' writes one.")],
    recipe: Annotated[Path | None, typer.Option(help="The recipe, in place of the one the file names.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Look at so many samples only, evenly spaced; 0: all.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a one-file page with example pictures (0600).")] = None,
    pictures: Annotated[bool, typer.Option(help="Example pictures in the page.")] = True,
    files: Annotated[
        Path | None, typer.Option(help="Write a CSV that names the affected files, for your eyes only (0600).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Check data and machine before joining: exit code 0 ready, 20 not ready. Nothing leaves the site."""
    extras.require()
    from fedvfm.client.readiness import affected, check, document, outputs, terminal, webpage

    for path, kind in ((html, webpage), (files, affected)):
        if path is not None:
            outputs.require(path, kind.OPTION, kind.HEAD)
    with terminal.watch(quiet or as_json) as observer:
        report = check.check(site, recipe=recipe, limit=limit, observer=observer)
    if html is not None:
        webpage.write(report, html, with_pictures=pictures)
    if files is not None:
        affected.write(report, files)
    if as_json:
        print(json.dumps(document.build(report), indent=2, allow_nan=False))
    else:
        terminal.show(report, screens.console())
    raise typer.Exit(report.exit_code)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="hippocampus, nuclei or cells.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="The published archive or its folder, already on this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a public data set to $FEDVFM_DATA/NAME (data/NAME without it), checked."""
    extras.require()
    from fedvfm.data.sources import fetch

    row = dataclasses.asdict(fetch.fetch(name, source))
    if as_json:
        print(json.dumps(row, indent=2))
        return
    done = f"{row['written']} files written" if row["written"] else "all of it was here"
    print(f"{name}: {row['folder']}\n{row['samples']} cases or pictures, {row['licence']}; {done}")


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter: a run's adapter/.")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Picture, NIfTI, NRRD, DICOM, or a folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist or be empty.")],
    form: Annotated[str, typer.Option("--as", help="Form of masks: auto, png, nifti or dicom-seg.")] = "auto",
    overlays: Annotated[bool, typer.Option("--overlays", help="Also pictures with the masks drawn in.")] = False,
    series: Annotated[
        str, typer.Option(help="Which series of a DICOM folder: its number, or words of the list: 'CT axial most'.")
    ] = "",
    channels: Annotated[
        str, typer.Option(help="Which files CASE_0000, ... are the model's channels: 0,1,3, or 0,-,1.")
    ] = "",
    cases: Annotated[
        Path | None, typer.Option(help="Of a case adapter: a table with columns id and case; one answer a case.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Of an adapter with inputs: a table with column id and these; none: without it.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="Of an adapter with prompt = box: a file that says where each class is.")
    ] = None,
    mpp: Annotated[
        float, typer.Option(help="Of whole slides whose files do not say it: micrometres a pixel, 0.25 for 40x.")
    ] = 0.0,
    propagate: Annotated[
        float, typer.Option(help="Millimetres that each box is followed through a volume, both ways; 0: not at all.")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Images or slices computed at a time; 0: 1 on a CPU, more on a GPU.")] = 0,
    graph: Annotated[
        Path | None, typer.Option(help="Folder of an ONNX export of this adapter: onnxruntime computes it.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Another place of the same backbone.")] = None,
    memory_mib: Annotated[int, typer.Option(min=64, max=2**24, help="MiB that decoding one file may take.")] = 4096,
    seconds: Annotated[int, typer.Option(min=1, max=86_400, help="Seconds that decoding one file may take.")] = 300,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Predict files with a saved adapter; masks lie where the input's own pixels lie."""
    extras.require()
    from fedvfm.config import schema
    from fedvfm.inference import live
    from fedvfm.inference import predict as predicting

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with live.watch(quiet or as_json) as see:
            options: dict[str, Any] = {"form": form, "overlays": overlays, "series": series, "channels": channels}
            options |= {
                "cases": cases,
                "table": table,
                "boxes": boxes,
                "mpp": mpp,
                "propagate": propagate,
                "device": device,
                "batch": batch,
                "graph": graph,
                "backbone": backbone,
            }
            options["limits"] = schema.DecodingLimits(memory_mib=memory_mib, seconds=seconds)
            prediction = predicting.run(adapter, source, output, **options, observer=see)
    except KeyboardInterrupt:
        raise errors.Interrupted(f"stopped; what was predicted so far lies in {output}, without a summary") from None
    live.show(prediction, as_json)
    predicting.require_all(prediction)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter: a run's adapter/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist or be empty.")],
    form: Annotated[str, typer.Option("--format", help="hf (merged), onnx, onnx-int8, monai (bundle) or peft.")] = "hf",
    int8: Annotated[bool, typer.Option("--int8", help="Of onnx: layers compute in 8 bits; needs --calibrate.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Of --int8: at least 32 images of the kind that will be predicted, unlabelled.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Another place of the same backbone.")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved adapter in another tool's layout; it is checked to compute the same before it counts."""
    extras.require()
    from fedvfm.inference import forms

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    written = forms.export_adapter(adapter, output, form, int8=int8, calibrate=calibrate, backbone=backbone)
    if as_json:
        print(json.dumps(written, indent=2))
        return
    size = sum(written["files"].values())
    print(f"{written['folder']}: {form}, {quantity.of(len(written['files']), 'file')}, {size:,} bytes")
    if "calibration" in written:
        measured, took = written["calibration"], written["calibration"]["seconds"]
        size = measured["bytes"]
        print(
            f"layers in 8 bits, ranges from {measured['images']} images: {measured['compared_by']} "
            f"{written['int8']:.4f} beside the float graph on these, {measured['limit']:g} is the limit; "
            f"{size['int8']:,} bytes beside {size['float32']:,}; {took['int8']:.3g} s beside {took['float32']:.3g} s "
            "a window"
        )
    elif "int8" in written:
        print(
            f"weights in 8 bits: off by {written['difference']:.2g} of the largest logit, on drawn images "
            f"{written['int8']:.2%} of the classes are the same. Compare predictions on your own images first"
        )
    elif "difference" in written:
        print(f"computes what the adapter does: largest difference {written['difference']:.1g} of the largest logit")


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter: a run's adapter/.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On Hugging Face; made if it is not there.")],
    form: Annotated[
        str, typer.Option("--format", help="adapter, or as for export: hf, onnx, onnx-int8, monai, peft.")
    ] = "adapter",
    public: Annotated[
        bool, typer.Option("--public", help="For all to see; needs --licence. Private by default.")
    ] = False,
    licence: Annotated[str, typer.Option(help="Of what is published: an SPDX identifier, or LicenseRef-NAME.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the repository holds, in one commit.")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="Another place of the same backbone.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make and check everything, show the card, send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a saved adapter, or an export of it, on Hugging Face, as who 'hf auth login' or HF_TOKEN says."""
    extras.require()
    from fedvfm.inference import publication

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    said = publication.push_to_hub(
        adapter,
        repository,
        form=form,
        public=public,
        licence=licence,
        replace=replace,
        backbone=backbone,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(said, indent=2))
        return
    if dry_run:
        print(said["card"])
    print("\n".join(publication.summary(said)))


if __name__ == "__main__":
    main()
