"""``fedvfm client review --html``: what an ethics board and a data-protection officer read before a decision.

Every sentence follows from the recipe, the hospital's own policy, and what the coordinator wrote into the signed
invite; what the coordinator wrote is marked as its own words. The page asks the network for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvfm.client import privacy_report, recipe_review
from fedvfm.client.readiness import outputs
from fedvfm.config import privacy, schema
from fedvfm.report import page
from fedvfm.storage import storage
from fedvfm.trust import locked_recipe, signed_documents
from fedvfm.trust import study as studies

OPTION, HEAD = "--html", b"<!doctype html>"
SILENT = "The coordinator did not say. Ask before you decide; a new invite can say it."
SIGNERS = ("Principal investigator", "Data-protection officer", "Ethics board", "Head of IT")


@dataclass(frozen=True)
class Asked:
    """Who asks for what.

    Attributes:
        locked: the recipe.
        study: what the coordinator wrote of it; None where it wrote nothing.
        federation, address, site: as the invite says; empty where only a recipe was given.
        checked: whether the invite's signature was checked, against the fingerprint that was told, by joining.
        invited: hash of the recipe that the invite was for; empty where that is not known.
    """

    locked: locked_recipe.LockedRecipe
    study: studies.Study | None = None
    federation: str = ""
    address: str = ""
    site: str = ""
    checked: bool = False
    invited: str = ""

    @property
    def doubt(self) -> str:
        """What a reader must know before the coordinator's own words; empty where they are of this very recipe."""
        if self.study is None or self.invited in ("", self.locked.hash):
            return ""
        return (
            f"What the coordinator wrote came with the invite, which was for recipe {self.invited[:12]}. This is "
            "another recipe: ask whether the words hold for it."
        )


def write(path: Path, asked: Asked, judged: privacy_report.Judged) -> None:
    """Write the page for its owner's eyes (0600); it is handed on by hand.

    Raises:
        OutputInUse: if another kind of file is there.
        StorageError: if the disk refuses.
    """
    outputs.require(path, OPTION, HEAD)
    title = f"Dossier: {asked.federation or 'recipe ' + asked.locked.hash[:12]}"
    storage.write_text(path, page.document(title, body(asked, judged)))


def body(asked: Asked, judged: privacy_report.Judged) -> list[str]:
    """The page, part by part."""
    words = dict(recipe_review.words(asked.locked))
    here = judged.here
    parts = {
        "purpose": ("Purpose", _own_words("" if asked.study is None else asked.study.purpose)),
        "who": ("Who asks", _who(asked)),
        "others": ("Other hospitals", _others(asked, words)),
        "duration": ("How long", _duration(judged, words)),
        "data": ("What is computed from", _data(words)),
        "leaves": ("What leaves this hospital", _leaves(words)),
        "stays": ("What never leaves", page.paragraph(f"{_sentence(recipe_review.NEVER)}.")),
        "risks": ("Risks", _list(risks(asked.locked, noised=_noised(judged)))),
        "safeguards": ("What this hospital's own policy says", _policy(judged)),
        "budget": ("Privacy at this hospital", _list(privacy_report.words(here)) if here is not None else ""),
        "withdrawal": ("Withdrawal, and what stays", _list(withdrawal(asked.locked))),
        "retention": ("What the coordinator keeps", _own_words("" if asked.study is None else asked.study.retention)),
        "licence": ("The result", _result(asked)),
        "decision": ("Decision", _decision(asked)),
        "annex": ("Annex: the recipe word by word", _annex(asked.locked, words)),
    }
    sections = [page.section(key, title, inner) for key, (title, inner) in parts.items() if inner]
    return [_head(asked), "<main>", *sections, "</main>"]


def _head(asked: Asked) -> str:
    title = f"Taking part in {asked.federation}" if asked.federation else "Taking part in a federation"
    when = (
        f"Made on {signed_documents.stamp(signed_documents.now())[:10]} with fedvfm {locked_recipe.version()}, offline."
    )
    about = f"{f'For site {asked.site}. ' if asked.site else ''}Recipe {asked.locked.hash}. {when}"
    doubt = (
        ""
        if asked.checked or not asked.federation
        else "Whom this invite is from was not checked: 'fedvfm client join' checks it against the fingerprint you "
        "were told."
    )
    intro = (
        "A model that exists already, and stays as it is, is adapted to a task. A small adapter is trained at "
        "each hospital on its "
        "own images; its numbers travel to the coordinator, which joins those of all hospitals and sends the result "
        "back. "
        "Images do not travel."
    )
    note = "".join(f'<p class="note" role="note">{page.text(each)}</p>' for each in (doubt, asked.doubt) if each)
    top = f'<h1>{page.text(title)}</h1><p class="soft">{page.text(about)}</p>'
    return f"<header>{top}{note}{page.paragraph(intro)}</header>"


