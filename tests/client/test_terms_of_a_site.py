"""A site's own file while it works: every edit counts from the next message on, and what is worked on always ends."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.client.gate import enforcement, gate, reply_cache, steps
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.state import state
from fedvfm.trust import locked_recipe
from tests.client import private_site

Site = private_site.Site


def edit(site: Site, old: str, new: str) -> None:
    """In place, of the same length, and with the time that it had."""
    assert len(old) == len(new)
    before = site.settings.stat()
    text = site.settings.read_text()
    assert old in text
    with site.settings.open("r+") as file:
        file.write(text.replace(old, new))
    os.utime(site.settings, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert site.settings.stat().st_mtime_ns == before.st_mtime_ns


def test_an_edit_counts_whatever_time_is_on_the_file(site: Site) -> None:
    assert not site.ask(private_site.train()).has_error()
    edit(site, "max_rounds = 9", "max_rounds = 1")
    reply = site.ask(private_site.train(2, private_site.adapter(1.0, 1.0)))
    assert protocol.error_word(reply) == "policy-rounds"


@pytest.mark.parametrize("kept", [False, True])
def test_an_edit_between_judging_and_reserving_leaves_no_work_without_an_end(site: Site, kept: bool) -> None:
    task = private_site.train()
    passing = site.judge(task)
    judged = site.terms.site(private_site.CONTEXT)
    assert math.isfinite(judged.ends[0])
    edit(site, "max_hours = 24.0", "max_hours = 0.01")
    if kept:  # charging what was kept reads the policy anew
        update = state.SiteUpdate("north", private_site.adapter(1.0, 1.0), 1, 0, task.state.fingerprint)
        passing.sent.keep(task, Message(protocol.encode_update(update), reply_to=passing.message))
        assert not steps.update_kept_before(site.terms, passing)
    with passing.held:
        steps.work_after_all(site.terms, passing)
        steps.reserve(site.terms, passing)
        at, word = site.terms.site(private_site.CONTEXT).ends
    assert (math.isfinite(at), word) == (True, "policy-hours")
    assert (site.terms.site(private_site.CONTEXT) is judged) != kept, "worked on by what it was judged by"


def test_a_site_with_few_patients_trains_nothing_and_notes_it(site: Site) -> None:
    """They are counted as they are when the round is asked for."""
    text = site.settings.read_text()
    site.settings.write_text(text.replace("min_train_units = 10", "min_train_units = 1000"))
    assert protocol.error_word(site.ask(private_site.train())) == "policy-units"
    decided = [row for row in site.where.audit.entries if row["event"] == "decided"][-1]
    assert (decided["verdict"], decided["reason"], site.app.asked) == ("refused", "policy-units", [])
    site.settings.write_text(text)
    assert not site.ask(private_site.train()).has_error()
    site.settings.write_text(text.replace("min_train_units = 10", "min_train_units = 1000"))
    assert not site.ask(private_site.train()).has_error(), "what left before is sent again"


def test_the_first_adapter_of_an_extension_at_a_rank_of_its_own(tmp_path: Path) -> None:
    """Only the exact shapes of this site's rank pass for the cut one; all else is the adapter that was approved."""

    def adapter(size: int, value: float) -> state.AdapterState:
        return state.AdapterState({"head.bias": np.full(size, value, np.float32)})

    def build(asked: schema.Recipe) -> locked_recipe.LockedRecipe:
        size = asked.adapter.rank // 4
        rows = state.Manifest.of([state.ArraySpec("head.bias", (size,), "head")])
        return locked_recipe.LockedRecipe.of(asked, rows, adapter(size, 0.0), private_site.SHA, 1000)

    made = private_site.Site(tmp_path)
    asked = private_site.make_recipe(start=adapter(2, 7.0).fingerprint, adapter={"rank": 8, "alpha": 8.0})
    locked = build(asked)
    made.where.remember(locked)
    state_folder.approve(made.where, locked)
    made.settings.write_text(f"rank = 4\n{made.settings.read_text()}")
    own = enforcement.SiteTerms(made.where, made.settings, "cpu", build)
    made.door = gate.Gate(made.app, reply_cache.Sent(made.where.sent), own, lambda where, error: None)

    def word(start: state.AdapterState) -> str:
        task = protocol.Task(asked, 1, start)
        try:
            made.judge(task)
        except errors.PolicyRefused as refusal:
            return refusal.reason
        return ""

    assert word(adapter(2, 7.0)) == word(adapter(1, 7.0)) == ""
    assert word(adapter(2, 8.0)) == word(adapter(3, 7.0)) == "policy-base"
