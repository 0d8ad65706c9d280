"""``fedvfm evidence``: what a coordinator shows after a study, each figure with the line of the record it comes from.

    model-card.html      what the adapter is, what it was scored to do, and where it must not be trusted
    data-protection.html who took part, what came and went, what protects it, how long it is kept
    technical-file.html  the headings of Annex IV of the EU's AI Act, filled as far as the record goes
    evidence.json        every line that is cited, by its hash, and the hash of each page; signed with the server's key,
                         whose certificate lies with it: the key is renewed, the authority that certified it stays

Journal and audit log are verified from their first line before anything is written, and again by :func:`verify`: a line
that was changed since is refused. What the record does not say is left for people to write, and marked so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.backbones import licences
from fedvfm.config import schema
from fedvfm.privacy import statements
from fedvfm.report import page, quantity, rounds, scores
from fedvfm.server import site_words, state_folder, status, withdrawal
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import certificates, invites, keys, locked_recipe, signed_documents
from fedvfm.trust import roster as rosters

FILE = "evidence.json"
JOURNAL, AUDIT, TEST = "journal", "audit", "final-test"
BLANK = "To be written by the provider: the record does not say."

Row = tuple[str, page.Cell, page.Markup]


class Cited(schema.Strict):
    """One line of a record: which log, its number from 1, its hash. Of the final test, line 1 and the file's sha256."""

    log: Literal["journal", "audit", "final-test"]
    line: Annotated[int, Field(ge=1)]
    hash: schema.Sha256


class Evidence(signed_documents.Document):
    """What the pages stand on."""

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-evidence-1"] = "fedvfm-evidence-1"
    federation: str
    recipe: schema.Sha256
    created: signed_documents.Time
    lines: Annotated[tuple[Cited, ...], Field(strict=False)]
    pages: dict[str, schema.Sha256]
    certificate: invites.Pem
    signature: signed_documents.Signature


@dataclass
class Record:
    """The verified record of one recipe of a federation, and what was cited of it.

    Attributes:
        journal, log: all lines, the first has number 1.
        tested: the final test; None where there is none.
    """

    where: state_folder.State
    locked: locked_recipe.LockedRecipe
    journal: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]
    tested: Mapping[str, Any] | None
    tested_sha256: str
    cited: dict[tuple[str, int], str] = field(default_factory=dict)

    @staticmethod
    def of(where: state_folder.State, recipe: str = "") -> Record:
        """Read and verify it.

        Args:
            where: the state folder.
            recipe: the beginning of a recipe's hash; empty for the present one, or the last one of which a round is
                done: after ``server extend`` the present one is new.

        Raises:
            AuditError, CheckpointError: naming the line that was changed, or a final test that is not the log's.
            ConfigError: if there is no such recipe, or no round of it is done.
        """
        where = dataclasses.replace(where, about=where.about.model_copy(update={"recipe": _chosen(where, recipe)}))
        arm = where.run_path(where.about.recipe)
        journal, log = hash_chain.read(arm / "journal.jsonl"), audit.read(where.audit_path)
        if not journal:
            raise errors.ConfigError("evidence", [f"recipe {where.about.recipe[:12]}: no round of it is done yet"])
        path = arm / "evaluation.json"
        tested = status.evaluation(where) if path.exists() else None
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if tested is not None else ""
        record = Record(where, where.lock(), journal, log, tested, sha256)
        if tested is not None and [log[number - 1]["digest"] for number in record.scored()[-1:]] != [sha256]:
            raise errors.AuditError(
                f"{path}: is not the final test whose hash stands in the audit log. Put the file back from a copy; "
                "where there is none, remove it and start the server: the final test is made again"
            )
        return record

    def scored(self) -> list[int]:
        """Numbers of the audit log's lines that say by its hash what the final test came to."""
        return self.lines(event="decided", kind=TEST, recipe=self.locked.hash)

    def cite(self, log: str, numbers: Iterable[int]) -> page.Markup:
        """Links to lines; many in a row are named by the first and the last, whose hash covers those between."""
        listed = sorted(set(numbers))
        if not listed:
            return page.Markup(page.ABSENT)
        ends = listed if len(listed) <= 3 else [listed[0], listed[-1]]
        for number in ends:
            self.cited[log, number] = self._hash(log, number)
        links = [f'<a href="#{log}-{number}">{log} {number}</a>' for number in ends]
        return page.Markup(links[0] + " to " + links[1] if len(listed) > 3 else ", ".join(links))

    def _hash(self, log: str, number: int) -> str:
        if log == TEST:
            return self.tested_sha256
        return str((self.journal if log == JOURNAL else self.log)[number - 1]["hash"])

    def lines(self, **wanted: Any) -> list[int]:
        """Numbers of the audit log's lines of this recipe, or of none, that have these values."""
        recipe = self.locked.hash
        return [
            number
            for number, entry in enumerate(self.log, start=1)
            if entry.get("recipe", recipe) == recipe and all(entry.get(key) == value for key, value in wanted.items())
        ]


