"""The site's audit log in sentences: what came, what was done and what left; and each round in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedvfm.client import refusal_words
from fedvfm.report import quantity, rounds, spans

Entry = Mapping[str, Any]
SPLITS = {"val": "validation", "test": "test"}


def of(entry: Entry) -> str:
    """One entry in a sentence; empty for one that another says too."""
    kind, number = str(entry.get("kind", "")), entry.get("round", 0)
    recipe = f" of recipe {str(entry['recipe'])[:12]}" if "recipe" in entry else ""
    size = rounds.size(entry["bytes"]) if "bytes" in entry else ""
    event = entry["event"]
    if event == "received":
        return _received(kind, number, recipe, size, entry)
    if event == "sent":
        return _sent(kind, number, recipe, size, entry)
    if event == "decided":
        return _decided(kind, recipe, entry)
    if event == "trained":
        return f"Trained round {number}{recipe} on {_images(entry)} in {spans.span(entry['seconds'])}."
    if event == "evaluated":
        about = f"{_images(entry)} for {SPLITS.get(entry['split'], entry['split'])}"
        return f"Scored the adapter of round {number}{recipe} on {about}."
    if event == "interrupted":
        return f"Work on a message{recipe} broke off after {spans.span(entry['seconds'])}; the time counts."
    if event == "rehearsed":
        return f"A rehearsal{recipe} ran here; nothing left."
    if event == "surveyed":
        return f"Answered survey {_short(entry)} with {', '.join(entry.get('metrics', ()))}."
    if event == "purged":
        return f"Kept files were removed by a person: {kind}, {size}."
    if event == "unmasked":
        return f"Shares for the sum of round {number}{recipe} were opened for sites that dropped out."
    return ""


def _received(kind: str, number: int, recipe: str, size: str, entry: Entry) -> str:
    if kind == "handshake":
        return f"The coordinator asked whether this site takes part in a run{recipe}."
    if kind == "train":
        return f"The coordinator asked for round {number}{recipe} ({size})."
    if kind == "evaluate":
        split = SPLITS.get(entry.get("split", ""), "its")
        return f"The coordinator asked to score the adapter of round {number}{recipe} on {split} images ({size})."
    if kind == "recipe":
        return f"Recipe {str(entry.get('recipe', ''))[:12]} arrived and waits for a person."
    if kind == "survey":
        return f"The coordinator asked for statistics: survey {_short(entry)}."
    if kind == "roster":
        return "A roster document of secure aggregation arrived and waits for a person."
    return f"A message of kind '{kind}' came{recipe} ({size})." if kind == "unknown" else ""


def _sent(kind: str, number: int, recipe: str, size: str, entry: Entry) -> str:
    names = ", ".join(entry.get("metrics", ()))
    if kind == "refusal":
        word = str(entry["reason"])
        text, remedy = refusal_words.why(word, str(entry.get("recipe", entry.get("fingerprint", ""))))
        return f"Refused a message{recipe}: {text} ({word}). What helps: {remedy}."
    if kind == "train":
        metrics = f", and {names}" if names else ""
        return f"The update of round {number}{recipe} left: {entry.get('numbers', 0):,} numbers{metrics}, {size}."
    if kind == "evaluate":
        split = SPLITS.get(entry.get("split", ""), "")
        return f"Scores of round {number}{recipe} on {split} images left: {names or 'no metric'}, {size}."
    if kind == "survey":
        return f"Statistics left, the answer to survey {_short(entry)}: {names}, {size}."
    if kind == "handshake":
        return f"This site answered that it takes part in a run{recipe}."
    return "The request to join was written." if kind == "request" else ""


def _decided(kind: str, recipe: str, entry: Entry) -> str:
    if kind == "approval":
        done = "approved" if entry["verdict"] == "approved" else "withdrew the approval of"
        return f"A person here {done}{recipe[3:]}."
    if kind == "survey-approval":
        done = "approved" if entry["verdict"] == "approved" else "withdrew the approval of"
        return f"A person here {done} survey {_short(entry)}."
    return f"{_capital(end(entry))}." if kind == "final" else ""


def end(entry: Entry) -> str:
    """What was decided of the final adapter, as the end that it is."""
    short, score = str(entry.get("fingerprint", ""))[:12], ""
    if "score" in entry:
        score = f", score {entry['score']:.3f} on {quantity.of(entry['examples'], 'own test image')}"
    if entry["verdict"] == "pending":
        decide = f"fedvfm client adapter --accept {short}, or --decline {short}"
        return f"finished; the final adapter waits for your decision{score}: {decide}"
    by = "by a person" if entry.get("reason") == "person" else f"by the policy ({entry.get('reason', 'policy')})"
    return f"finished; the final adapter was {entry['verdict']} {by}{score}"


def _short(entry: Entry) -> str:
    return str(entry.get("fingerprint", ""))[:12]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _images(entry: Entry) -> str:
    return quantity.of(int(entry["examples"]), "image")


class Rounds:
    """Each round in one line, as the entries of the log come.

    Args:
        rounds_of: how many rounds a recipe has, by its hash; 0 where that is not known.
    """

    def __init__(self, rounds_of: Callable[[str], int]) -> None:
        self._rounds_of = rounds_of
        self._trained: dict[tuple[str, int], Entry] = {}
        self._told: set[tuple[str, int]] = set()

    def line(self, entry: Entry) -> str:
        """What this entry lets one say; mostly nothing."""
        event, kind = entry["event"], entry.get("kind")
        at = (str(entry.get("recipe", "")), int(entry.get("round", 0)))
        if event == "trained":
            self._trained[at] = entry
        elif event == "decided" and kind == "final":
            return end(entry)
        elif event == "sent" and kind == "train":
            return self._round(at, entry)
        elif event == "sent" and kind == "evaluate" and entry.get("split") == "val" and at not in self._told:
            self._told.add(at)
            return f"{self._head(at)}: scored on validation images alone; {rounds.size(entry['bytes'])} left"
        return ""

    def _round(self, at: tuple[str, int], entry: Entry) -> str:
        trained, size = self._trained.pop(at, None), rounds.size(entry["bytes"])
        self._told.add(at)
        if trained is None:
            return f"{self._head(at)}: asked again, the same update left again, {size}"
        done = f"trained on {_images(trained)} in {spans.span(trained['seconds'])}"
        return f"{self._head(at)}: {done}; {entry.get('numbers', 0):,} numbers left, {size}"

    def _head(self, at: tuple[str, int]) -> str:
        recipe, number = at
        of_all = self._rounds_of(recipe)
        return f"round {number} of {of_all}" if of_all else f"round {number} of recipe {recipe[:12]}"
