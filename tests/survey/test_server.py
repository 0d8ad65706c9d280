"""The coordinator's end of a survey: who is asked and when, what is kept, and the result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message, RecordDict
from typer.testing import CliRunner

from fedvfm import errors
from fedvfm.cli import main
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.runtime import page_server
from fedvfm.server import state_folder, status, surveys
from fedvfm.server.coordinator import survey_questions
from fedvfm.survey import answer
from fedvfm.trust import roster as rosters
from fedvfm.trust import signed_documents
from tests.client import private_site
from tests.survey import hospital

RUNNER = CliRunner()
SURVEY = hospital.ask(images_per_patient=1)
NODES = {"north": 10, "south": 11}
SAID = {
    site: answer.text(answer.of_totals(SURVEY, site, hospital.totals(SURVEY, first, first + 20), 10))
    for site, first in (("north", 0), ("south", 20))
}


class Grid:
    """Two sites; what they say is put into ``answers`` by hand, by the number of the question."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answers: dict[int, RecordDict | Error] = {}

    def present(self) -> dict[str, int]:
        return NODES

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            internals.set_message_id(message, f"m{len(self.sent)}")
            self.sent.append(message)
        return [f"m{len(self.sent) - 1}"]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        numbers = [number for number in sorted(self.answers) if f"m{number}" in set(message_ids)]
        return [Message(self.answers.pop(number), reply_to=self.sent[number]) for number in numbers]


class Town:
    def __init__(self, folder: Path, clock: list[float]) -> None:
        internals.be_server_task(1)
        self.where, self.grid, self.clock = state_folder.open_state(folder), Grid(), clock
        self.questions = survey_questions.Surveys(self.grid, self.where)  # type: ignore[arg-type]

    def look(self, seconds: float = 2.0) -> None:
        self.clock[0] += seconds
        self.questions.look()

    def asked(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.grid.sent]


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Town:
    clock = [0.0]
    monkeypatch.setattr(survey_questions.time, "monotonic", lambda: clock[0])
    private_site.Site(tmp_path)
    return Town(tmp_path / "server", clock)


def test_each_site_is_asked_until_it_answered_and_no_further(town: Town) -> None:
    town.look()
    assert town.asked() == []
    assert surveys.publish(town.where, SURVEY)
    assert not surveys.publish(town.where, SURVEY)
    town.look()
    assert town.asked() == [10, 11]
    assert protocol.decode_survey(town.grid.sent[0].content) == signed_documents.to_text(SURVEY)
    town.grid.answers = {
        0: protocol.encode_answer("north", SAID["north"]),
        1: Error(code=protocol.ERROR_CODES["approval-pending"], reason="approval-pending"),
    }
    town.look()
    assert surveys.answered(town.where, SURVEY.hash) == {"north"}
    assert surveys.words(town.where, SURVEY.hash) == {"south": "approval-pending"}
    town.look()
    assert len(town.grid.sent) == 2  # not before its pause is over
    town.look(10.0)
    assert town.asked() == [10, 11, 11]
    town.grid.answers = {2: protocol.encode_answer("south", SAID["south"])}
    town.look()
    town.look(1000.0)
    assert len(town.grid.sent) == 3
    assert set(surveys.answers(town.where, SURVEY)) == {"north", "south"}
    assert surveys.words(town.where, SURVEY.hash) == {}


@pytest.mark.parametrize(
    "content",
    [
        protocol.encode_answer("south", SAID["south"]),
        protocol.encode_answer("north", SAID["south"]),
        protocol.encode_answer("north", "{}"),
        protocol.encode_survey("x"),
    ],
)
def test_what_no_site_may_say_is_not_kept(town: Town, content: RecordDict) -> None:
    surveys.publish(town.where, SURVEY)
    town.look()
    town.grid.answers = {0: content}
    town.look()
    assert surveys.answered(town.where, SURVEY.hash) == set()
    assert surveys.words(town.where, SURVEY.hash)["north"] in ("malformed", "other-name")


