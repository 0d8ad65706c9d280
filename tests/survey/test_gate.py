"""A survey at the gate of a real site folder: what passes, what is refused, and that nothing else leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from typer.testing import CliRunner

from fedvfm import errors
from fedvfm.cli import main
from fedvfm.client import site_file, state_folder, status
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.flower import internals
from fedvfm.ledger import ledger
from fedvfm.protocol import protocol
from fedvfm.survey import answer, layout
from fedvfm.trust import signed_documents
from tests.client import private_site

RUNNER = CliRunner()
ALL = tuple(name for name in surveys.STATISTICS if name != "columns")
POLICY = f"[policy]\nsurveys = {json.dumps(ALL)}\nmax_hours = 1.0\nmin_units = 5\n"
PATIENTS = '[privacy]\ndata_set = "discs"\nepsilon = 2.0\ndelta = 1e-4\nunit = "patient"\n'
NOISE = {"epsilon": 1.0, "delta": 1e-4}


def ask(**values: object) -> surveys.Survey:
    about = {"title": "t", "task": "segmentation", "class_names": ["background", "disc"], "statistics": list(ALL)}
    return schema.parse(surveys.Survey, {**about, "least_patients": 5, "size_edges": [16, 64], **values}, "survey")


class Site(private_site.Site):
    """Thirty patients with one grey picture each, and terms that let every statistic out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.terms_of(POLICY)

    def terms_of(self, text: str) -> None:
        head, _, rest = text.rpartition("[policy]")
        terms = f"[policy]{rest}" if text else ""
        data = f'[data]\nsource = "folder"\npath = "{self.folder / "data"}"\n'
        self.settings.write_text(f'name = "north"\n{head}{data}{terms}')

    def agree(self, survey: surveys.Survey) -> None:
        self.where.remember_survey(survey)
        state_folder.approve_survey(self.where, survey)

    def survey(self, survey: surveys.Survey) -> Message:
        return self.raw(signed_documents.to_text(survey))

    def raw(self, text: str) -> Message:
        message = Message(protocol.encode_survey(text), 7, protocol.SURVEY, ttl=600.0, group_id="0")
        internals.set_message_id(message, "m1")
        return internals.copy(self.door(internals.copy(message), private_site.CONTEXT))

    def told(self, survey: surveys.Survey) -> answer.Answer:
        reply = self.survey(survey)
        assert not reply.has_error(), (reply.error, self.faults)
        return answer.parse(protocol.decode_answer(reply.content)[1], survey, "north")

    def word(self, survey: surveys.Survey) -> str:
        reply = self.survey(survey)
        assert reply.has_error()
        return protocol.error_word(reply)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    private_site.Site(folder)
    return folder


@pytest.fixture
def site(joined: Path, tmp_path: Path) -> Site:
    shutil.copytree(joined, tmp_path / "own")
    return Site(tmp_path / "own")


def test_an_approved_survey_is_answered_and_noted(site: Site) -> None:
    survey = ask()
    assert site.word(survey) == "approval-pending"
    assert site.where.surveys_seen() == [survey.hash]
    site.agree(survey)
    reply = site.told(survey)
    patients = reply.values["patients"][0]
    assert patients is not None
    assert patients % layout.WHOLE == 0
    assert 15 * layout.WHOLE <= patients < 30 * layout.WHOLE  # of thirty those that are not for the test
    assert reply.values["rows"] == (None, patients, None)
    assert site.app.asked == []
    events = [(entry["event"], entry.get("kind"), entry.get("verdict")) for entry in site.where.audit.scan()]
    assert ("decided", "survey", "refused") in events
    assert [event for event, _, _ in events][-2:] == ["surveyed", "sent"]


def test_nothing_but_the_named_statistics_leaves(site: Site) -> None:
    """The bytes of the reply hold no name of a file or patient, and no number but those of the groups asked for."""
    survey = ask(statistics=["patients", "class-shares"])
    site.agree(survey)
    reply = site.survey(survey)
    wire = internals.records(reply.content)
    for word in (b"scan-", b".png", b"images", b"rows", b"intensity", str(site.folder).encode()):
        assert word not in wire
    values = json.loads(protocol.decode_answer(reply.content)[1])
    assert set(values) == {"format", "survey", "site", "least", "values", "sigmas"}
    assert set(values["values"]) == {"patients", "class-shares"}
    assert set(reply.content) == {"fedvfm", "audit"}


