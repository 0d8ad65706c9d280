"""The roster: which sites were invited, approved, dropped, revoked and withdrawn, as a hash-chained file of the server.

The state of a site is what its last line says. A token is used up by the line that approves its request, so it is good
once whatever crashes in between; a key that was ever on the roster is never taken for another site.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import invites, keys, rekeying, requests, signed_documents

INVITED, APPROVED, DROPPED, REVOKED, WITHDRAWN = "invited", "approved", "dropped", "revoked", "withdrawn"
KNOWN = (APPROVED, DROPPED)
"""Sites whose key is let in: a dropped one is asked nothing, but its client may stay and be readmitted."""
READMITTED, REKEYED = "readmitted", "rekeyed"
"""The lines that make a dropped site an approved one again, and that give a site another key."""


@dataclass(frozen=True)
class Entry:
    """One site.

    Attributes:
        status: ``invited``, ``approved``, ``dropped``, ``revoked`` or ``withdrawn``.
        since: when that was written.
        public_key: of a site that is or was approved.
        recipe: hash of the recipe the site approved when it joined.
        version: of its fedvfm when it joined.
        verifier: of the open invite's token.
        expires: of the open invite.
    """

    site: str
    status: str
    since: str
    public_key: str = ""
    recipe: str = ""
    version: str = ""
    verifier: str = ""
    expires: str = ""

    @property
    def key_fingerprint(self) -> str:
        """sha256 of the public key, or empty."""
        return keys.fingerprint(self.public_key) if self.public_key else ""

    def to_json(self) -> dict[str, str]:
        """What may be shown: nothing of the token."""
        return {
            "site": self.site,
            "status": self.status,
            "since": self.since,
            "key": self.key_fingerprint,
            "public_key": self.public_key,
            "recipe": self.recipe,
            "version": self.version,
            "expires": self.expires,
        }


def read(path: Path) -> dict[str, Entry]:
    """Site name -> entry, sorted by name.

    Raises:
        CheckpointError: if the file was edited.
    """
    return _fold(hash_chain.read(path))


class Roster:
    """The roster of one federation, to change it; every change takes the file for itself alone.

    Args:
        path: the file.
        federation: name that a request must bear.
    """

    def __init__(self, path: Path, federation: str) -> None:
        self.path, self.federation = path, federation

    def invite(self, site: str, verifier: str, expires: str, now: datetime.datetime) -> None:
        """Note an invite; an earlier open one of the site is void.

        Raises:
            TrustError: if the site is on the roster, or a name differs from another's in case alone.
        """
        invites.check_name(site)
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            known = _fold(written.entries)
            twins = [name for name in known if name != site and name.casefold() == site.casefold()]
            if twins:
                raise errors.TrustError(f"site '{site}': differs from '{twins[0]}' in case alone. Choose another name")
            if site in known and known[site].status in KNOWN:
                raise errors.TrustError(
                    f"site '{site}': is {known[site].status}. To give it a new key: fedvfm server revoke "
                    f'"{site}", then invite; or, if it has its old key, fedvfm client rekey there'
                )
            if site in known and known[site].status == WITHDRAWN:
                raise errors.TrustError(
                    f"site '{site}': withdrew at {known[site].since}. Should the hospital take part again, invite it "
                    "under another name: what it withdrew stays apart from what it gives then"
                )
            written.append(
                {
                    "event": INVITED,
                    "site": site,
                    "time": signed_documents.stamp(now),
                    "verifier": verifier,
                    "expires": expires,
                }
            )

    def approve(self, request: requests.Request, now: datetime.datetime) -> Entry:
        """Check a request and put its key on the roster.

        Raises:
            TrustError: if it is of another federation or site, its token is wrong, used or expired, or it was changed.
        """
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            self._check(request, _fold(written.entries), written.entries, now)
            written.append(
                {
                    "event": APPROVED,
                    "site": request.site,
                    "time": signed_documents.stamp(now),
                    "public_key": request.public_key,
                    "recipe": request.recipe,
                    "version": request.version,
                }
            )
            return _fold(written.entries)[request.site]

    def revoke(self, site: str, now: datetime.datetime) -> Entry:
        """Take a site off; its open invite is void, its key never comes back.

        Raises:
            TrustError: if it is not on the roster.
        """
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            known = _fold(written.entries)
            if site not in known:
                raise errors.TrustError(
                    f"site '{signed_documents.shown(site)}': is not on the roster: {', '.join(known)}"
                )
            if known[site].status not in (REVOKED, WITHDRAWN):
                written.append({"event": REVOKED, "site": site, "time": signed_documents.stamp(now)})
            return _fold(written.entries)[site]

    def withdraw(self, site: str, now: datetime.datetime) -> Entry:
        """Take a site off that withdrew: neither its key nor its name come back.

        Raises:
            TrustError: if it never had a key here.
        """
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            held = {line["site"]: line["public_key"] for line in written.entries if "public_key" in line}
            if site not in held:
                raise errors.TrustError(
                    f"site '{signed_documents.shown(site)[:80]}': never took part; sites that did: "
                    f"{', '.join(sorted(held)) or 'none'}. An open invite ends with: fedvfm server revoke"
                )
            if _fold(written.entries)[site].status != WITHDRAWN:
                line = {"event": WITHDRAWN, "site": site, "time": signed_documents.stamp(now)}
                written.append({**line, "public_key": held[site]})
            return _fold(written.entries)[site]

    def drop(self, site: str, now: datetime.datetime) -> Entry:
        """Ask an approved site nothing more; its entry and key stay.

        Raises:
            TrustError: if it is not approved.
        """
        return self._turn(site, APPROVED, DROPPED, now)

    def readmit(self, site: str, now: datetime.datetime) -> Entry:
        """The inverse of :meth:`drop`.

        Raises:
            TrustError: if it was not dropped.
        """
        return self._turn(site, DROPPED, APPROVED, now)

    def rekey(self, asked: rekeying.Rekeying, now: datetime.datetime) -> Entry:
        """Give a site the key it asks for; the one it had is let in no more. Done again it changes nothing.

        Raises:
            TrustError: if the file is of another federation or site, is not signed with both keys, or does not name the
                key that the site has now.
        """
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            entry = self._rekeyed(asked, _fold(written.entries).get(asked.site), written.entries)
            if entry.public_key == asked.public_key:
                return entry
            line = {"event": REKEYED, "site": asked.site, "time": signed_documents.stamp(now)}
            written.append({**line, "public_key": asked.public_key})
            return _fold(written.entries)[asked.site]

    def rekeyed(self, site: str) -> list[tuple[str, str]]:
        """Fingerprints of the keys that a site took by :meth:`rekey`, each with that of the one before, in order."""
        with storage.exclusive(self.path):
            entries = hash_chain.Chain(self.path).entries
        lines = [entry for entry in entries if entry["site"] == site and "public_key" in entry]
        return [
            (keys.fingerprint(after["public_key"]), keys.fingerprint(before["public_key"]))
            for before, after in itertools.pairwise(lines)
            if after["event"] == REKEYED
        ]

    def _rekeyed(self, asked: rekeying.Rekeying, entry: Entry | None, lines: list[dict[str, Any]]) -> Entry:
        """The site's entry, where the file may change it or has done so."""
        who = f"new key of site '{asked.site}'"
        if asked.federation != self.federation:
            raise errors.TrustError(f"{who}: is for federation '{asked.federation}'; this one is '{self.federation}'")
        if entry is None or entry.status not in KNOWN:
            why = "is not on the roster" if entry is None else f"is {entry.status}"
            raise errors.TrustError(f"{who}: the site {why}; only a site that is approved gets another key")
        rekeying.require_signed(asked)
        had = [str(line["public_key"]) for line in lines if line["site"] == asked.site and "public_key" in line]
        if had[-2:] == [asked.old_key, asked.public_key]:
            return entry
        if asked.old_key != entry.public_key:
            raise errors.TrustError(
                f"{who}: is signed with a key the site has no more, or never had. Where this roster is a backup from "
                "before the site's last new key, give the file of that key first: it is in the site's rekeyed/"
            )
        if any(line.get("public_key") == asked.public_key for line in lines):
            raise errors.TrustError(f"{who}: was on the roster before. The site must make another one")
        return entry

    def _turn(self, site: str, before: str, after: str, now: datetime.datetime) -> Entry:
        with storage.exclusive(self.path):
            written = hash_chain.Chain(self.path)
            entry = _fold(written.entries).get(site)
            if entry is None or entry.status not in (before, after):
                found = "is not on the roster" if entry is None else f"is {entry.status}, not {before}"
                raise errors.TrustError(
                    f"site '{signed_documents.shown(site)[:80]}': {found}. See: fedvfm server roster"
                )
            if entry.status == before:
                event = DROPPED if after == DROPPED else READMITTED
                written.append({"event": event, "site": site, "time": signed_documents.stamp(now)})
            return _fold(written.entries)[site]

    def _check(
        self,
        request: requests.Request,
        known: Mapping[str, Entry],
        lines: list[dict[str, Any]],
        now: datetime.datetime,
    ) -> None:
        who = f"request of site '{request.site}'"
        if request.federation != self.federation:
            raise errors.TrustError(f"{who}: is for federation '{request.federation}'; this one is '{self.federation}'")
        entry = known.get(request.site)
        if entry is None:
            raise errors.TrustError(
                f"{who}: no such site was invited; invited were: {', '.join(known)}. A renamed site needs an invite of "
                f"its own"
            )
        if entry.status == APPROVED:
            raise errors.TrustError(
                f"{who}: the site is approved already and its invite used up. A new key needs: fedvfm server revoke, "
                "then invite; or, if it has its old key, fedvfm client rekey there"
            )
        if entry.status == DROPPED:
            raise errors.TrustError(
                f"{who}: the site was dropped at {entry.since} and has its key still. Take it in again: "
                "fedvfm server readmit"
            )
        if entry.status == REVOKED:
            raise errors.TrustError(f"{who}: the site was revoked at {entry.since}. It needs a new invite")
        if entry.status == WITHDRAWN:
            raise errors.TrustError(f"{who}: the site withdrew at {entry.since}; under this name it stays so")
        if not requests.has_token(request, entry.verifier):
            raise errors.TrustError(
                f"{who}: does not come from the holder of this site's invite, or was changed. Ask the site on another "
                "channel; if in doubt invite it anew"
            )
        if not requests.signed_by_its_key(request):
            raise errors.TrustError(f"{who}: is not signed with the key it brings")
        if now >= signed_documents.moment(entry.expires):
            raise errors.TrustError(f"{who}: its invite expired at {entry.expires}. Invite it anew")
        if any(line.get("public_key") == request.public_key for line in lines):
            raise errors.TrustError(f"{who}: its key was on the roster before. The site must join with a new key")


def _fold(lines: list[dict[str, Any]]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = _next(line, found)
        except KeyError:
            raise errors.CheckpointError(f"roster: line {number} is not of the known form") from None
        found[entry.site] = entry
    return dict(sorted(found.items()))


def _next(line: Mapping[str, Any], before: Mapping[str, Entry]) -> Entry:
    """The state of a site after one line."""
    event, site, since = str(line["event"]), str(line["site"]), str(line["time"])
    if event in (DROPPED, READMITTED, REVOKED, WITHDRAWN):
        known = before[site]
        status = APPROVED if event == READMITTED else event
        key = str(line.get("public_key", known.public_key))
        return Entry(site, status, since, key, known.recipe, known.version)
    if event == REKEYED:
        return replace(before[site], public_key=str(line["public_key"]), since=since)
    names = ("verifier", "expires") if event == INVITED else ("public_key", "recipe", "version")
    return Entry(site, event, since, **{name: str(line[name]) for name in names})
