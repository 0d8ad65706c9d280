"""What an ethics board reads: who asks, what leaves, what may go wrong, and lines to sign; nothing of it is made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import dossier, privacy_report
from fedvfm.client import state_folder as joining
from fedvfm.config import asynchronous
from fedvfm.server import state_folder as enrolment
from fedvfm.trust import invites, signed_documents
from fedvfm.trust import study as studies
from tests.trust.conftest import make_lock

STUDY = """
purpose = "Find lesions earlier.\\nAll hospitals' patients may gain."
contact = "Dr A <b>Example</b>, +49 1"
retention = "Updates: 30 days. The adapter: 10 years."
hospitals = "North, South"
licence = "CC BY 4.0"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def server(tmp_path: Path, study: Path) -> enrolment.State:
    from fedvfm.config import schema

    read = schema.parse(studies.Study, schema.read_toml(study), "study")
    plan = enrolment.Plan("trial", "server.example:8443", (), ("north", "south"), 30, read)
    return enrolment.init(tmp_path / "server", plan, make_lock())


def text_of(page: Path) -> str:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<script|https?://|\son\w+=", text), "it asks the network for nothing"
    return text


def test_an_invite_says_what_the_coordinator_wrote_and_a_site_keeps_it(tmp_path: Path, server: Any) -> None:
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    assert invite.study is not None
    assert invite.study.purpose == "Find lesions earlier.\nAll hospitals' patients may gain."
    joined = joining.join(tmp_path / "north", invite, invite.lock.hash)
    assert joined.study() == invite.study
    late = signed_documents.read(enrolment.invite(server, "late"), invites.Invite, "invite")
    assert late.study == invite.study

    forged = invite.study.model_copy(update={"purpose": "Sell it."})
    signed_documents.write(server.invite_path("north"), invite.model_copy(update={"study": forged}))
    with pytest.raises(errors.TrustError, match="was changed after the coordinator signed it"):
        joining.read_invite(server.invite_path("north"), server.fingerprint())


def test_an_invite_without_a_study_has_the_bytes_it_had(tmp_path: Path) -> None:
    plain = enrolment.init(
        tmp_path / "plain", enrolment.Plan("trial", "server.example:8443", (), ("north",)), make_lock()
    )
    text = plain.invite_path("north").read_text()
    assert "study" not in json.loads(text)
    invite = joining.read_invite(plain.invite_path("north"), plain.fingerprint())
    assert b"study" not in invite.signed_bytes()
    assert joining.join(tmp_path / "site", invite, invite.lock.hash).study() is None


