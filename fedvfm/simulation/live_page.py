"""The live page of a simulation: ``python -m fedvfm.simulation.live_page FOLDER OUTPUT`` is its process.

The run writes how it stands into a file of a folder of its own, at most once a second; the rounds are read from the
journals of the run folder. Nothing that the page does reaches the run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.privacy import statements
from fedvfm.report import live_page, page, progress, quantity, rounds, scores, spans
from fedvfm.runtime import page_server, processes
from fedvfm.server import live_page as coordinator_page
from fedvfm.simulation import run_folder
from fedvfm.storage import hash_chain, storage

FILE = "progress.json"
EVERY_S = 1.0
NOTES = 20


class Board:
    """An observer that writes how the run stands; a disk that takes nothing stops no run.

    Args:
        folder: of the page's process.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._written = folder / FILE, float("-inf")
        self._arms: dict[str, dict[str, Any]] = {}
        self._notes: list[str] = []

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        if event == "note":
            self._notes = [*self._notes, str(fields["text"])][-NOTES:]
        elif event == "arm":
            about = {key: fields[key] for key in ("index", "count", "rounds", "sites")}
            self._arms[str(fields["name"])] = {**about, "round": 0, "asked": 0, "answered": 0, "stage": "begins"}
        elif "arm" in fields and str(fields["arm"]) in self._arms:
            self._take(self._arms[str(fields["arm"])], event, fields)
        if event in ("arm", "finished") or time.monotonic() >= self._written + EVERY_S:
            self._write()

    def _take(self, arm: dict[str, Any], event: str, fields: Mapping[str, Any]) -> None:
        if event == "round":
            arm.update(round=fields["round"], asked=len(fields["sites"]), answered=0, stage="trains")
        elif event == "reply" and fields["phase"] == "train":
            arm["answered"] += 1
        elif event in ("test", "finished"):
            arm["stage"] = "is tested" if event == "test" else "finished"

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(errors.StorageError):
            storage.write_text(self._path, json.dumps({"arms": self._arms, "notes": self._notes}) + "\n")