@pytest.mark.parametrize(
    ("terms", "word"),
    [
        ("", "policy-survey"),
        ('[policy]\nsurveys = ["patients"]\nmax_hours = 1.0\n', "policy-survey"),
        (POLICY + "max_surveys = 0\n", "policy-survey"),
        (POLICY.replace("max_hours = 1.0", "max_hours = 0.0"), "policy-hours"),
        (POLICY + "hours = []\ntime_zone = 'UTC'\n", "policy-closed"),
        (POLICY.replace("min_units = 5", "min_units = 50"), "policy-units"),
        (POLICY + PATIENTS, "privacy-budget"),
        (POLICY + "[labels]\nother = 'disc'\n", "config"),
        ('labelled = ["background"]\n' + POLICY, "config"),
    ],
)
def test_what_the_site_does_not_allow_is_refused_with_a_word(site: Site, terms: str, word: str) -> None:
    survey = ask()
    site.agree(survey)
    site.terms_of(terms)
    assert site.word(survey) == word
    assert not list(site.where.surveys.glob("*.answer"))
    assert "surveyed" not in [entry["event"] for entry in site.where.audit.scan()]


@pytest.mark.parametrize(
    ("budget", "noise"),
    [("", NOISE), (PATIENTS.replace('"patient"', '"record"'), NOISE), (PATIENTS, {**NOISE, "delta": 1e-3})],
)
def test_noise_without_a_fitting_budget_is_refused(site: Site, budget: str, noise: dict[str, float]) -> None:
    survey = ask(privacy=noise)
    site.agree(survey)
    site.terms_of(POLICY + budget)
    assert site.word(survey) == "privacy-budget"


@pytest.mark.parametrize("text", ["", "[]", '{"title":"x"}', "{" * 5000, '{"file_names": true}'])
def test_what_is_no_survey_is_refused(site: Site, text: str) -> None:
    reply = site.raw(text)
    assert protocol.error_word(reply) == "refused"
    assert site.where.surveys_seen() == []


def test_asked_again_the_same_bytes_leave_whatever_the_data_are(site: Site) -> None:
    survey = ask()
    site.agree(survey)
    first = site.told(survey)
    private_site.write_images(site.folder / "data", 30, 60)
    again = Site(site.folder)  # a new process
    assert again.told(survey) == first
    events = [entry["event"] for entry in again.where.audit.scan()]
    assert events.count("surveyed") == 1
    again.terms_of(POLICY.replace("min_units = 5", "min_units = 20"))
    assert again.word(survey) == "policy-survey"


def test_an_answer_that_is_gone_is_not_made_anew(site: Site) -> None:
    survey = ask()
    site.agree(survey)
    site.told(survey)
    (site.where.surveys / f"{survey.hash}.answer").unlink()
    assert site.word(survey) == "policy-survey"


def test_a_second_survey_of_few_other_patients_is_refused(site: Site) -> None:
    first, second = ask(), ask(title="another")
    for survey in (first, second):
        site.agree(survey)
    site.told(first)
    assert site.word(second) == "policy-survey"  # one survey in all, unless the policy says otherwise
    site.terms_of(POLICY + "max_surveys = 2\n")
    private_site.write_images(site.folder / "data", 30, 32)
    assert site.word(second) == "survey-difference"
    private_site.write_images(site.folder / "data", 32, 70)
    assert site.told(second).values["patients"] != site.told(first).values["patients"]


