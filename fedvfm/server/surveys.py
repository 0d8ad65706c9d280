"""Surveys of a federation: published by a person, answered by sites, merged. NumPy alone.

surveys/<hash>/survey.json       what is asked; from then on every approved site that is there is asked
surveys/<hash>/answers/<site>    what each answered
surveys/<hash>/words.json        why the others have not, in a word each
surveys/<hash>/closed            nobody is asked any more
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import survey as surveys
from fedvfm.server import state_folder
from fedvfm.storage import storage
from fedvfm.survey import answer, noise
from fedvfm.trust import roster as rosters
from fedvfm.trust import signed_documents

NOT_ASKED = "not-connected"
"""The word of a site that nothing came of: it was not there since the survey was published."""


def _folder(where: state_folder.State) -> Path:
    return where.folder / "surveys"


def publish(where: state_folder.State, survey: surveys.Survey) -> bool:
    """Keep a survey, so that the coordinator asks the sites; whether it is new.

    Raises:
        ConfigError: if no noise reaches its epsilon.
    """
    noise.event(survey)
    place = _folder(where) / survey.hash
    if (place / "survey.json").exists():
        if not is_open(where, survey.hash):
            where.audit.record("decided", kind="survey", verdict="published", fingerprint=survey.hash)
            (place / "closed").unlink(missing_ok=True)
        return False
    for needed in (_folder(where), place, place / "answers"):
        storage.make_private(needed)
    where.audit.record("decided", kind="survey", verdict="published", fingerprint=survey.hash)
    storage.write_text(place / "survey.json", signed_documents.to_text(survey))
    return True


def close(where: state_folder.State, survey: surveys.Survey) -> None:
    """Ask nobody any more; the answers stay."""
    where.audit.record("decided", kind="survey", verdict="closed", fingerprint=survey.hash)
    storage.write_text(_folder(where) / survey.hash / "closed", "")


def every(where: state_folder.State) -> dict[str, surveys.Survey]:
    """The surveys that were published, by hash.

    Raises:
        TrustError: if a file was changed.
    """
    known = {}
    for path in sorted(_folder(where).glob("*/survey.json")):
        survey = signed_documents.read(path, surveys.Survey, "survey")
        if survey.hash != path.parent.name:
            raise errors.TrustError(f"{path}: holds another survey than its folder says")
        known[survey.hash] = survey
    return known


def is_open(where: state_folder.State, survey: str) -> bool:
    """Whether sites are asked for it."""
    return not (_folder(where) / survey / "closed").exists()


def standing(where: state_folder.State) -> dict[str, dict[str, Any]]:
    """Survey -> how it stands: title, whether it is open, who answered, and why the other approved sites did not.

    Raises:
        TrustError: if a file was changed.
    """
    status, rows = {name: entry.status for name, entry in where.sites().items()}, {}
    for key, survey in every(where).items():
        runs, done, reasons = is_open(where, key), answered(where, key), words(where, key)
        wanted = {name for name in (*reasons, *status) if status.get(name, rosters.APPROVED) == rosters.APPROVED}
        rows[key] = {
            "title": survey.title,
            "open": runs,
            "answered": sorted(done),
            "waiting": {name: reasons.get(name, NOT_ASKED) for name in sorted(wanted - done)} if runs else {},
        }
    return rows


def files(where: state_folder.State) -> list[Path]:
    """What :func:`standing` is made of, but for the roster."""
    places = sorted(_folder(where).glob("*"))
    return [_folder(where), *(place / name for place in places for name in ("words.json", "closed", "answers"))]


def find(where: state_folder.State, asked: str) -> surveys.Survey:
    """A survey by its hash, or the first letters of it; the only one where nothing was given.

    Raises:
        ConfigError: if none or several are meant.
    """
    known = every(where)
    named = [survey for key, survey in known.items() if key.startswith(asked.lower())]
    if len(named) != 1:
        listed = ", ".join(key[:12] for key in known) or "none"
        shown = signed_documents.shown(asked)[:64]
        raise errors.ConfigError("server survey", [f"which survey? '{shown}' is not one of: {listed}"])
    return named[0]


def keep(where: state_folder.State, survey: surveys.Survey, site: str, text: str) -> None:
    """Keep what a site answered.

    Raises:
        ProtocolError: if that is no answer to this survey by this site.
    """
    answer.parse(text, survey, site)
    storage.write_text(_folder(where) / survey.hash / "answers" / site, text)


def answers(where: state_folder.State, survey: surveys.Survey) -> dict[str, answer.Answer]:
    """What sites answered, by name, but those that withdrew; checked again.

    Raises:
        ProtocolError: if a file was changed.
    """
    place = _folder(where) / survey.hash / "answers"
    names = sorted(answered(where, survey.hash))
    return {name: answer.parse((place / name).read_text(), survey, name) for name in names}


def answered(where: state_folder.State, survey: str) -> set[str]:
    """The sites that did, but those that withdrew."""
    paths = (_folder(where) / survey / "answers").glob("[!.]*")
    withdrawn = {name for name, entry in where.sites().items() if entry.status == rosters.WITHDRAWN}
    return {path.name for path in paths} - withdrawn


def answer_paths(where: state_folder.State, site: str) -> list[Path]:
    """A site's answers to all surveys."""
    return sorted(path for path in _folder(where).glob("*/answers/*") if path.name == site)


def note_words(where: state_folder.State, survey: str, words: Mapping[str, str]) -> None:
    """Keep why sites have not answered."""
    storage.write_text(_folder(where) / survey / "words.json", json.dumps(dict(sorted(words.items()))) + "\n")


def words(where: state_folder.State, survey: str) -> dict[str, str]:
    """Why sites have not answered, in a word each; "asked" where nothing came yet."""
    try:
        kept = json.loads((_folder(where) / survey / "words.json").read_text())
        return {str(site): str(word) for site, word in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}
