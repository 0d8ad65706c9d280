"""Why a site takes no part, for the coordinator's people: the word of the status file, a sentence, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvfm.trust import signed_documents

WORDS: dict[str, tuple[str, str]] = {
    "takes-part": ("takes part", ""),
    "not-connected": (
        "is not connected",
        "its people run: fedvfm client start SITE.toml; fedvfm doctor client SITE.toml there says what stops it",
    ),
    "asked": ("was greeted and has not answered yet", "wait: a site may be reading its weights, or be at work"),
    "approval-pending": (
        "waits for a person's approval of the recipe",
        "there: fedvfm client review {recipe}, then fedvfm client approve {recipe}",
    ),
    "roster-pending": (
        "waits for a person's approval of the roster document",
        "there: fedvfm client review {recipe}, then fedvfm client approve {recipe} --roster HASH",
    ),
    "survey-difference": (
        "was asked before with few patients other than now",
        "wait, or publish a survey with noise",
    ),
    "policy-survey": (
        "refuses: its policy does not let out what the survey asks for, or no further survey",
        "there: fedvfm client review {recipe}; only its people can change it",
    ),
    "policy-closed": ("is outside its hours", "nothing; it answers when it is open"),
    "ledger-went-back": (
        "showed a privacy ledger that is shorter than it was; it takes no part in this recipe any more",
        "there: fedvfm ledger verify, then fedvfm ledger reconcile; it takes part again in another recipe",
    ),
    "went-back": (
        "lacks what it sent: its folder was put back to an earlier day; it answers nothing more of this recipe",
        "there: put the newest copy of the folder back; it takes part again in another recipe",
    ),
    "other-name": ("calls itself by another name than its key's", "there: name in SITE.toml is the name of the invite"),
    "other-settings": (
        "holds the backbone with other settings (config.json) than another site",
        "fetch weights and config.json again at these sites",
    ),
    "batch": ("got no answer from its cluster", "its people look at the queue; it is asked again in the next round"),
    "device": ("has a GPU that does not compute", "its people look at it; it is asked again in the next round"),
    "weights": ("lacks the backbone's weights, or has others", "there: fedvfm weights fetch, or import"),
    "malformed": ("sent what cannot be read", "install the same release at both ends"),
    "oversized": ("sent more than any answer has", "install the same release at both ends"),
    "refused": ("answered what does not fit the recipe", "install the same release at both ends"),
    "privacy-budget": (
        "has too little of its privacy budget left",
        "there: fedvfm privacy plan; or go on without it: fedvfm server drop {site}",
    ),
    "invited": (
        "was invited and is not approved yet",
        "it runs fedvfm client join; then here: fedvfm server approve REQUEST --key KEY",
    ),
    "dropped": ("is dropped: it is asked nothing", "fedvfm server readmit {site} takes it in again"),
    "revoked": ("is revoked: its key is let in no more", "fedvfm server invite {site} lets it join anew"),
    "withdrawn": (
        "withdrew: neither its key nor its name is let in any more",
        "fedvfm server withdraw {site} lists what its updates are part of",
    ),
    "stopped": ("is approved; the run does not go on now", "fedvfm server start"),
    "finished": ("is approved; the recipe is finished", ""),
}
_POLICY = (
    "refuses: its policy does not accept this",
    "there: fedvfm client review {recipe} --policy SITE.toml shows each rule; only its people can change it",
)
_OTHER = ("refuses", "the console of fedvfm client start there says why and what to do")


def sentence(word: str) -> str:
    """What the site does, without its name."""
    return WORDS.get(word, _POLICY if word.startswith("policy-") else _OTHER)[0]


def remedy(word: str, site: str, recipe: str) -> str:
    """What helps; empty where nothing is wrong."""
    text = WORDS.get(word, _POLICY if word.startswith("policy-") else _OTHER)[1]
    return text.format(site=site, recipe=recipe[:12])


def survey_sentence(word: str) -> str:
    """Why a site has not answered a survey, without its name."""
    return "waits for a person's approval" if word == "approval-pending" else sentence(word)


def survey(hash_: str, row: Mapping[str, Any]) -> str:
    """A survey and who answered it.

    Args:
        hash_: of the survey.
        row: of :func:`fedvfm.server.surveys.standing`.
    """
    answered, closed = ", ".join(row["answered"]) or "nobody yet", "" if row["open"] else ", closed"
    return f"survey {hash_[:12]} '{signed_documents.shown(row['title'])}'{closed}: answered by {answered}"


REFUSED = {
    "no-answer": "it did not answer in time",
    "protocol": "its answer cannot be read",
    "site-name": "it answered under another site's name",
    "stale": "it answered another round or session",
    "too-stale": "it trained for longer than the recipe lets an update be late (staleness_limit)",
    "base": "it trained from another adapter than the one it was sent",
    "examples": "it claims more training images than it can have",
    "loss": "it claims a loss that cannot be a weight",
    "not-finite": "a number of the update is not finite",
    "norm": "the update is far longer than updates so far",
    "manifest": "its arrays are not those of the recipe",
    "signature": "it is not signed with the site's key",
    "shares": "shares of keys are missing or too many",
}
"""Words by which an update is not admitted, that are no site's own."""


def refused(reason: str) -> str:
    """Why an update was not admitted, in words; ``reason`` as the journal has it."""
    word = reason.removeprefix("site-")
    return REFUSED.get(reason) or (f"the site {sentence(word)}" if word != reason else reason.replace("-", " "))