def test_the_dossier_of_an_invite(tmp_path: Path, server: Any, cli: Callable[..., Any]) -> None:
    page = tmp_path / "dossier.html"
    answer = cli("client", "review", server.invite_path("north"), "--html", page)
    assert answer.code == 0, answer.err
    assert re.search(r"^purpose: +Find lesions earlier\.\\nAll", answer.out, re.MULTILINE)
    text = text_of(page)
    assert page.stat().st_mode & 0o777 == 0o600
    for words in (
        *("Find lesions earlier.", "All hospitals&#x27; patients may gain.", "30 days", "North, South", "CC BY 4.0"),
        *("server.example:8443", "For site north", "Whom this invite is from was not checked", "never leaves"),
        *("There is no differential privacy", "sees this hospital&#x27;s update by itself", "No policy was given"),
        *("fedvfm client withdraw", "Data-protection officer", "signature", "3 rounds", server.about.recipe),
    ):
        assert words in text, words
    assert "Dr A &lt;b&gt;Example&lt;/b&gt;" in text, "what strangers wrote is text"

    again = cli("client", "review", server.invite_path("north"), "--html", page, "--json")
    assert json.loads(again.out)["study"]["licence of the result"] == "CC BY 4.0"
    (tmp_path / "mine.txt").write_text("mine")
    refused = cli("client", "review", server.invite_path("north"), "--html", tmp_path / "mine.txt")
    assert (refused.code, "mine.txt" in refused.err) == (errors.OutputInUse.exit_code, True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_after_joining_it_is_of_this_site_and_checked(tmp_path: Path, server: Any, cli: Callable[..., Any]) -> None:
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    joining.join(tmp_path / "north", invite, invite.lock.hash)
    page = tmp_path / "dossier.html"
    policy = tmp_path / "policy.toml"
    policy.write_text('[policy]\nmax_rounds = 2\nmax_hours = 5.0\nhours = ["daily 22:00-05:00"]\ntime_zone = "UTC"\n')
    answer = cli(
        "client", "review", invite.lock.hash, "--policy", policy, "--html", page, "--state", tmp_path / "north"
    )
    assert answer.code == errors.PolicyRefused.exit_code, "the dossier is written all the same"
    text = text_of(page)
    assert "was not checked" not in text
    assert "after 2 rounds or 5 hours of computing, within daily 22:00-05:00 (UTC)" in text
    assert "REFUSES" in text


def test_words_that_came_with_another_recipe_are_marked_so(
    tmp_path: Path, server: Any, cli: Callable[..., Any]
) -> None:
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    site, later = joining.join(tmp_path / "north", invite, invite.lock.hash), make_lock(rounds=7)
    site.remember(later)
    for recipe, doubted in ((invite.lock.hash, False), (later.hash, True)):
        page = tmp_path / f"{recipe[:6]}.html"
        answer = cli("client", "review", recipe, "--html", page, "--state", site.folder)
        words = f"came with the invite, which was for recipe {invite.lock.hash[:12]}"
        assert (words in text_of(page), words in answer.out) == (doubted, doubted)


def test_risks_follow_from_the_recipe() -> None:
    def said(**values: Any) -> str:
        return " ".join(dossier.risks(make_lock(**values)))

    plain = said()
    assert "There is no differential privacy" in plain
    assert "outside the recipe's epsilon" not in plain
    private = {"mechanism": "record-level", "epsilon": 3.0, "delta": 1e-5, "clip": 1.0}
    sample = said(privacy=private)
    assert "Differential privacy (record-level, epsilon 3, delta 1e-05) is added at this hospital" in sample
    assert "without any one record" in sample
    assert "outside the recipe's epsilon" in sample
    hidden = said(secure_aggregation={}, min_sites=3)
    assert "a sum of the hospitals' updates and none of them alone, unless more than " in hidden
    shared = {"mechanism": "site-level-shared", "noise_multiplier": 2.0, "delta": 1e-5, "clip": 1.0}
    together = said(secure_aggregation={}, min_sites=3, privacy=shared)
    assert "(site-level-shared, a noise multiplier of 2, delta 1e-05) is for the sum of the sites' updates" in together
    assert "would have only its own part" in together
    assert "is added at this hospital" not in together, "the part of one hospital alone keeps no epsilon"
    assert "leave with noise that is charged" in " ".join(dossier.risks(make_lock(privacy=private), noised=True))


def test_without_a_study_it_says_that_nothing_was_said() -> None:
    locked = make_lock()
    body = "".join(dossier.body(dossier.Asked(locked), privacy_report.judge(locked, None)))
    assert body.count("The coordinator did not say") == 5


@pytest.mark.parametrize(
    ("change", "word"), [('purpose = ""', "purpose"), ('contact = "a\\u0007b"', "contact"), ("extra = 1", "extra")]
)
def test_a_study_with_faults_is_one_error(
    tmp_path: Path, change: str, word: str, cli: Callable[..., Any], study: Path
) -> None:
    key = change.split(" ")[0]
    lines = [line for line in STUDY.splitlines() if not line.startswith(f"{key} =")]
    study.write_text("\n".join([*lines, change]))
    options = ("--name", "trial", "--address", "127.0.0.1:9", "--sites", "north", "--state", tmp_path / "s")
    answer = cli("server", "init", tmp_path / "recipe.toml", *options, "--study", study)
    assert answer.code == errors.ConfigError.exit_code
    assert word in answer.err
    assert not (tmp_path / "s").exists()


def test_it_promises_no_equal_numbers_where_the_order_of_arrival_is_in_them() -> None:
    locked = make_lock()
    assert "with the same result as if it had never taken part" in " ".join(dossier.withdrawal(locked))
    late = locked.recipe.model_copy(update={"asynchronous": asynchronous.Asynchronous(buffer_size=1)})
    said = " ".join(dossier.withdrawal(locked.model_copy(update={"recipe": late})))
    assert "not to the same numbers as if it had never taken part: who answers first is in them" in said
