"""``fedvfm privacy ...``: what privacy will cost, before anything is trained. Thin: each verb calls one function."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvfm import errors
from fedvfm.runtime import extras, logs

if TYPE_CHECKING:
    from fedvfm.privacy import planner as planners

NAME = "privacy"
app = typer.Typer(help="Differential privacy: noise, epsilon, and whether it can work here.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
Count = Annotated[int | None, typer.Option(min=1, max=10**9)]
Accountant = Annotated[str, typer.Option(help="rdp, pld or both: rdp is quick, pld tighter.")]
Delta = Annotated[float | None, typer.Option(help="Above 0, well below 1 / the number of patients.")]
Noise = Annotated[float | None, typer.Option("--noise", help="Noise multiplier: standard deviation in clips.")]


def _accountants(text: str) -> tuple[str, ...]:
    known = {"rdp": ("rdp",), "pld": ("pld",), "both": ("rdp", "pld")}
    if text not in known:
        raise errors.ConfigError("--accountant", [f"'{text}': give rdp, pld or both"])
    return known[text]


def _require(**values: tuple[float | None, float]) -> None:
    """Each given value must be above 0 and below its limit."""
    wrong = [
        f"--{name.replace('_', '-')} {value:g}: give a number above 0" + (f" and below {most:g}" if most < 1e9 else "")
        for name, (value, most) in values.items()
        if value is not None and not 0 < value < most
    ]
    if wrong:
        raise errors.ConfigError("privacy", wrong)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe or an experiment (.toml), or a locked recipe (.json).")],
    site: Annotated[Path | None, typer.Argument(metavar="[SITE.toml]", help="The site's file: data, ledger.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Wanted, in place of the recipe's or the budget's.")] = None,
    noise: Noise = None,
    delta: Delta = None,
    batch: Count = None,
    rounds: Count = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Images or patients, in place of counting them.")] = None,
    sites: Annotated[int | None, typer.Option(min=1, help="Sites of the federation: plans site-level privacy.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="record-level, patient-level, site-level; or one with -shared.")
    ] = None,
    accountant: Accountant = "rdp",
    as_json: Json = False,
) -> None:
    """The noise that an epsilon needs, what it drowns, and what other ways to train would change."""
    from fedvfm.client import privacy_planning

    _require(epsilon=(epsilon, 1e9), noise=(noise, 1e9), delta=(delta, 1.0))
    changes: dict[str, Any] = {
        "mechanism": mechanism if mechanism == "site-level-shared" or not sites else "site-level",
        "units": sites or samples,
        "batch": batch,
        "rounds": rounds,
        "epsilon": epsilon,
        "noise_multiplier": noise,
        "delta": delta,
    }
    planned = privacy_planning.build(recipe, site, changes, _accountants(accountant))
    print(json.dumps(planned.as_json(), indent=2) if as_json else "\n".join(_lines(planned)))


def _lines(planned: planners.Plan) -> list[str]:
    from fedvfm.privacy import planner

    asked = planned.question
    lines = [
        f"{asked.mechanism}: {asked.units:,} {asked.unit}s, batch {asked.batch:,} (rate {asked.rate:.4g}), "
        f"{asked.steps:,} steps, delta {asked.delta:g}"
    ]
    if planned.noise_multiplier is not None:
        lines.append(f"noise multiplier {planned.noise_multiplier:g}")
    for name, entry in planned.epsilons.items():
        known = ", with what was spent before" if asked.before else ""
        lines.append(f"epsilon {entry.value:.2f} ({asked.unit} level, delta {entry.delta:g}, {name}{known})")
    for each in planned.signals:
        lines.append(
            f"{each.way + ':':14} {each.numbers:,} numbers; a step's noise is {each.step:.2f} clips on a gradient of "
            f"at most 1, over the run {each.run:.2f}: {each.verdict}"
        )
    lines += [f"warning: {entry}" for entry in planned.warnings]
    lines += [f"covered: {entry}" for entry in asked.covered]
    return lines + [f"not covered: {entry}" for entry in planner.NOT_COVERED]


@app.command()
def audit(
    experiment: Annotated[str, typer.Argument(help="A bundled experiment's name or a TOML file.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=VALUE; the value is TOML. Repeatable.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Runs with coins of their own; more show more.")] = 1,
    canaries: Annotated[
        int, typer.Option(min=0, help="Images or patients of a site that are in or out by a coin; 0: all but one.")
    ] = 0,
    confidence: Annotated[float, typer.Option(help="Of the lower bound: above 0 and below 1.")] = 0.95,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Your own Python file, which registers parts first. Repeatable.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Attack an experiment's own updates: a lower bound of epsilon, beside the epsilon that it claims."""
    _require(confidence=(confidence, 1.0))
    extras.require()
    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import plugin as plugins
    from fedvfm.simulation import privacy_audit
    from fedvfm.simulation.engines import live

    plugins.load(plugin or [])
    what = experiments.load(experiment, sets or [])
    with logs.output(level=logging.CRITICAL if quiet or as_json else logging.INFO), live.watch(quiet or as_json) as see:
        result = privacy_audit.audit(what, runs=runs, canaries=canaries, confidence=confidence, observer=see)
    print(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(result.words()))
    result.require_held()


@app.command()
def epsilon(
    noise: Annotated[float, typer.Option("--noise", help="Noise multiplier: standard deviation in clips.")],
    samples: Annotated[int, typer.Option(min=1, help="Records, patients or sites to draw from.")],
    batch: Annotated[int, typer.Option(min=1, help="How many a step is expected to draw.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole run.")],
    delta: Annotated[float, typer.Option(help="Above 0, well below 1 / samples.")],
    accountant: Accountant = "rdp",
    as_json: Json = False,
) -> None:
    """The epsilon of a noise: no files, no data."""
    from fedvfm.privacy import accountant as accountants
    from fedvfm.privacy import base, planner

    _require(noise=(noise, 1e9), delta=(delta, 1.0))
    rate = base.sample_rate(samples, batch)
    spent = accountants.steps(rate, noise, steps)
    bounds: list[tuple[str, Any]] = [
        (name, accountants.epsilon(spent, delta, name)) for name in _accountants(accountant)
    ]
    if as_json:
        rows = {
            name: {"epsilon": planner.finite(bound.value), "order": planner.finite(bound.order)}
            for name, bound in bounds
        }
        print(json.dumps({"delta": delta, "sample_rate": rate, "epsilons": rows}, indent=2))
        return
    for name, bound in bounds:
        print(f"epsilon {bound.value:.4g} at delta {delta:g} ({name}, rate {rate:.4g}, {steps:,} steps)")