def test_nobody_is_asked_for_a_closed_survey(town: Town) -> None:
    surveys.publish(town.where, SURVEY)
    surveys.close(town.where, SURVEY)
    town.look()
    assert town.asked() == []
    surveys.publish(town.where, SURVEY)
    town.look()
    assert town.asked() == [10, 11]
    said = [line["verdict"] for line in town.where.audit.entries if line.get("kind") == "survey"]
    assert said == ["published", "closed", "published"]


def test_the_server_s_status_names_surveys_that_are_open_and_who_waits(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = signed_documents.stamp(signed_documents.now())
    stands = {"north": rosters.APPROVED, "south": rosters.APPROVED, "west": rosters.APPROVED, "gone": rosters.DROPPED}
    entries = {name: SimpleNamespace(status=status, since=since) for name, status in stands.items()}
    monkeypatch.setattr(state_folder.State, "sites", lambda where: entries)
    assert status.of(town.where)["surveys"] == {}
    surveys.publish(town.where, SURVEY)
    town.look()
    assert status.of(town.where)["surveys"][SURVEY.hash]["waiting"] == {
        "north": "asked",
        "south": "asked",
        "west": "not-connected",
    }
    town.grid.answers = {
        0: protocol.encode_answer("north", SAID["north"]),
        1: Error(code=protocol.ERROR_CODES["approval-pending"], reason="approval-pending"),
    }
    stamp = [page_server.stamp_of(path) for path in status.Watcher(town.where.folder).files()]
    town.look()
    assert stamp != [page_server.stamp_of(path) for path in status.Watcher(town.where.folder).files()]
    now = json.loads(json.dumps(status.of(town.where)))
    assert now["surveys"][SURVEY.hash]["answered"] == ["north"]
    (said,) = [line for line in status.lines(now) if line.startswith("survey ")]
    waits = "south waits for a person's approval, west is not connected"
    assert said == f"survey {SURVEY.hash[:12]} 't': answered by north; {waits}"
    surveys.close(town.where, SURVEY)
    closed = status.of(town.where)
    assert (closed["surveys"][SURVEY.hash]["open"], status.survey_lines(closed)) == (False, [])


def test_the_commands_publish_show_merge_and_close(town: Town, tmp_path: Path) -> None:
    state = ["--state", str(town.where.folder)]
    assert "no survey" in RUNNER.invoke(main.app, ["server", "survey", *state]).output
    asked = tmp_path / "survey.toml"
    RUNNER.invoke(main.app, ["server", "init-survey", "-o", str(asked), "--classes", "background,disc,rare"])
    asked.write_text(asked.read_text().replace("#images_per_patient = 16", "images_per_patient = 1"))
    asked.write_text(asked.read_text().replace('title = "Before training"', 'title = "t"'))
    done = RUNNER.invoke(main.app, ["server", "survey", str(asked), *state, "--json"])
    assert json.loads(done.output)["survey"] == SURVEY.hash
    result = ["server", "survey", "-o", str(tmp_path / "out"), *state]
    assert isinstance(RUNNER.invoke(main.app, result).exception, errors.ConfigError)
    for site, text in SAID.items():
        surveys.keep(town.where, SURVEY, site, text)
    done = RUNNER.invoke(main.app, [*result, "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "out" / "survey.json").read_text())
    assert (values["sites"], values["patients"]) == (["north", "south"], 40.0)
    assert "answered by north, south" in RUNNER.invoke(main.app, ["server", "survey", *state]).output
    assert RUNNER.invoke(main.app, ["server", "survey", "--close", *state]).exit_code == 0
    assert "closed" in RUNNER.invoke(main.app, ["server", "survey", *state]).output


def test_an_answer_that_was_changed_on_disk_is_refused(town: Town) -> None:
    surveys.publish(town.where, SURVEY)
    surveys.keep(town.where, SURVEY, "north", SAID["north"])
    path = town.where.folder / "surveys" / SURVEY.hash / "answers" / "north"
    path.write_text(SAID["south"])
    with pytest.raises(errors.ProtocolError):
        surveys.answers(town.where, SURVEY)