def _own_words(text: str | None) -> str:
    if not text:
        return page.paragraph(SILENT, "note")
    lines = "".join(page.paragraph(line) for line in text.splitlines() if line.strip())
    return page.paragraph("In the coordinator's own words:", "soft") + lines


def _who(asked: Asked) -> str:
    rows: list[list[page.Cell]] = [["contact", asked.study.contact if asked.study else SILENT]]
    if asked.federation:
        rows = [["federation", asked.federation], ["coordinator's address", asked.address], *rows]
    return page.table(("what", "as the invite says"), rows, "Who asks this hospital to take part.", words=(1,))


def _others(asked: Asked, words: dict[str, str]) -> str:
    named = asked.study.hospitals if asked.study else ""
    return _own_words(named) + page.paragraph(f"{_sentence(words['sites'])}.")


def _duration(judged: privacy_report.Judged, words: dict[str, str]) -> str:
    rows = [f"{_sentence(words['how long'])}."]
    if judged.rules is not None:
        rules = judged.rules
        hours = "at any hour" if rules.hours is None else f"within {', '.join(rules.hours)} ({rules.time_zone})"
        rows.append(
            f"This hospital's policy stops it after {rules.max_rounds:,} rounds or {rules.max_hours:g} hours of "
            f"computing, "
            f"{hours}, whatever is asked."
        )
    return _list(rows)


def _data(words: dict[str, str]) -> str:
    rows = [
        "Images and labels (masks or classes) that this hospital names in its own file, on its own machine.",
        f"Task: {words['task']}.",
        f"Each image becomes: {words['what images become']}.",
        f"Training: {words['how it learns']}.",
    ]
    return _list(rows)


def _leaves(words: dict[str, str]) -> str:
    heads = (
        ("leaves at the start", "when it joins a run"),
        ("leaves each round", "after each round"),
        ("leaves at the end", "at the end"),
        ("leaves with all", "with every message"),
    )
    rows: list[list[page.Cell]] = [[when, _sentence(words[key])] for key, when in heads]
    rows.append(["names of the metrics", words["metrics that leave"]])
    caption = "All that leaves. 'fedvfm client rehearse' runs one real round offline and lists every byte of it."
    return page.table(("when", "what"), rows, caption, words=(1,))


def _noised(judged: privacy_report.Judged) -> bool:
    """Whether this hospital's scores leave with noise and are charged to its budget."""
    return judged.rules is not None and judged.rules.metrics_epsilon is not None


def risks(locked: locked_recipe.LockedRecipe, *, noised: bool = False) -> list[str]:
    """What may go wrong for patients and for the hospital, in plain words.

    Args:
        locked: the recipe.
        noised: whether the hospital's policy has ``metrics_epsilon``.
    """
    recipe = locked.recipe
    private = recipe.privacy.mechanism != privacy.NO_MECHANISM
    rows = [_privacy_risk(recipe, private)]
    rows.append(
        "The coordinator sees a sum of the hospitals' updates and none of them alone, unless more than "
        f"{recipe.secure_aggregation.colluders} of the other hospitals work together with it."
        if recipe.secure_aggregation is not None
        else "The coordinator sees this hospital's update by itself. Whoever breaks into the coordinator sees what "
        "it kept."
    )
    whose = (
        "validation and test patients, who are not trained on" if private else "the patients they were computed from"
    )
    care = "leave with noise that is charged to this hospital's budget" if noised else "are rounded"
    outside = " They are outside the recipe's epsilon." if private else ""
    rows.append(
        f"Metrics say something of {whose}; scores {care}, and none leaves that fewer patients have a part in than the "
        f"policy says.{outside}"
    )
    rows += [
        "The joint adapter goes to every hospital of the federation. Who has it can try the same attacks on it; what "
        "one "
        "hospital added is harder to find in it the more hospitals there are.",
        "Another hospital, or the coordinator, may act in bad faith: the adapter may come to answer wrongly, for "
        "some patients "
        "more than for others. It is scored on this hospital's own test images before it is kept, and is no medical "
        "device.",
        "Computing takes this machine's time; its files of features and updates are as sensitive as the images, and "
        "stay here.",
    ]
    return rows


