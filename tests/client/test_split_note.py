"""A recipe that began at a site is split into train, val and test as it was, or not worked on at all."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.client import doctor, dry_run, privacy_report, purge, refusal_words, site_file
from fedvfm.client.gate import policy, split_pin
from fedvfm.config import privacy, schema
from fedvfm.protocol import protocol
from tests.client import private_site

Site = private_site.Site


def note(site: Site, asked: schema.Recipe) -> Path:
    found: Path = site.where.folder / "splits" / f"{asked.hash}.json"
    return found


def edit(site: Site, old: str, new: str) -> None:
    text = site.settings.read_text()
    assert text.count(old) == 1
    site.settings.write_text(text.replace(old, new))


SEED = ("\n[privacy]\n", "\n[split]\nseed = 1\n[privacy]\n")


@pytest.fixture
def site(site: Site) -> Site:
    """One whose policy leaves epsilon to the budget: it follows from how many the split trains on."""
    site.settings.write_text(re.sub(r"max_epsilon = \S+", "max_epsilon = 50.0", site.settings.read_text()))
    return site


def refused(site: Site, task: protocol.Task, kind: str = protocol.TRAIN) -> str:
    """The word, with nothing computed and the refusal in the audit log."""
    before = len(site.app.asked)
    reply = site.ask(task, kind)
    assert reply.has_error()
    assert len(site.app.asked) == before
    word = protocol.error_word(reply)
    decided = [one for one in site.where.audit.entries if one["event"] == "decided"][-1]
    assert (decided["verdict"], decided["reason"]) == ("refused", word)
    return word


def test_it_is_kept_for_the_owner_alone_once_something_was_computed(site: Site) -> None:
    asked = private_site.make_recipe()
    site.ask(protocol.Task(asked), protocol.HANDSHAKE)
    assert not note(site, asked).exists(), "a handshake computes nothing"
    assert not site.ask(private_site.train()).has_error()
    kept = note(site, asked)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert split_pin.of(asked.hash, site_file.read_site(site.settings)).kind == "keyed"
    before = kept.read_bytes()
    purge.run(site.where)
    assert kept.read_bytes() == before, "what a site did stays"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (*SEED, "split.seed was 0, it is 1"),
        ("\n[privacy]\n", "\n[split]\ntest_share = 0.3\n[privacy]\n", "split.test_share was 0.25, it is 0.3"),
        (f"[privacy]\n{private_site.BUDGET}", "", "it was with [privacy]: each patient by itself, it is without"),
    ],
)
def test_another_split_in_mid_recipe_is_refused_until_it_is_put_back(site: Site, old: str, new: str, said: str) -> None:
    first = private_site.train()
    assert not site.ask(first).has_error()
    second = private_site.train(2, private_site.adapter(1.0, 1.0))
    before = site.settings.read_text()
    edit(site, old, new)
    for task, kind in (
        (protocol.Task(second.recipe), protocol.HANDSHAKE),
        (first, protocol.TRAIN),
        (second, protocol.TRAIN),
        (protocol.Task(second.recipe, 1, second.state, "test"), protocol.EVALUATE),
    ):
        assert refused(site, task, kind) == "policy-split"
    assert said in str(site.faults[-1])
    assert "Put the site's file back as it was, or ask for another recipe" in str(site.faults[-1])
    again = private_site.Site(site.folder)
    assert refused(again, second) == "policy-split", "after a restart too"
    site.settings.write_text(before)
    assert not again.ask(second).has_error()


def test_privacy_that_is_written_into_the_file_in_mid_recipe(site: Site) -> None:
    asked = private_site.make_recipe().model_copy(update={"privacy": privacy.NONE})
    site.approve(asked)
    about = site.settings.read_text().partition("[policy]")[0]
    site.settings.write_text(about + policy.accepting(policy.Facts.of(private_site.build(asked))))
    assert not site.ask(protocol.Task(asked, 1, private_site.START)).has_error()
    site.settings.write_text(f"{site.settings.read_text()}[privacy]\n{private_site.BUDGET}")
    assert refused(site, protocol.Task(asked, 2, private_site.adapter(1.0, 1.0))) == "policy-split"
    assert "it was without [privacy]: exact shares, it is with [privacy]" in str(site.faults[-1])


def test_a_recipe_that_has_not_begun_here_is_split_in_any_way(site: Site) -> None:
    site.ask(protocol.Task(private_site.make_recipe()), protocol.HANDSHAKE)
    edit(site, *SEED)
    assert not site.ask(private_site.train()).has_error()
    other = private_site.make_recipe(rounds=2)
    site.approve(other)
    edit(site, "seed = 1", "seed = 2")
    assert not site.ask(protocol.Task(other, 1, private_site.START)).has_error()
    assert refused(site, private_site.train(2, private_site.adapter(1.0, 1.0))) == "policy-split"


def test_a_recipe_that_these_data_do_not_fit_is_not_noted_in_place_of_the_one_that_trains(site: Site) -> None:
    names = {"class_names": ["background", "disc", "third"], "input_size": [28, 28]}
    asked, other = private_site.make_recipe(), private_site.make_recipe(data=names)
    site.approve(other)
    assert not site.ask(protocol.Task(asked), protocol.HANDSHAKE).has_error()
    assert site.ask(protocol.Task(other), protocol.HANDSHAKE).has_error()
    assert not site.ask(private_site.train()).has_error()
    assert (note(site, asked).exists(), note(site, other).exists()) == (True, False)


def test_a_round_that_failed_leaves_the_split_free(site: Site) -> None:
    def broken() -> None:
        raise errors.DataError("an image cannot be read")

    site.app.during = broken
    assert site.ask(private_site.train()).has_error()
    site.app.during = lambda: None
    edit(site, *SEED)
    assert not site.ask(private_site.train()).has_error()


def test_an_edit_while_a_round_trains_is_no_way_round(site: Site) -> None:
    """What is kept is what the round was split by, not what the file says when it ends."""
    site.app.during = lambda: edit(site, *SEED)
    site.ask(private_site.train())
    site.app.during = lambda: None
    assert refused(site, private_site.train(2, private_site.adapter(1.0, 1.0))) == "policy-split"
    assert "split.seed was 0, it is 1" in str(site.faults[-1])


def test_a_note_that_cannot_be_read_stops_the_recipe(site: Site) -> None:
    assert not site.ask(private_site.train()).has_error()
    note(site, private_site.make_recipe()).write_text("{}")
    assert refused(site, private_site.train(2, private_site.adapter(1.0, 1.0))) == "policy-split"
    assert "Restore it from a backup; or, where [privacy] and [split] are as they were, remove it" in str(
        site.faults[-1]
    )


def test_doctor_rehearsal_and_console_say_so(site: Site) -> None:
    assert not site.ask(private_site.train()).has_error()
    locked = private_site.build(private_site.make_recipe())
    assert doctor._split(site.where, site_file.read_site(site.settings), locked, site.settings) == []
    edit(site, "\n[privacy]\n", "\n[split]\nval_share = 0.1\n[privacy]\n")
    (row,) = doctor._split(site.where, site_file.read_site(site.settings), locked, site.settings)
    assert (row.check, "split.val_share was 0.15, it is 0.1" in row.problem) == ("split", True)
    here = site_file.read_site(site.settings)
    judged = privacy_report.judge(locked, here)
    with pytest.raises(errors.PolicyRefused, match=r"policy-split: .*val_share was 0\.15"):
        dry_run.run(here, locked, judged, site.where)
    assert "doctor client" in refusal_words.WORDS["policy-split"][1]
