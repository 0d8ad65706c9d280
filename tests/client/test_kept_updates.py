"""What SIGKILL left of a round, asked for again: the same bytes charged once, or work that is judged as new."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.client.gate import reply_cache
from fedvfm.protocol import protocol
from tests.client import private_site

Site = private_site.Site
UNCHARGED, CHARGED, NOTED = "update-on-disk", "update-charged", "line-written:7"


def killed(folder: Path, point: str) -> Site:
    """The site after a process of it was killed in round 1; nothing left."""
    status = os.waitpid(private_site.child(lambda: private_site.leave(folder), FEDVFM_FAULT_POINT=point), 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (folder / "left").exists()
    return Site(folder)


def trained_on(site: Site) -> list[str]:
    """File names of the images that round 1 draws from, in order."""
    hospital = site_file.hospital(site_file.read_site(site.settings), private_site.make_recipe())
    return [hospital.source.path_of(one).name for one in hospital.train]


def take_out(site: Site, name: str = "") -> None:
    """Remove an image that was trained on; the fewer that are left may come to a larger epsilon."""
    name = name or trained_on(site)[0]
    for part in ("images", "masks"):
        (site.folder / "data" / part / name).unlink()
    text = site.settings.read_text()
    (line,) = [one for one in text.splitlines() if one.startswith("max_epsilon")]
    site.settings.write_text(text.replace(line, "max_epsilon = 9.0"))


CLOSED = 'hours = []\ntime_zone = "UTC"\n'


def close(site: Site) -> None:
    site.settings.write_text(site.settings.read_text().replace("[policy]\n", f"[policy]\n{CLOSED}"))


def reopen(site: Site) -> None:
    site.settings.write_text(site.settings.read_text().replace(CLOSED, "").replace("rounds = 3", "rounds = 9"))


def use_up(site: Site) -> None:
    """Three rounds, of which another one than the first was the last."""
    site.settings.write_text(site.settings.read_text().replace("max_rounds = 9", "max_rounds = 3"))
    about = {"recipe": private_site.make_recipe().hash, "fingerprint": "cd" * 32, "examples": 1, "seconds": 1.0}
    for number in (2, 3):
        site.where.audit.record("trained", round=number, base=f"{number:064d}", **about)


def nothing(site: Site) -> None:
    """All is as it was."""


def both(site: Site) -> None:
    take_out(site)
    close(site)


def refused(site: Site, word: str) -> None:
    """With this word, and nothing is computed, reserved or let go for it."""
    before, kept = site.book.mark, reply_cache.Sent(site.where.sent).find(private_site.train())
    reply = site.ask(private_site.train())
    assert (reply.has_error(), protocol.error_word(reply)) == (True, word)
    assert (site.app.asked, site.book.mark) == ([], before)
    decided, gone = site.where.audit.entries[-2:]
    assert (decided["event"], decided["verdict"], decided["reason"]) == ("decided", "refused", word)
    assert (gone["event"], gone["reason"], "seconds" in gone) == ("sent", word, False)
    still = reply_cache.Sent(site.where.sent).find(private_site.train())
    assert kept is not None
    assert still is not None
    assert protocol.digest(still) == protocol.digest(kept)


@pytest.mark.parametrize(
    ("point", "change"),
    [
        *((point, change) for point in (CHARGED, NOTED) for change in (nothing, take_out, close, both, use_up)),
        *((UNCHARGED, change) for change in (nothing, close, use_up)),
    ],
)
def test_asked_again_after_a_kill_the_same_bytes_leave_and_count_once(
    tmp_path: Path, point: str, change: Callable[[Site], None]
) -> None:
    Site(tmp_path)
    before = killed(tmp_path, point)
    kept = reply_cache.Sent(before.where.sent).find(private_site.train())
    assert kept is not None
    change(before)
    for _ in range(2):
        again = Site(tmp_path)
        reply = again.ask(private_site.train())
        assert not reply.has_error(), again.faults
        assert protocol.digest(reply.content) == protocol.digest(kept)
        assert again.app.asked == []
        assert [one["update"] for one in again.charged()] == [protocol.digest(kept)]
        assert len(again.book.spending(again.book.entries).rows) == 1


def test_what_was_kept_uncharged_is_not_charged_as_if_the_data_were_as_before(site: Site) -> None:
    """Killed before the charge, and an image taken out meanwhile: its release would be charged to nobody."""
    take_out(killed(site.folder, UNCHARGED))
    assert site.charged() == []
    again, kept = Site(site.folder), reply_cache.Sent(site.where.sent)
    assert kept.find(private_site.train()) is not None
    seen: list[object] = []
    again.app.during = lambda: seen.append(kept.find(private_site.train()))
    assert not again.ask(private_site.train()).has_error()
    assert seen == [None], "let go before anything is trained in its place"
    assert again.app.asked == [protocol.TRAIN], "trained anew; what was kept never left"
    assert len(site.charged()) == 1


@pytest.mark.parametrize(("change", "word"), [(close, "policy-closed"), (use_up, "policy-rounds")])
def test_a_kept_update_that_may_not_leave_is_new_work(site: Site, change: Callable[[Site], None], word: str) -> None:
    """The message passed because nothing was to be computed for it; training is bound by hours and rounds."""
    take_out(killed(site.folder, UNCHARGED))
    change(site)
    refused(Site(site.folder), word)
    refused(Site(site.folder), word)
    reopen(site)
    again = Site(site.folder)
    assert not again.ask(private_site.train()).has_error()
    assert again.app.asked == [protocol.TRAIN]
    assert len(site.charged()) == 1


def test_refused_as_new_work_it_leaves_once_the_data_are_as_they_were(site: Site) -> None:
    name = trained_on(site)[0]
    kept = [(path, path.read_bytes()) for path in (site.folder / "data").glob(f"*/{name}")]
    take_out(killed(site.folder, UNCHARGED), name)
    close(site)
    refused(Site(site.folder), "policy-closed")
    for path, data in kept:
        path.write_bytes(data)
    again = Site(site.folder)
    assert not again.ask(private_site.train()).has_error()
    assert again.app.asked == []
    assert len(site.charged()) == 1


def test_a_kept_update_that_is_gone_after_the_message_was_judged_is_new_work_too(site: Site) -> None:
    task = private_site.train()
    assert not site.ask(task).has_error()
    close(site)
    again = Site(site.folder)
    passing = again.judge(task)
    reply_cache.Sent(site.where.sent).drop(task)
    with pytest.raises(errors.PolicyRefused, match=r"outside policy\.hours"):
        again.door.answer(passing)
    assert again.app.asked == []


# -- the reservation it was trained under ------------------------------------------------------------------------------


def test_the_reservation_is_kept_with_the_update_in_one_private_file(site: Site) -> None:
    assert not site.ask(private_site.train()).has_error()
    (path,) = site.where.sent.glob("*.reply")
    (line,) = site.charged()
    kept = reply_cache.Sent(site.where.sent)
    assert kept.token(private_site.train()) == line["token"] == site.book.entries[1]["token"]
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes().replace(line["token"].encode(), b"0" * 32))
    assert (kept.token(private_site.train()), kept.find(private_site.train())) == ("", None), "damaged as a whole"


def without_token(site: Site) -> bytes:
    """As an earlier release kept it; the update."""
    (path,) = site.where.sent.glob("*.reply")
    body = path.read_bytes().partition(b"\n")[2]
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    return body


@pytest.mark.parametrize("point", [UNCHARGED, CHARGED])
def test_what_an_earlier_release_kept_leaves_only_where_it_was_charged(site: Site, point: str) -> None:
    before = killed(site.folder, point)
    without_token(before)
    kept = reply_cache.Sent(site.where.sent).find(private_site.train())
    assert kept is not None
    again = Site(site.folder)
    reply = again.ask(private_site.train())
    assert not reply.has_error()
    same = protocol.digest(reply.content) == protocol.digest(kept)
    assert (same, again.app.asked) == ((True, []) if point == CHARGED else (False, [protocol.TRAIN]))
    assert len(site.charged()) == 1


@pytest.fixture
def two(tmp_path: Path) -> tuple[Site, Site]:
    """One hospital in two federations that ask for one recipe: a state folder each, the same images, one ledger."""
    one = Site(tmp_path / "one")
    return one, Site(tmp_path / "two", budget=f'{private_site.BUDGET}ledger = "{one.folder / "fedvfm-ledger"}"\n')


def test_two_federations_with_one_recipe_settle_their_own(two: tuple[Site, Site]) -> None:
    """Both killed before the charge, in either order of asking again: each is charged for what it sends."""
    kept = [reply_cache.Sent(killed(one.folder, UNCHARGED).where.sent) for one in two]
    tokens = [one.token(private_site.train()) for one in kept]
    for site in two:
        again = Site(site.folder)
        assert not again.ask(private_site.train()).has_error()
        assert again.app.asked == []
    assert [one["token"] for one in two[0].charged()] == tokens
    assert len(set(tokens)) == 2
    assert len(two[0].book.spending(two[0].book.entries).rows) == 2


@pytest.mark.parametrize("done", [True, False], ids=["charged", "killed"])
def test_one_federation_does_not_settle_by_the_reservation_of_the_other(two: tuple[Site, Site], done: bool) -> None:
    """The second trains without an image that the first trained on; the first then comes back without it too."""
    first, second = two
    name = trained_on(first)[0]
    take_out(killed(first.folder, UNCHARGED), name)
    take_out(second, name)
    if done:
        assert not second.ask(private_site.train()).has_error()
    else:
        killed(second.folder, UNCHARGED)
    again = Site(first.folder)
    kept = reply_cache.Sent(again.where.sent).find(private_site.train())
    assert kept is not None
    reply = again.ask(private_site.train())
    assert not reply.has_error()
    assert again.app.asked == [protocol.TRAIN], "the image that was taken out would have been charged with nothing"
    assert protocol.digest(reply.content) != protocol.digest(kept)
    assert not Site(second.folder).ask(private_site.train()).has_error()
    assert len(first.charged()) == 2
