"""What a coordinator shows after a study: every figure has its line, and a line that was changed is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.server import evidence, state_folder
from fedvfm.server.coordinator import coordinator, orders
from fedvfm.storage import hash_chain
from fedvfm.trust import keys, signed_documents
from fedvfm.trust import study as studies
from fedvfm.trust.certificates import make_authority, make_server, to_pem
from fedvfm.trust.signed_documents import now
from tests.server.test_coordinate import ROUNDS, Town, make  # noqa: F401 - a fixture


@pytest.fixture
def town(make: Callable[..., Town]) -> Town:  # noqa: F811
    town = make("east", "west")
    study = studies.Study(purpose="Find <lesions>.", contact="Dr A", retention="ten years", licence="CC BY 4.0")
    signed_documents.write(town.server.folder / studies.FILE, study)
    town.when["round", 2] = lambda: orders.pause(town.server)
    town.when["paused", 0] = lambda: None
    town.when["note", "paused"] = lambda: orders.resume(town.server)
    town.run()
    return town


def test_every_figure_has_a_line_and_each_line_is_there(town: Town, tmp_path: Path, cli: Any) -> None:
    answer = cli("evidence", town.server.folder, "-o", tmp_path / "e", "--json")
    assert answer.code == 0, answer.err
    made = json.loads(answer.out)
    journal = town.journal()
    cited = {(row["log"], row["line"]): row["hash"] for row in made["lines"]}
    assert cited["journal", ROUNDS] == journal[-1]["hash"]
    assert ("final-test", 1) in cited
    digests = [line["digest"] for line in town.server.audit.entries if line.get("kind") == "final-test"]
    assert digests == [cited["final-test", 1]], "the audit log holds it too"
    texts = {name: (tmp_path / "e" / name).read_text() for name in made["pages"]}
    assert set(texts) == {"model-card.html", "data-protection.html", "technical-file.html"}
    for text in texts.values():
        links = set(re.findall(r'href="#([a-z-]+-\d+)"', text))
        assert links
        assert links <= set(re.findall(r'id="([a-z-]+-\d+)"', text)), "each link leads to its line"
        assert not re.search(r"<script|https?://|\son\w+=", text)
    assert "Find &lt;lesions&gt;." in texts["model-card.html"]
    assert journal[-1]["fingerprint"] in texts["model-card.html"]
    assert "ten years" in texts["data-protection.html"]
    assert evidence.BLANK.split(":")[0] in texts["technical-file.html"]
    assert "pause" in texts["data-protection.html"]
    rows = re.findall(
        r"<th scope=\"row\">(east|west)</th><td class=\"t\">approved</td>.*?<td>(\d+)</td>",
        texts["technical-file.html"],
    )
    assert dict(rows) == {"east": str(ROUNDS), "west": str(ROUNDS)}
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "e").iterdir()} == {0}
    assert cli("evidence", town.server.folder, "--verify", tmp_path / "e").out.startswith("verified: ")
    assert cli("evidence", town.server.folder, "-o", tmp_path / "e").code == errors.OutputInUse.exit_code
    record = evidence.Record.of(town.server)
    assert "let no score out" not in "".join(evidence.model_card(record))
    record.tested = {"last": {"sites": {site: {"num_examples": 8} for site in ("east", "west")}}}
    assert "let no score out" in "".join(evidence.model_card(record)), "no empty table"


def test_a_round_whose_process_was_killed_before_it_was_noted_is_noted_by_the_next(
    make: Callable[..., Town],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    town = make("east", "west")
    town.silent = {"west"}  # in round 1: refused is noted too
    town.when["round", 2] = town.silent.clear
    noted = coordinator.Coordinator._decided

    def killed(self: coordinator.Coordinator, line: dict[str, Any], *before: Any) -> None:
        if line["round"] == killed_in[0]:
            noted(self, {**line, "examples": dict(list(line["examples"].items())[:1]), "refused": {}}, *before)
            raise errors.Interrupted("killed")
        noted(self, line, *before)

    monkeypatch.setattr(coordinator.Coordinator, "_decided", killed)
    killed_in = [1]
    for killed_in[0] in (1, 3, ROUNDS):
        with pytest.raises(errors.Interrupted):
            town.run(quorum=1, round_timeout_s=2.0)
    monkeypatch.undo()
    town.run(quorum=1)
    record = evidence.Record.of(town.server)
    rows = [(row["round"], row["peer"], row["verdict"]) for row in record.log if row.get("kind") == "update"]
    took = [(line["round"], site, "admitted") for line in record.journal for site in line["examples"]]
    assert len(took) == 2 * ROUNDS - 1
    assert sorted(rows) == sorted([*took, (1, "west", "refused")]), "each once"


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """A log written anew with a change, its chain whole again: only a hash kept elsewhere shows that."""
    rows = hash_chain.read(path)
    change(rows)
    path.unlink()
    chain = hash_chain.Chain(path)
    for row in rows:
        chain.append({key: value for key, value in row.items() if key not in ("prev", "hash")})


def test_a_changed_line_or_page_is_refused(town: Town, tmp_path: Path) -> None:
    evidence.write(town.server, tmp_path / "e")
    evidence.verify(town.server, tmp_path / "e")
    page = tmp_path / "e" / "model-card.html"
    before = page.read_text()
    page.write_text(before.replace("Dice", "Dicf"))
    with pytest.raises(errors.AuditError, match=r"model-card\.html: is not the page that was written"):
        evidence.verify(town.server, tmp_path / "e")
    page.write_text(before)

    kept = json.loads((tmp_path / "e" / evidence.FILE).read_text())
    (tmp_path / "e" / evidence.FILE).write_text(json.dumps({**kept, "federation": "other"}))
    with pytest.raises(errors.AuditError, match="was changed after this federation's server signed it"):
        evidence.verify(town.server, tmp_path / "e")
    other = make_server(*make_authority("other", now()), ["a.example"], now())
    forged = evidence.Evidence(**{**kept, "certificate": to_pem(other[1])})
    signed = forged.model_copy(update={"signature": keys.sign(other[0], forged.signed_bytes())})
    signed_documents.write(tmp_path / "e" / evidence.FILE, signed)
    with pytest.raises(errors.TrustError, match="is not a certificate that this federation's authority signed"):
        evidence.verify(town.server, tmp_path / "e")
    (tmp_path / "e" / evidence.FILE).write_text(json.dumps(kept))
    state_folder.recertify(town.server, ())
    evidence.verify(town.server, tmp_path / "e")  # the server's key was renewed since

    journal = town.server.run_path(town.server.about.recipe) / "journal.jsonl"
    shutil.copy(journal, tmp_path / "kept")
    rewrite(journal, lambda rows: rows[1].update(seconds=1.0))
    with pytest.raises(errors.AuditError, match=r"journal, line \d: is not the line that .* cites: it was changed"):
        evidence.verify(town.server, tmp_path / "e")
    shutil.copy(tmp_path / "kept", journal)

    tested = journal.with_name("evaluation.json")
    text = tested.read_text()
    tested.write_text(text.replace('"round":4', '"round": 4'))
    for do in (evidence.verify, evidence.write):
        with pytest.raises(errors.AuditError, match=r"final-test, line 1|is not the final test whose hash stands in"):
            do(town.server, tmp_path / ("e" if do is evidence.verify else "f"))
    assert not (tmp_path / "f").exists(), "scores that were changed before anybody cited them are shown by nobody"
    tested.write_text(text)

    log = town.server.audit_path
    log.write_text(log.read_text().replace('"verdict":"admitted"', '"verdict":"refused"', 1))
    for do in (
        lambda: evidence.verify(town.server, tmp_path / "e"),
        lambda: evidence.write(town.server, tmp_path / "f"),
    ):
        with pytest.raises(errors.AuditError, match="does not continue the chain"):
            do()
    assert not (tmp_path / "f").exists()


def test_before_a_round_is_done_there_is_nothing_to_show(make: Callable[..., Town], cli: Any, tmp_path: Path) -> None:  # noqa: F811
    town = make()
    answer = cli("evidence", town.server.folder, "-o", tmp_path / "e")
    assert (answer.code, "no round of it is done yet" in answer.err) == (errors.ConfigError.exit_code, True)
    assert cli("evidence", town.server.folder).code == errors.ConfigError.exit_code


def test_after_an_extension_the_recipe_of_the_study_is_shown(town: Town, tmp_path: Path, cli: Any) -> None:
    first = town.server.about.recipe
    orders.extend(town.server, 2)
    made = json.loads(cli("evidence", town.server.folder, "-o", tmp_path / "e", "--json").out)
    assert made["recipe"] == first != state_folder.open_state(town.server.folder).about.recipe
    assert cli("evidence", town.server.folder, "--verify", tmp_path / "e").code == 0
    assert cli("evidence", town.server.folder, "-o", tmp_path / "f", "--recipe", first[:8]).code == 0
    answer = cli("evidence", town.server.folder, "-o", tmp_path / "g", "--recipe", "0" * 64)
    assert (answer.code, "0 recipes of this folder begin so" in answer.err) == (errors.ConfigError.exit_code, True)
