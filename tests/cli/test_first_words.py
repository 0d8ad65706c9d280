"""What a person types first: help, completion, a plan for a device that is not here; and how numbers are said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer

import fedvfm
from fedvfm import errors
from fedvfm.cli import main
from fedvfm.report import quantity

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", [(), ("simulate",), ("server", "start"), ("client", "adapter"), ("explain",)])
def test_h_is_help(cli: Any, verb: tuple[str, ...]) -> None:
    short, long = cli(*verb, "-h"), cli(*verb, "--help")
    assert (short.code, short.out) == (0, long.out)
    assert "Usage:" in short.out


def test_no_help_loses_a_word_in_brackets() -> None:
    """Rich takes ``[policy]`` for markup and prints nothing in its place."""

    def texts(command: click.Command) -> Iterator[str]:
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for name in command.list_commands(click.Context(command)) if isinstance(command, click.Group) else ():
            inner = command.get_command(click.Context(command), name)
            yield from () if inner is None else texts(inner)

    found = list(texts(typer.main.get_command(main.app)))
    assert len(found) > 100
    assert [text for text in found if re.search(r"\[/?[a-z#@]", text)] == []


def test_help_loads_nothing_that_takes_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fedvfm.cli import main; print(*sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert not loaded & {"numpy", "psutil", "pydantic", "cryptography", "flwr", "torch", "httpx"}


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("fedvfm exp", "experiments"),
        ("fedvfm simulate brain", "brain-mri"),
        ("fedvfm explain recipe.opt", "recipe.optimiser"),
    ],
)
def test_a_shell_completes(typed: str, word: str) -> None:
    asked = {"_FEDVFM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fedvfm.cli import main; sys.argv = ['fedvfm']; main.main()"],
        env={**os.environ, **asked}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert word in done.stdout.split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_plan_says_that_the_device_is_not_here(cli: Any) -> None:
    refused = cli("simulate", "tiny.toml", "--dry-run", "--device", "cuda")
    assert (refused.code, "torch sees no CUDA device" in refused.err) == (errors.ConfigError.exit_code, True)
    elsewhere = cli("simulate", "tiny.toml", "--dry-run", "--set", 'device = "cuda"')
    assert (elsewhere.code, "would be refused: device = 'cuda'" in elsewhere.out) == (0, True)


def test_a_number_has_its_plural() -> None:
    assert [quantity.of(number, "round") for number in (0, 1, 2, 1234)] == [
        "0 rounds",
        "1 round",
        "2 rounds",
        "1,234 rounds",
    ]
    assert quantity.of(1, "update was", "updates were") == "1 update was"
    assert quantity.of(2, "update was", "updates were") == "2 updates were"


def test_the_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {fedvfm.__version__}" in lines
    licence = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert f"license: {licence}" in lines
