"""The ledger: charged before an update leaves, refused over the budget, composed over records, runs and restarts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import privacy
from fedvfm.data import sample as samples
from fedvfm.ledger import entries, ledger, summary
from fedvfm.privacy import records
from fedvfm.storage import storage
from fedvfm.trust import signed_documents
from tests.privacy.releases import AFTER, budget, claim, epsilon, sha


def spend(book: ledger.Ledger, one: ledger.Claim, own: privacy.Budget, text: str = "") -> dict[str, Any]:
    with book.hold(one, own) as held:
        return held.charge(sha(text or f"update {one.round}"))


def test_rounds_compose_and_the_first_that_is_too_much_is_refused_before_training(book: ledger.Ledger) -> None:
    own = budget()
    for number in range(1, 5):
        spend(book, claim(number), own)
    assert epsilon(book) == pytest.approx(AFTER[4], abs=1e-3)
    length = book.mark.length
    with pytest.raises(errors.BudgetExceeded) as caught:
        book.check(claim(5), own)
    assert str(caught.value) == (
        "round 5 would bring site 'north' to epsilon 8.02 (record level, delta 1e-05); its ledger allows 8.00. "
        "Raise noise-multiplier to 1.106 or stop at round 4."
    )
    assert caught.value.reason == "privacy-budget"
    with pytest.raises(errors.BudgetExceeded), book.hold(claim(5), own):
        pytest.fail("the block ran")
    with pytest.raises(errors.BudgetExceeded):
        book.charge(claim(5), own, sha("x"))
    assert book.mark.length == length
    raised = claim(5, noise_multiplier=1.11)
    assert book.check(raised, own).value <= 8.0, "the remedy is one"


def test_the_remedy_covers_all_rounds_that_are_left(book: ledger.Ledger) -> None:
    own = budget(epsilon=5.0)
    spend(book, claim(1), own)
    with pytest.raises(errors.BudgetExceeded, match=r"Raise noise-multiplier to [\d.]+ or stop at round 1") as caught:
        book.check(claim(2, rounds=9), own)
    found = float(str(caught.value).split("noise-multiplier to ")[1].split(" ")[0])
    for number in range(2, 11):
        spend(book, claim(number, noise_multiplier=found), own)
    with pytest.raises(errors.BudgetExceeded):
        book.check(claim(11, noise_multiplier=found), own)


def test_nothing_fits_what_is_left(book: ledger.Ledger) -> None:
    with pytest.raises(errors.BudgetExceeded, match=r"No noise fits what is left: do not begin\."):
        book.check(claim(1), budget(epsilon=0.001))


def test_it_lasts_over_restarts_runs_and_names_of_the_data_set(book: ledger.Ledger, folder: Path) -> None:
    for number in range(1, 5):
        again = ledger.Ledger(folder, "north", "record")
        spend(again, claim(number), budget(data_set=f"run-{number}"))
    with pytest.raises(errors.BudgetExceeded):
        ledger.Ledger(folder, "another-name", "record").check(claim(5), budget(data_set="fresh"))


def test_one_added_image_opens_no_fresh_budget(book: ledger.Ledger) -> None:
    own = budget()
    for number in range(1, 5):
        spend(book, claim(number, last=40 + number), own)
    with pytest.raises(errors.BudgetExceeded):
        book.check(claim(5, last=1000), own)
    with pytest.raises(errors.BudgetExceeded):
        book.check(claim(5, first=39, last=1000), own)


def test_records_that_were_never_drawn_have_their_whole_budget(book: ledger.Ledger) -> None:
    own = budget()
    for number in range(1, 5):
        spend(book, claim(number), own)
    fresh = claim(5, first=500, last=540)
    assert book.check(fresh, own).value == pytest.approx(AFTER[1], abs=1e-3)
    spend(book, fresh, own)
    # One that overlaps half of both pays for the four rounds of the first.
    with pytest.raises(errors.BudgetExceeded, match=r"8\.02"):
        book.check(claim(6, first=20, last=520), own)


def test_overlap_by_windows_is_counted_record_by_record(book: ledger.Ledger) -> None:
    """Sliding windows of three releases each: no record is in more than three of ten."""
    own = budget()
    for number in range(1, 11):
        spend(book, claim(number, first=10 * number, last=10 * number + 30), own)
    assert epsilon(book) == pytest.approx(AFTER[3], abs=1e-3)


def test_the_same_update_is_charged_once_and_another_again(book: ledger.Ledger) -> None:
    own = budget()
    first = spend(book, claim(1), own, "bytes")
    assert book.charge(claim(1), own, sha("bytes")) == first
    assert sum(one["event"] == "charged" for one in book.entries) == 1
    spend(book, claim(1), own, "other bytes")
    assert sum(one["event"] == "charged" for one in book.entries) == 2
    assert epsilon(book) == pytest.approx(AFTER[2], abs=1e-3)


def test_a_retry_is_sent_even_where_nothing_is_left(book: ledger.Ledger) -> None:
    spend(book, claim(1), budget(epsilon=4.1), "bytes")
    assert book.charge(claim(1), budget(epsilon=0.1), sha("bytes"))["update"] == sha("bytes")


def test_what_is_held_counts_and_what_is_let_go_does_not(book: ledger.Ledger, folder: Path) -> None:
    own, other = budget(epsilon=5.0), ledger.Ledger(folder, "north", "record")
    with book.hold(claim(1), own), pytest.raises(errors.BudgetExceeded):
        other.check(claim(2), own)
    other.check(claim(2), own)
    with pytest.raises(errors.TrainingError), book.hold(claim(1), own):
        raise errors.TrainingError("a loss that is not finite")
    other.check(claim(2), own)
    assert not list((folder / "holding").iterdir())
    assert [one["event"] for one in book.entries] == ["opened", "reserved", "released", "reserved", "released"]


def test_another_unit_is_refused(book: ledger.Ledger, folder: Path) -> None:
    with pytest.raises(errors.LedgerError, match="counts by record, the recipe's mechanism 'patient-level' by patient"):
        book.check(claim(1, mechanism="patient-level", unit="patient"), budget())
    with pytest.raises(errors.LedgerError, match='keeps its unit: write unit = "record"'):
        ledger.Ledger(folder, "north", "patient")
    with pytest.raises(errors.LedgerError, match="0 of them"):
        book.check(claim(1, last=0), budget())


def test_a_clock_that_is_set_back_changes_nothing(
    book: ledger.Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, now = budget(), signed_documents.now()
    for number, years in enumerate((0, -30, 40, -1), start=1):
        monkeypatch.setattr(signed_documents, "now", lambda years=years: now.replace(year=now.year + years))
        spend(ledger.Ledger(folder, "north", "record"), claim(number), own)
    with pytest.raises(errors.BudgetExceeded, match=r"8\.02"):
        ledger.Ledger(folder, "north", "record").check(claim(5), own)


def test_files_are_private_and_tell_nothing(book: ledger.Ledger) -> None:
    one = claim(1)
    spend(book, one, budget())
    files = [path for path in book.folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(book.folder.stat().st_mode) == 0o700
    kept = b"".join(path.read_bytes() for path in files if path.name != "ledger.key")
    assert all(name.encode() not in kept for name in one.names)
    plain = {hashlib.sha256(name.encode()).digest()[: records.BYTES] for name in one.names}
    stored = book.records.find(str(book.entries[-1]["records"]))
    assert stored is not None
    assert len(stored) == 40
    assert not plain & stored, "without the key nobody can look a name up"
    assert not {lines_of for lines_of in book.entries[-1] if lines_of in ("names", "patients")}


def test_a_lost_or_other_key_refuses(book: ledger.Ledger) -> None:
    path = book.records.key_path
    before = path.read_text()
    spend(book, claim(1), budget())
    storage.write_text(path, "ff" * 32)
    with pytest.raises(errors.LedgerError, match="the key beside it is another one"):
        book.check(claim(2), budget())
    path.unlink()
    with pytest.raises(errors.LedgerError, match="missing or damaged"):
        book.check(claim(2), budget())
    storage.write_text(path, before, mode=0o644)
    with pytest.raises(errors.LedgerError, match=r"has permissions 0644.*chmod 600"):
        book.check(claim(2), budget())
    storage.write_text(path, before)
    book.check(claim(2), budget())


@pytest.mark.parametrize("harm", ["gone", "cut", "other"])
def test_a_set_that_is_not_there_counts_as_every_record(book: ledger.Ledger, harm: str) -> None:
    own = budget()
    for number in range(1, 5):
        spend(book, claim(number), own)
    path = book.folder / "sets" / str(book.entries[-1]["records"])
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-16] if harm == "cut" else bytes(640))
    fresh = ledger.Ledger(book.folder, "north", "record")
    with pytest.raises(errors.BudgetExceeded, match=r"8\.02"):
        fresh.check(claim(5, first=500, last=540), own)


def test_a_ledger_that_was_emptied_or_removed_is_not_begun_again(book: ledger.Ledger) -> None:
    spend(book, claim(1), budget())
    for harm in (lambda: book.path.write_bytes(b""), book.path.unlink):
        harm()
        with pytest.raises(errors.LedgerError, match=r"is gone, but records of earlier releases are here"):
            ledger.Ledger(book.folder, "north", "record")


def test_an_edited_line_stops_everything(book: ledger.Ledger) -> None:
    spend(book, claim(1), budget())
    text = book.path.read_text().replace('"steps":30', '"steps":3', 1)
    book.path.write_text(text)
    with pytest.raises(errors.AuditError, match="line 2 does not continue the chain"):
        ledger.Ledger(book.folder, "north", "record")
    with pytest.raises(errors.AuditError, match="it is evidence"):
        book.check(claim(2), budget())


def test_pld_lets_more_rounds_through_and_never_fewer(book: ledger.Ledger) -> None:
    for number in range(1, 5):
        spend(book, claim(number), budget())
    after = book.check(claim(5), budget(accountant="pld"))
    assert after.accountant == "pld"
    assert after.value < 7.7


def test_free_text_does_not_get_in(book: ledger.Ledger) -> None:
    for event, fields in (
        ("said", {"text": "x"}),
        ("floor", {"epsilon": 1.0, "delta": 0.1, "note": "x"}),
        ("floor", {"epsilon": float("inf"), "delta": 0.1}),
        ("suspended", {"length": -1, "head": "a" * 64}),
        ("reconciled", {"marks": ["patient Smith"]}),
        ("released", {"token": "patient Smith"}),
    ):
        with pytest.raises(ValueError, match="no audit entry"):
            book.record(event, **fields)
        with pytest.raises(ValueError, match="no line of a ledger"):
            entries.require(event, fields)


def test_units_of_samples() -> None:
    own = [
        samples.Sample("a", patient="p"),
        samples.Sample("b", patient="p"),
        samples.Sample("c"),
        samples.Sample("p"),
    ]
    assert records.ids("record", own) == ["sample a", "sample b", "sample c", "sample p"]
    assert records.ids("patient", own) == ["patient p", "sample c", "sample p"]
    assert records.ids("site", own) == ["site"]
    assert records.charged("record", own) == records.ids("record", own)
    assert records.charged("patient", own) == ["patient p", "sample a", "sample b", "sample c", "sample p"]
    with pytest.raises(ValueError, match="unit 'scan'"):
        records.ids("scan", own)


def test_a_pseudonym_that_comes_later_opens_no_fresh_budget(folder: Path) -> None:
    """Nor does a table of patients where there was none: their images have spent what they have."""
    book, own = ledger.Ledger(folder, "north", "patient"), budget(unit="patient")
    event = {"mechanism": "patient-level", "unit": "patient"}

    def named(number: int, patient: str | None) -> ledger.Claim:
        images = [
            samples.Sample(f"image-{at}", patient=None if patient is None else f"{patient}{at}") for at in range(9)
        ]
        return dataclasses.replace(claim(number, **event), names=records.charged("patient", images))

    for number, patient in enumerate((None, "Smith-", "p-", "q-"), 1):
        spend(book, named(number, patient), own)
    with pytest.raises(errors.BudgetExceeded, match=r"8\.02"):
        book.check(named(5, "r-"), own)


def test_what_was_kept_is_known_by_its_own_reservation_alone(book: ledger.Ledger) -> None:
    """Of other files, before or after it, or of another federation with the same recipe: they say nothing of it."""
    own, before, after = budget(epsilon=20.0), claim(1), claim(1, last=39)
    with book.hold(before, own) as first:
        assert book.known(before, own, sha("kept"), first.token)
    with book.hold(after, own) as last:
        pass  # trained, kept, and killed before it was charged
    assert not book.known(before, own, sha("kept"), last.token)
    assert book.known(after, own, sha("kept"), last.token)
    assert not book.known(after, own, sha("kept"), first.token)
    assert book.known(before, own, sha("kept"), first.token)
    with book.hold(claim(2), own) as other:
        assert book.known(after, own, sha("kept"), last.token), "another round is another matter"
        assert not book.known(after, own, sha("kept"), other.token)
    for made in (before, after):
        assert not book.known(made, own, sha("kept"), ""), "kept by an earlier release: of which is not known"
    book.charge(after, own, sha("kept"), token=last.token)
    assert book.known(before, own, sha("kept"), ""), "it was charged, and its noise is nobody else's"
    assert not book.known(after, own, sha("other"), "")


def test_a_charge_takes_the_place_of_its_own_reservation_and_of_no_charge(book: ledger.Ledger) -> None:
    """Two federations with one recipe: what the one holds counts while the other charges, and the other way round."""
    own = budget(epsilon=5.3)
    with book.hold(claim(1), own) as one, book.hold(claim(1), own) as two:
        two.charge(sha("of the second"))
        assert book.spending(book.entries).rows == 2 * book.spending(book.entries).rows[:1]
        one.charge(sha("of the first"))
        with pytest.raises(errors.BudgetExceeded):
            one.charge(sha("once more, under the reservation that is used up"))
    assert [one["event"] for one in book.entries] == ["opened", "reserved", "reserved", "charged", "charged"]
    assert [line["token"] for line in book.entries[1:]] == [one.token, two.token, two.token, one.token]


@pytest.mark.parametrize("mechanism", ["site-level", "site-level-shared"])
def test_the_same_bytes_of_two_reservations_are_two_releases(folder: Path, mechanism: str) -> None:
    """At site level what is charged has no noise yet: two federations get one update, with noise of their own."""
    book, own = ledger.Ledger(folder, "north", "site"), budget(unit="site", epsilon=20.0)
    made = dataclasses.replace(claim(1, mechanism=mechanism, unit="site"), names=["site"])
    with book.hold(made, own) as one, book.hold(made, own) as two:
        for held in (one, two, one):
            held.charge(sha("bytes"))
    assert [line["token"] for line in book.entries if line["event"] == "charged"] == [one.token, two.token]
    assert not book.known(made, own, sha("bytes"), ""), "kept by an earlier release: of which of them is not known"
    assert len(book.spending(book.entries).rows) == 2


def test_a_hospital_that_was_renamed_has_spent_what_it_has(folder: Path) -> None:
    """Earlier releases charged a site under its name."""
    book, own = ledger.Ledger(folder, "north", "site"), budget(unit="site")
    event = {"mechanism": "site-level", "unit": "site"}

    def named(number: int, name: str) -> ledger.Claim:
        return dataclasses.replace(claim(number, **event), names=[name])

    for number, name in enumerate(("site north", "site south", "site", "site"), 1):
        spend(book, named(number, name), own)
    with pytest.raises(errors.BudgetExceeded, match=r"8\.02"):
        book.check(named(5, "site"), own)
    assert summary.build(folder, own)["data_sets"][0]["epsilon"] == pytest.approx(AFTER[4], abs=1e-3)


def test_show_says_what_is_spent_of_how_much(book: ledger.Ledger) -> None:
    spend(book, claim(1), budget())
    spend(book, claim(2), budget(data_set="later", epsilon=9.0))
    found = summary.build(book.folder, budget())
    assert [(one["name"], one["releases"], one["names"]) for one in found["data_sets"]] == [
        ("later", 1, 40),
        ("nuclei", 1, 40),
    ]
    # Both names hold the same records: each has spent both rounds.
    assert {round(one["epsilon"], 2) for one in found["data_sets"]} == {5.28}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    said = "\n".join(summary.words(found))
    assert "data set nuclei: epsilon 5.29 of 8.00 (record level, delta 1e-05, rdp), 1 release" in said
    assert audit.verify(book.path)["length"] == found["length"]


# -- two processes -----------------------------------------------------------------------------------------------------


def _race(folder: Path, own: privacy.Budget, one: ledger.Claim, start: Any, text: str) -> None:
    book = ledger.Ledger(folder, "north", "record")
    start.wait(60)
    try:
        spend(book, one, own, text)
    except errors.BudgetExceeded:
        return


def test_two_processes_cannot_spend_the_same(folder: Path) -> None:
    """Eight at once, room for four."""
    context = multiprocessing.get_context("fork")
    own, start = budget(), context.Barrier(8)
    made = [
        context.Process(target=_race, args=(folder, own, claim(number), start, f"process {number}"))
        for number in range(1, 9)
    ]
    for one in made:
        one.start()
    for one in made:
        one.join(120)
    assert [one.exitcode for one in made] == [0] * 8
    book = ledger.Ledger(folder, "north", "record")
    charged = [one for one in book.entries if one["event"] == "charged"]
    # Held rounds count too, so some may be refused that would have fitted; never more than four fit.
    assert 1 <= len(charged) <= 4
    assert epsilon(book) <= 8.0
    for number in range(20, 24 - len(charged)):
        spend(book, claim(number), own)
    with pytest.raises(errors.BudgetExceeded):
        book.check(claim(30), own)