def test_who_comes_while_an_answer_is_made_is_neither_in_it_nor_charged(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patients that are charged are of the listing that the numbers are made from, never of a later one."""
    survey = ask(privacy=NOISE)
    site.agree(survey)
    site.terms_of(POLICY + PATIENTS)
    listings, listed = [], site_file.surveyed

    def surveyed(*given: Any) -> Any:
        listings.append(listed(*given))
        return listings[-1]

    monkeypatch.setattr(site_file, "surveyed", surveyed)
    site.told(survey)
    assert len(listings) == 1
    assert len(listings[0][1]) >= 15


def test_an_answer_with_noise_is_charged_once_to_every_patient(site: Site) -> None:
    survey = ask(privacy=NOISE)
    site.agree(survey)
    site.terms_of(POLICY + PATIENTS)
    first = site.told(survey)
    assert set(first.sigmas) == set(first.values)
    assert Site.told(Again(site.folder), survey) == first
    book = ledger.reopen(site.folder / "fedvfm-ledger")
    charged = [line for line in book.entries if line["event"] == "charged"]
    assert [(line["mechanism"], line["recipe"], line["honest"]) for line in charged] == [("survey", survey.hash, 1)]
    held = book.records.find(charged[0]["records"])
    assert held is not None
    assert len(held) >= 15
    sent = [entry for entry in site.where.audit.scan() if entry["event"] == "sent" and entry["kind"] == "survey"]
    assert all("ledger" in entry for entry in sent)
    # What is left of epsilon 2 holds no third answer of 1.
    site.terms_of(POLICY + "max_surveys = 9\n" + PATIENTS)
    words = []
    for title in ("b", "c", "d", "e"):
        other = ask(privacy=NOISE, title=title)
        site.agree(other)
        reply = site.survey(other)
        words.append(protocol.error_word(reply) if reply.has_error() else "answered")
    assert words[-1] == "privacy-budget"
    assert "answered" in words


class Again(Site):
    """The same site after a restart, its file as it is."""

    def terms_of(self, text: str) -> None:
        """Nothing: the file stays."""


class Killed(BaseException):
    """The process ends here."""


def survey_killed_at(point: str, site: Site, survey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site is asked, and ends at a fault point."""

    def fault(name: str) -> None:
        if name == point:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fedvfm.storage.storage.fault_point", fault)
        with pytest.raises(Killed):
            site.survey(survey)


@pytest.mark.parametrize("point", ["surveyed", "survey-on-disk", "survey-charged"])
def test_killed_at_any_line_it_has_sent_nothing_that_was_not_charged(
    site: Site, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = ask(privacy=NOISE)
    site.agree(survey)
    site.terms_of(POLICY + PATIENTS)
    survey_killed_at(point, site, survey, monkeypatch)
    again = Again(site.folder)
    reply = again.survey(survey)
    assert not reply.has_error(), again.faults
    charged = [line for line in ledger.reopen(site.folder / "fedvfm-ledger").entries if line["event"] == "charged"]
    assert [line["update"] for line in charged] == [protocol.digest(reply.content)]


def test_the_person_sees_what_would_leave_approves_and_withdraws(site: Site) -> None:
    survey = ask()
    site.word(survey)
    state, data = ["--state", str(site.where.folder)], ["--data", str(site.settings)]
    short = survey.hash[:12]
    assert (
        f"survey {short} waits for a person"
        in status.standing(
            {**status.of(site.where), "processes": dict.fromkeys(("client", "supernode", "executor"), 1), "waiting": []}
        )["says"]
    )
    done = RUNNER.invoke(main.app, ["client", "review", short, *data, *state])
    assert done.exit_code == 0, done.output
    assert "how many patients there are, in one number" in done.output
    assert "rows: 16 to below 64: " in done.output
    done = RUNNER.invoke(main.app, ["client", "review", short, "--html", str(site.folder / "page.html"), *state])
    assert isinstance(done.exception, errors.ConfigError)
    site.terms_of("")
    assert RUNNER.invoke(main.app, ["client", "review", short, *data, *state]).exit_code == 13
    assert RUNNER.invoke(main.app, ["client", "approve", short, *data, *state]).exception is not None
    site.terms_of(POLICY)
    assert RUNNER.invoke(main.app, ["client", "approve", short, *data, *state]).exit_code == 0
    assert site.where.approvals.stand() != site.where.survey_approvals.stand() == [survey.hash]
    site.told(survey)
    assert RUNNER.invoke(main.app, ["client", "withdraw", short, *state]).exit_code == 0
    assert site.word(survey) == "approval-pending"
    done = RUNNER.invoke(main.app, ["client", "status", *state])
    assert f"Statistics left, the answer to survey {short}" in done.output
    assert f"survey {short}: answered" in done.output


def test_the_approval_of_a_recipe_is_none_of_a_survey(site: Site) -> None:
    survey = ask()
    site.where.remember_survey(survey)
    site.where.approvals.approve(survey.hash)
    assert site.word(survey) == "approval-pending"


def test_an_answer_that_was_not_charged_and_is_of_other_data_is_made_anew(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = ask(privacy=NOISE)
    site.agree(survey)
    site.terms_of(POLICY + PATIENTS)
    survey_killed_at("survey-on-disk", site, survey, monkeypatch)
    kept = (site.where.surveys / f"{survey.hash}.answer").read_text()
    private_site.write_images(site.folder / "data", 30, 60)
    again = Again(site.folder)
    reply = again.told(survey)
    assert answer.text(reply) not in kept
    charged = [line for line in ledger.reopen(site.folder / "fedvfm-ledger").entries if line["event"] == "charged"]
    assert len(charged) == 1
