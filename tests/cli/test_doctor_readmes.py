"""The operators' READMEs: every command in them exists with its options, and every error text stands in the code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from fedvfm.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "server" / "README.md", ROOT / "client" / "README.md", ROOT / "README.md", ROOT / "docker-compose.yml",
         ROOT / "simulations" / "README.md"]  # fmt: skip
DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))
OPERATORS = PAGES[:2]
COMMANDS = typer.main.get_command(main.app)


def commands(path: Path) -> list[str]:
    """Every line or inline word that calls fedvfm, without comments."""
    text = path.read_text().replace("\\\n", " ")
    found = [match.strip() for match in re.findall(r"^[^`#\n]*?\b(fedvfm [a-z][^#\n]*)", text, flags=re.M)]
    found += re.findall(r"`(fedvfm [a-z][^`]*)`", text)
    return [re.split(r"\s(?:[>|;&]|\|\|)", one)[0].replace("$$", "") for one in found]


def problem(line: str) -> str:
    """What is wrong with a command line; empty where nothing is."""
    words = shlex.split(re.sub(r"[\"'`)]+$", "", line.strip()) if line.count('"') % 2 or line.count("'") % 2 else line)
    command: click.Command = COMMANDS
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"no command '{rest[0]}'"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"no option {unknown}" if unknown else ""


@pytest.mark.parametrize("path", [*PAGES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_exists(path: Path) -> None:
    found = commands(path)
    if path in DOCUMENTS:  # where sentences begin with the name, too
        shown = re.findall(r"^ {4}.*$|`[^`\n]*`", path.read_text(), flags=re.M)
        found = [line for line in found if any(line in part for part in shown)]
    else:
        assert found
    wrong = {line: fault for line in found if (fault := problem(line))}
    assert not wrong


def test_the_check_finds_what_is_wrong() -> None:
    assert problem("fedvfm server launch") == "no command 'launch'"
    assert problem("fedvfm server start --port 1") == "no option ['--port']"
    assert not problem("fedvfm audit receipt STATE -o r.json")


def test_every_command_in_a_refusals_remedy_exists() -> None:
    from fedvfm.client import refusal_words

    said = [remedy.format(recipe="a" * 12) for _, remedy in refusal_words.WORDS.values()]
    found = [part for text in said for part in re.findall(r"fedvfm [a-zA-Z.\- ]+", text)]
    assert len(found) > 10
    assert not {line: fault for line in found if (fault := problem(line))}


@pytest.mark.parametrize("path", OPERATORS, ids=lambda path: path.parent.name)
def test_the_quick_start_is_at_most_eight_commands(path: Path) -> None:
    text = path.read_text().partition("## Quick start")[2].partition("\n## ")[0]
    block = re.search(r"(?:^    .+\n)+", text, flags=re.M)
    assert block is not None
    assert len(block.group().splitlines()) <= 8


def written() -> str:
    """All string constants of the package, those that stand side by side joined, what is filled in left out."""
    parts = []
    for path in sorted((ROOT / "fedvfm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts.append("".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values))
    return "\n".join(parts)


@pytest.mark.parametrize("path", OPERATORS, ids=lambda path: path.parent.name)
def test_every_error_text_is_one_that_we_say(path: Path) -> None:
    said = written()
    rows = re.findall(r"^\| (`.*?) \|", path.read_text().partition("## Troubleshooting")[2], flags=re.M)
    assert len(rows) >= 12
    system = {"No space left"}
    missing = [
        text
        for row in rows
        for text in re.findall(r"`([^`]+)`", row)
        if text.rstrip(":") not in said and text not in system  # the colon may come with what follows it
    ]
    assert not missing