@contextlib.contextmanager
def shown(output: Path, port: int) -> Iterator[progress.Observer]:
    """Serve the page while the block runs; the observer that it follows the run by.

    Args:
        output: the run's folder, or the parent of several seeds; need not be there yet.
        port: on loopback; 0 for any that is free.

    Raises:
        EngineError: if the port is taken.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedvfm-page-"))
    children: list[processes.Child] = []

    def begin(program: processes.Program) -> None:
        children.append(processes.Child(program, folder))
        children[-1].start()

    try:
        page_server.start(begin, folder, __spec__.name, str(output.absolute()), port=port)
        yield Board(folder)
    finally:
        for child in children:
            child.stop()
        shutil.rmtree(folder, ignore_errors=True)


def both(first: progress.Observer, second: progress.Observer) -> progress.Observer:
    """An observer that tells two."""

    def tell(event: str, /, **fields: object) -> None:
        first(event, **fields)
        second(event, **fields)

    return tell


def current(output: Path) -> run_folder.RunFolder:
    """The run that goes on: of several seeds the one that began last."""
    parent = run_folder.RunFolder(output)
    if not parent.seeds.exists():
        return parent
    begun = list(output.glob("seed-*/experiment.json"))
    return run_folder.RunFolder(max(begun, key=lambda path: path.stat().st_mtime_ns).parent) if begun else parent


def files(folder: Path, output: Path) -> list[Path]:
    """What the page is made of."""
    run = current(output)
    return [folder / FILE, run.experiment, run.path / "journal.jsonl", run.summary]


def content(folder: Path, output: Path) -> live_page.Content:
    """The page as it is now."""
    run, state = current(output), _read(folder / FILE)
    experiment = _read(run.experiment)
    arms: Mapping[str, Mapping[str, Any]] = state.get("arms", {})
    journals = {name: _journal(run.arm(name)) for name in arms}
    journal = journals.get("federated") or _journal(run.path)
    recipe = experiment.get("recipe", {})
    kinds = (str(recipe.get(part, {}).get("kind", default)) for part, default in (("task", ""), ("target", "class")))
    primary = coordinator_page.primary_of(*kinds)
    mark = journal[-1].get("prompt") if journal else None
    name = scores.shown(scores.metric_name(primary), {"prompt": mark})
    title = str(experiment.get("title") or experiment.get("name") or "simulation")
    done = sum(arm["stage"] == "finished" for arm in arms.values())
    words = f"simulation on this machine, seed {recipe.get('seed', '?')}, {run.path}"
    notes = state.get("notes", [])
    parts = {
        "head": live_page.heading(title, words, [note for note in notes if note.startswith("Attention")]),
        "figures": page.cards(_cards(arms, done, journal, primary, name)),
        "arms": page.section("arms-now", "Arms", _arms(arms, journals, primary, name)),
        "learning": coordinator_page.learning(journal, primary, name),
        "refused": page.section("refusals-now", "What was refused", coordinator_page.refusals(journal)),
        "rounds": coordinator_page.all_rounds(journal, primary, name),
        "notes": page.section("notes-now", "Notes", "".join(page.paragraph(note) for note in notes)),
    }
    federated = arms.get("federated", {})
    data = {"experiment": experiment.get("name"), "arms": arms, "notes": notes, "finished": run.finished}
    about = f"round {federated['round']} of {federated['rounds']}" if federated else "begins"
    return live_page.Content(f"{title}: {about}", parts, data)


def _cards(
    arms: Mapping[str, Mapping[str, Any]], done: int, journal: Sequence[Mapping[str, Any]], primary: str, name: str
) -> list[tuple[str, str, str]]:
    count = max((arm["count"] for arm in arms.values()), default=0)
    at_work = quantity.of(len(arms) - done, "arm") + " at work"
    cards = [("Arms finished", f"{done} of {count}" if count else "0", at_work)]
    if journal:
        last = journal[-1]
        total = arms.get("federated", {}).get("rounds", "?")
        pace = spans.span(sum(row["seconds"] for row in journal) / len(journal))
        cards.append(("Federated rounds done", f"{last['round']} of {total}", f"{pace} each"))
        loss = rounds.mean_loss(last)
        value = rounds.mean_of(_scored(journal), primary)
        cards += [("Mean loss", f"{loss:.3f}", "of the last round")] if loss is not None else []
        cards += [(f"Mean validation {name}", f"{value:.3f}", "over sites")] if value is not None else []
        moved = sum(row["bytes"]["up"] + row["bytes"]["down"] for row in journal)
        cards.append(("Bytes moved", rounds.size(moved), "both ways"))
        if "privacy" in last:
            spent = last["privacy"]["epsilon"]
            shown_epsilon = "not bounded" if spent is None else f"{spent:.3g}"
            cards.append(("Epsilon so far", shown_epsilon, statements.so_far(last["privacy"])))
    return cards


def _arms(
    arms: Mapping[str, Mapping[str, Any]],
    journals: Mapping[str, Sequence[Mapping[str, Any]]],
    primary: str,
    name: str,
) -> str:
    rows: list[list[page.Cell]] = []
    for arm, row in arms.items():
        journal = journals[arm]
        answered = f"{row['answered']} of {row['asked']}" if row["stage"] == "trains" else None
        loss = rounds.mean_loss(journal[-1]) if journal else None
        rounds_done = f"{row['round']} of {row['rounds']}"
        rows.append([arm, row["stage"], rounds_done, answered, loss, rounds.mean_of(_scored(journal), primary)])
    if not rows:
        return page.paragraph("No arm has begun yet: images are read, and the backbone is loaded.", "soft")
    head = ("arm", "how it stands", "round", "sites that answered", "mean loss", f"mean val {name}")
    caption = "Arms that began; those that were finished before a resume are not listed."
    return page.table(head, rows, caption, words=(1,))


def _scored(journal: Sequence[Mapping[str, Any]]) -> Mapping[str, Mapping[str, float]]:
    """The last validation, by site."""
    return next((line["validation"] for line in reversed(journal) if line["validation"]), {})


def _journal(folder: Path) -> list[dict[str, Any]]:
    return hash_chain.read(folder / "journal.jsonl")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def serve(folder: Path, output: Path) -> None:
    """Be the page's process until it is told to end."""
    page_server.serve(folder, lambda: content(folder, output), lambda: files(folder, output))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