def _privacy_risk(recipe: schema.Recipe, private: bool) -> str:
    if not private:
        return (
            "There is no differential privacy. From an update an expert may find out whether a patient was among "
            "those trained "
            "on, and in bad cases parts of an image. It holds no name and no number of a patient."
        )
    own = recipe.privacy
    size = f"epsilon {own.epsilon:g}" if own.epsilon is not None else f"a noise multiplier of {own.noise_multiplier:g}"
    if own.mechanism in privacy.SHARED:
        return (
            f"Differential privacy ({own.mechanism}, {size}, delta {own.delta:g}) is {recipe_review.shared(recipe)}. "
            "The more noise, the less anybody can learn of one."
        )
    unit = privacy.UNITS.get(own.mechanism, "record")
    where = "at the coordinator, which must be trusted" if own.mechanism == privacy.SITE_LEVEL else "at this hospital"
    return (
        f"Differential privacy ({own.mechanism}, {size}, delta {own.delta:g}) is added {where}: what is sent would "
        f"be nearly as "
        f"likely without any one {unit}. The smaller epsilon, the less anybody can learn of one; above 10 it "
        f"promises little."
    )


def withdrawal(locked: locked_recipe.LockedRecipe) -> list[str]:
    """How a hospital withdraws, and what cannot be taken back."""
    as_if = "with the same result as if it had never taken part"
    if locked.recipe.asynchronous is not None:
        as_if = "though not to the same numbers as if it had never taken part: who answers first is in them"
    return [
        "At any moment, without a reason: 'fedvfm client withdraw "
        f"{locked.hash[:12]}' ends the approval, and nothing more is trained or sent; 'fedvfm client stop' ends the "
        f"program.",
        "Updates that were joined before stay in the adapter: they cannot be taken out of a sum. Ask the coordinator "
        "in writing for 'fedvfm server withdraw': it lists in a signed file what they are part of, lets this hospital "
        f"in no more, and can train again without it from the round before it joined, {as_if}. The other hospitals "
        "must approve that.",
        "What the coordinator and the other hospitals hold of the adapter stays with them, as long as they say below.",
        "Here, 'fedvfm client purge' removes received and personal adapters, kept replies, logs and caches. Keys and "
        "the audit log stay, so that it can be shown later what left and what did not.",
        "A patient who objects is taken out of this hospital's data; rounds after that do without. For rounds "
        "before, the same "
        "holds as above.",
    ]


def _policy(judged: privacy_report.Judged) -> str:
    if judged.verdicts is None:
        return page.paragraph("No policy was given: run this with --policy SITE.toml to see each rule.", "note")
    rows: list[list[page.Cell]] = [
        [verdict.rule, "accepts" if verdict.accepted else "REFUSES", verdict.asked, verdict.allowed]
        for verdict in judged.verdicts
    ]
    caption = "Every message is held against these rules, whatever the coordinator asks; what is not named is refused."
    return page.table(("rule", "policy", "asked", "allowed"), rows, caption, words=(1, 2, 3))


def _result(asked: Asked) -> str:
    rows: list[list[page.Cell]] = [
        ["licence", (asked.study.licence if asked.study else "") or SILENT],
        ["backbone", dict(recipe_review.words(asked.locked))["backbone"]],
    ]
    return page.table(("what", "as the coordinator says"), rows, "The adapter that comes out of it.", words=(1,))


def _decision(asked: Asked) -> str:
    rows: list[list[page.Cell]] = [[who, "", "", ""] for who in SIGNERS]
    form = page.table(("role", "name", "date", "signature"), rows, "Taking part is approved, or not:", words=(1, 2, 3))
    command = f"fedvfm client approve {asked.locked.hash}"
    return form + page.paragraph(
        f"A person then approves exactly this recipe: {command}. Login name, time and hash are recorded; a recipe "
        f"that differs in "
        "one value has another hash, and needs another decision."
    )


def _annex(locked: locked_recipe.LockedRecipe, words: dict[str, str]) -> str:
    rows: list[list[page.Cell]] = [[heading, text] for heading, text in words.items()]
    values = json.dumps(locked.recipe.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    table = page.table(("what", "in words"), rows, "As 'fedvfm client review' says it.", words=(1,))
    return table + page.folded("Every setting", f"<pre>{page.text(values)}</pre>")


def _list(rows: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{page.text(row)}</li>" for row in rows) + "</ul>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
