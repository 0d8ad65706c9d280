"""Approvals: which recipes a person at the site approved, keyed by hash, in an append-only hash-chained file.

A recipe that differs in one value has another hash and no approval. Every line names the site, so a file carried over
from another site is refused. Under secure aggregation an approval names the roster document too: with whom this site's
update may be summed. A document that differs in one site or key has another hash, and needs another approval.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedvfm import errors
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import signed_documents

APPROVED, WITHDRAWN = "approved", "withdrawn"


def who() -> str:
    """The login name of this process's user as the system knows it; never an environment variable."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


class Approvals:
    """The approvals of one site.

    Args:
        path: the file.
        site: the name every line must bear.
        what: is approved, in a word.
    """

    def __init__(self, path: Path, site: str, what: str = "recipe") -> None:
        self.path, self.site, self.what = path, site, what

    def rows(self) -> list[dict[str, Any]]:
        """All lines, verified.

        Raises:
            TrustError: if the file was edited or is another site's.
        """
        try:
            return self._own(hash_chain.read(self.path))
        except errors.CheckpointError as error:
            raise errors.TrustError(f"{error}. Nothing counts as approved; restore the file from a backup") from None

    def stand(self) -> list[str]:
        """Hashes that are approved now."""
        last = {row["recipe"]: row["event"] for row in self.rows()}
        return [recipe for recipe, event in last.items() if event == APPROVED]

    def roster_of(self, recipe: str) -> str:
        """Hash of the roster document that the standing approval of a recipe names; empty where it names none."""
        last = {row["recipe"]: row for row in self.rows()}.get(recipe, {})
        return str(last.get("roster", "")) if last.get("event") == APPROVED else ""

    def approve(self, recipe: str, person: str | None = None, roster: str = "") -> dict[str, Any]:
        """Record that this login approved a recipe, or return the line that says so already.

        Args:
            recipe: its hash.
            person: who; default is the login name.
            roster: hash of the roster document that is approved beside it.
        """
        return self._write(APPROVED, recipe, person, {"roster": roster} if roster else {})

    def withdraw(self, recipe: str, person: str | None = None) -> dict[str, Any]:
        """Record that an approval no longer stands.

        Raises:
            TrustError: if none stands.
        """
        if recipe not in self.stand():
            raise errors.TrustError(f"{self.what} {recipe[:12]}: is not approved, so there is nothing to withdraw")
        return self._write(WITHDRAWN, recipe, person)

    def require_roster(self, recipe: str, roster: str) -> None:
        """Check that the standing approval of a recipe names this roster document.

        Raises:
            PolicyRefused: ``roster-pending`` if it names another one, or none.
        """
        if not roster or self.roster_of(recipe) != roster:
            raise errors.PolicyRefused(
                "roster-pending",
                f"the roster document {roster[:12] or '(none came)'} waits for a person here. Read it: fedvfm client "
                f"review {recipe[:12]}; then: fedvfm client approve {recipe} --roster {roster or 'HASH'}",
            )

    def require(self, recipe: str) -> None:
        """Check that a recipe is approved.

        Raises:
            PolicyRefused: ``approval-pending`` if it is not.
        """
        if recipe not in self.stand():
            raise errors.PolicyRefused(
                "approval-pending",
                f"{self.what} {recipe[:12]} waits for a person here. Read it: fedvfm client review {recipe[:12]}; "
                f"then: fedvfm client approve {recipe}",
            )

    def _write(
        self, event: str, recipe: str, person: str | None, more: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, Any]:
        with storage.exclusive(self.path):
            try:
                written = hash_chain.Chain(self.path)
            except errors.CheckpointError as error:
                raise errors.TrustError(f"{error}. Restore the file from a backup") from None
            before = [row for row in self._own(written.entries) if row["recipe"] == recipe]
            if before and before[-1]["event"] == event and before[-1].get("roster", "") == more.get("roster", ""):
                return before[-1]
            line = {"event": event, "recipe": recipe, "site": self.site, "who": person or who(), **more}
            return written.append({**line, "time": signed_documents.stamp(signed_documents.now())})

    def _own(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, row in enumerate(rows, start=1):
            known = row.get("event") in (APPROVED, WITHDRAWN) and isinstance(row.get("recipe"), str)
            known = known and isinstance(row.get("roster", ""), str)
            if not known or row.get("site") != self.site:
                raise errors.TrustError(
                    f"{self.path}: line {number} is no approval of site '{self.site}'. Nothing counts as approved; "
                    "restore the file from a backup"
                )
        return rows