def _chosen(where: state_folder.State, wanted: str) -> str:
    """The recipe whose hash begins so; see :meth:`Record.of`.

    Raises:
        ConfigError: if none or several do.
    """
    kept = sorted(path.stem for path in (where.folder / "recipes").glob("*.json"))
    if wanted:
        matching = [name for name in kept if name.startswith(wanted)]
        if len(matching) != 1:
            fault = f"--recipe {signed_documents.shown(wanted)[:64]}: {quantity.of(len(matching), 'recipe')} of this "
            known = ", ".join(name[:12] for name in kept)
            raise errors.ConfigError("evidence", [f"{fault}folder begin so. Kept are: {known}"])
        return matching[0]
    paths = {name: where.run_path(name) / "journal.jsonl" for name in kept}
    begun = {name: path.stat().st_mtime_ns for name, path in paths.items() if path.exists() and path.stat().st_size}
    present = where.about.recipe
    return present if present in begun or not begun else max(begun, key=begun.__getitem__)


def write(where: state_folder.State, folder: Path, recipe: str = "") -> Evidence:
    """Write the pages and what they stand on into a new folder.

    Args:
        where: the state folder.
        folder: the new folder.
        recipe: as of :meth:`Record.of`.

    Raises:
        OutputInUse: if the folder holds anything.
        AuditError, CheckpointError: if a line of the record was changed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise errors.OutputInUse(f"{folder} is not empty and is left as it is. Choose another --output")
    record = Record.of(where, recipe)
    makers = {
        "model-card.html": ("Model card", model_card),
        "data-protection.html": ("Data-protection annex", data_protection),
        "technical-file.html": ("Technical file", technical_file),
    }
    texts, every = {}, dict[tuple[str, int], str]()
    for name, (title, make) in makers.items():
        record.cited = {}
        body = make(record)
        texts[name] = page.document(title, [_head(title, record), "<main>", *body, _annex(record), "</main>"])
        every |= record.cited
    key = keys.read_private(where.key)
    draft = Evidence(
        federation=where.about.federation,
        recipe=record.locked.hash,
        created=signed_documents.stamp(signed_documents.now()),
        lines=tuple(Cited(log=log, line=line, hash=hash_) for (log, line), hash_ in sorted(every.items())),  # type: ignore[arg-type]
        pages={name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        certificate=where.certificate.read_text(),
        signature="A" * 40,
    )
    evidence = draft.model_copy(update={"signature": keys.sign(key, draft.signed_bytes())})
    with storage.guard(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in texts.items():
        storage.write_text(folder / name, text)
    signed_documents.write(folder / FILE, evidence)
    # Should a site withdraw, it is known what was written of its rounds.
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    where.audit.record("decided", kind=withdrawal.EVIDENCE, verdict="written", recipe=evidence.recipe, digest=digest)
    return evidence


def verify(where: state_folder.State, folder: Path) -> Evidence:
    """Check pages, signature and every cited line against the record as it is now.

    Raises:
        AuditError: naming the page or the line that was changed.
        TrustError: if it was signed by no server of this federation.
        CheckpointError: if the record is damaged elsewhere.
    """
    evidence = signed_documents.read(folder / FILE, Evidence, "evidence")
    authority = certificates.read_pem(where.authority.read_text(), "authority")
    certificate = certificates.read_pem(evidence.certificate, f"{folder / FILE}")
    own = certificates.issued_key(certificate, authority, f"{folder / FILE}")
    if not keys.verified(own, evidence.signature, evidence.signed_bytes()):
        raise errors.AuditError(f"{folder / FILE}: was changed after this federation's server signed it")
    for name, sha256 in evidence.pages.items():
        path = folder / Path(name).name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise errors.AuditError(f"{path}: is not the page that was written; write the evidence again")
    arm = where.run_path(evidence.recipe)
    logs = {JOURNAL: hash_chain.read(arm / "journal.jsonl"), AUDIT: audit.read(where.audit_path)}
    for cited in evidence.lines:
        if cited.log == TEST:
            path = arm / "evaluation.json"
            now = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        else:
            rows = logs[cited.log]
            now = str(rows[cited.line - 1]["hash"]) if cited.line <= len(rows) else ""
        if now != cited.hash:
            raise errors.AuditError(
                f"{cited.log}, line {cited.line}: is not the line that {folder} cites: it was changed"
            )
    return evidence


# -- the pages ---------------------------------------------------------------------------------------------------------


def model_card(record: Record) -> list[str]:
    """What the adapter is, and what it was scored to do."""
    recipe, last = record.locked.recipe, len(record.journal)
    rows: list[Row] = [
        ("task", f"{recipe.task.kind}: {', '.join(recipe.data.class_names)}", _recipe_link(record)),
        (
            "backbone",
            f"{recipe.backbone.name}, sha256 {record.locked.backbone_sha256 or 'made from the seed'}",
            _recipe_link(record),
        ),
        ("backbone licence", _licence(record), _recipe_link(record)),
        ("adapter", f"{recipe.adapter.kind}, {record.locked.manifest.parameters:,} numbers", _recipe_link(record)),
        ("fingerprint", str(record.journal[-1]["fingerprint"]), record.cite(JOURNAL, [last])),
        ("rounds", str(record.journal[-1]["round"]), record.cite(JOURNAL, range(1, last + 1))),
        ("privacy", _privacy(record), record.cite(JOURNAL, [last])),
    ]
    study = record.where.study()
    licence = study.licence if study is not None and study.licence else BLANK
    return [
        page.section("what", "What it is", _table(rows, "The adapter.")),
        page.section("scores", "How it scored", _scores(record)),
        page.section("use", "Intended use", page.paragraph(study.purpose if study is not None else BLANK)),
        page.section("limits", "Limits", page.paragraph(LIMITS)),
        page.section("licence", "Licence", page.paragraph(licence)),
    ]


def _licence(record: Record) -> str:
    return str(licences.of(record.locked.recipe.backbone)) if record.locked.backbone_sha256 else "made from the seed"


LIMITS = (
    "It was scored on the test images of the hospitals that took part and on no others. A site's score counts its own "
    "images once, so that a small site weighs as much as a large one in a mean over sites. It is no medical device; "
    "nobody but people decides on a patient."
)


def data_protection(record: Record) -> list[str]:
    """Who took part, what came and went, what protects it."""
    moved = status.moved(record.journal)
    sent, came = record.lines(event="sent"), record.lines(event="received")
    every = range(1, len(record.journal) + 1)
    rows: list[Row] = [
        ("messages to hospitals", f"{len(sent):,}", record.cite(AUDIT, sent)),
        ("messages from hospitals", f"{len(came):,}", record.cite(AUDIT, came)),
        ("bytes from hospitals in rounds", rounds.size(moved["up"]), record.cite(JOURNAL, every)),
        ("bytes to hospitals in rounds", rounds.size(moved["down"]), record.cite(JOURNAL, every)),
        ("differential privacy", _privacy(record), record.cite(JOURNAL, [len(record.journal)])),
        (
            "single updates",
            "seen by the coordinator"
            if record.locked.recipe.secure_aggregation is None
            else "hidden by secure aggregation",
            _recipe_link(record),
        ),
    ]
    study = record.where.study()
    kept = study.retention if study is not None else BLANK
    contact = study.contact if study is not None else BLANK
    ends = certificates.fingerprint(certificates.read_pem(record.where.authority.read_text(), "authority"))
    measures = (
        "TLS under an authority of the federation's own; keys that are made at the hospitals and never travel; a "
        "roster of keys; "
        "policies of the hospitals that deny by default; files of mode 0600; audit logs at both ends that hold each "
        "other's heads. "
        f"Authority: {ends}."
    )
    return [
        page.section("who", "Who answers for it", page.paragraph(contact)),
        page.section("sites", "Hospitals", _sites(record)),
        page.section("moved", "What travelled", _table(rows, "No image, label, file name or patient number travels.")),
        page.section("measures", "Technical measures", page.paragraph(measures)),
        page.section("kept", "What is kept, and how long", page.paragraph(kept)),
        page.section("steered", "What was ordered meanwhile", _steered(record)),
        *_withdrawn(record),
        page.section("basis", "Legal basis and balancing", page.paragraph(BLANK)),
    ]


def technical_file(record: Record) -> list[str]:
    """Annex IV's headings, as far as the record goes."""
    recipe = record.locked.recipe
    values = json.dumps(recipe.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    study = record.where.study()
    design: list[Row] = [
        ("rule of aggregation", recipe.aggregation.rule, _recipe_link(record)),
        ("optimiser", f"{recipe.optimiser.name}, rate {recipe.optimiser.learning_rate:g}", _recipe_link(record)),
        ("seed", str(recipe.seed), _recipe_link(record)),
        ("release", f"fedvfm {record.locked.version}", _recipe_link(record)),
    ]
    return [
        page.section(
            "general", "1. General description", page.paragraph(study.purpose if study is not None else BLANK)
        ),
        page.section(
            "design",
            "2. Elements and development",
            _table(design, "Design.") + page.folded("The recipe", f"<pre>{page.text(values)}</pre>"),
        ),
        page.section(
            "data",
            "2 (d). Data",
            page.paragraph("Images of the hospitals below; each keeps and describes its own.") + _sites(record),
        ),
        page.section("validation", "2 (g). Validation and testing", _scores(record)),
        page.section("control", "3. Monitoring, functioning and control", _refused(record) + _steered(record)),
        page.section("metrics", "4. Appropriateness of the metrics", page.paragraph(LIMITS)),
        page.section("risks", "5. Risk management", page.paragraph(BLANK)),
        page.section(
            "changes",
            "6. Changes over the lifecycle",
            page.paragraph(f"Each recipe and its rounds are kept by hash; this is {recipe.hash}."),
        ),
        page.section(
            "standards", "7. Standards, 8. declaration, 9. plan after placing on the market", page.paragraph(BLANK)
        ),
    ]


def _head(title: str, record: Record) -> str:
    day, release = signed_documents.stamp(signed_documents.now())[:10], locked_recipe.version()
    about = (
        f"Federation {record.where.about.federation}, recipe {record.locked.hash}, made {day} with fedvfm {release}."
    )
    rule = (
        "Every figure names the line of the record it comes from; 'fedvfm evidence STATE --verify FOLDER' checks them."
    )
    return f'<header><h1>{page.text(title)}</h1><p class="soft">{page.text(about)}</p>{page.paragraph(rule)}</header>'


def _table(rows: Sequence[Row], caption: str) -> str:
    return page.table(("what", "figure", "from"), [list(row) for row in rows], caption, words=(1, 2))


def _recipe_link(record: Record) -> page.Markup:
    enrolled = [number for number, entry in enumerate(record.log, start=1) if entry.get("recipe") == record.locked.hash]
    return record.cite(AUDIT, enrolled[:1])


def _privacy(record: Record) -> str:
    last = record.journal[-1].get("privacy")
    own = statements.sentence(record.locked.recipe.privacy, None)
    return f"{own}; {statements.so_far(last)}" if last else own


def _scores(record: Record) -> str:
    if record.tested is None:
        return page.paragraph("The final test is not made yet.", "note")
    link = page.Markup(f"{record.cite(TEST, [1])}, {record.cite(AUDIT, record.scored()[-1:])}")
    rows: list[list[page.Cell]] = [
        [site, scores.metric_name(name), value, int(values["num_examples"]), link]
        for site, values in record.tested["last"]["sites"].items()
        for name, value in values.items()
        if name != "num_examples"
    ]
    if not rows:
        return page.paragraph("Tested; the sites' policies let no score out.", "note")
    head = ("site", "metric", "value", "test images", "from")
    return page.table(head, rows, "The final adapter, as the sites' policies let it out.", words=(4,))


def _sites(record: Record) -> str:
    rows: list[list[page.Cell]] = []
    for site, entry in record.where.sites().items():
        enrolled = [
            number
            for number, line in enumerate(record.log, start=1)
            if line.get("site") == site and line["event"] in audit.KEY_EVENTS
        ]
        updates = record.lines(event="decided", kind="update", verdict="admitted", peer=site)
        taken = record.lines(event="decided", kind="final-adapter", peer=site)
        word = str(record.log[taken[-1] - 1]["verdict"]) if taken else None
        joined, decided = record.cite(AUDIT, updates), record.cite(AUDIT, taken[-1:])
        rows.append([site, entry.status, record.cite(AUDIT, enrolled[-1:]), len(updates), joined, word, decided])
    head = ("site", "roster", "key, from", "updates joined", "from", "final adapter", "from")
    return page.table(head, rows, "Every hospital of the roster.", words=(1, 2, 4, 5, 6))


def _withdrawn(record: Record) -> list[str]:
    """The sites that withdrew, and in which rounds of this recipe their updates are."""
    rows: list[list[page.Cell]] = []
    for site, entry in record.where.sites().items():
        if entry.status == rosters.WITHDRAWN:
            joined = [number for number, line in enumerate(record.journal, start=1) if site in line["examples"]]
            ordered = [
                number
                for number, line in enumerate(record.log, start=1)
                if line["event"] == "steered" and line["kind"] == withdrawal.KIND and line.get("site") == site
            ]
            rows.append([site, entry.since, record.cite(AUDIT, ordered), len(joined), record.cite(JOURNAL, joined)])
    if not rows:
        return []
    head = ("site", "since", "from", "rounds its updates joined", "from")
    words = "Updates cannot be taken out of an adapter; a rerun without a site is a recipe of its own."
    table = page.table(head, rows, "Hospitals that withdrew.", words=(1, 2, 4))
    return [page.section("withdrawn", "Withdrawals", page.paragraph(words) + table)]


def _refused(record: Record) -> str:
    rows: list[list[page.Cell]] = [
        [line["round"], site, site_words.refused(why["reason"]), record.cite(JOURNAL, [number])]
        for number, line in enumerate(record.journal, start=1)
        for site, why in line.get("refused", {}).items()
    ]
    if not rows:
        return page.paragraph("Every update was admitted.")
    return page.table(
        ("round", "site", "why", "from"), rows, f"{quantity.of(len(rows), 'update')} not admitted.", words=(1, 2, 3)
    )


def _steered(record: Record) -> str:
    rows: list[list[page.Cell]] = [
        [entry["kind"], entry.get("site"), entry["time"], record.cite(AUDIT, [number])]
        for number, entry in enumerate(record.log, start=1)
        if entry["event"] == "steered"
    ]
    if not rows:
        return page.paragraph("Nothing was ordered.")
    return page.table(
        ("order", "site", "when", "from"), rows, "What the coordinator's people ordered.", words=(1, 2, 3)
    )


def _annex(record: Record) -> str:
    rows: list[list[page.Cell]] = []
    for (log, number), hash_ in sorted(record.cited.items()):
        name = page.Markup(f'<span id="{log}-{number}">{log} {number}</span>')
        text = f"sha256 {hash_}" if log == TEST else hash_chain.canonical(_shown(record, log, number))[:400]
        rows.append([name, page.Markup(f"<code>{page.text(hash_)}</code>"), text])
    caption = "Lines that are cited above, with their hashes; each hash covers all lines before it."
    return page.section(
        "lines", "Annex: lines of the record", page.table(("line", "hash", "what it says"), rows, caption, words=(1, 2))
    )


def _shown(record: Record, log: str, number: int) -> dict[str, Any]:
    entry = (record.journal if log == JOURNAL else record.log)[number - 1]
    return {key: value for key, value in entry.items() if key not in ("hash", "prev")}
