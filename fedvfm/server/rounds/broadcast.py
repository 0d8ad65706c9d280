"""Adapters down to the sites, by the recipe's codec: who holds what, and what coding the last step lost.

Under a codec the global adapter *is* what the sites can make of the coded steps: after each round the step is coded,
and the adapter moves by what the code says. What that loses is kept beside the adapter in the checkpoint and added to
the next step (error feedback). So journal, checkpoint and sites name one adapter, and a whole one can take the place of
a difference anywhere without changing a bit.

A site gets a difference only if it answered about the adapter that the difference is to. It gets the whole adapter
where it has not been seen in this process, missed a round, failed, has a rank of its own, or says that it does not hold
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from fedvfm import errors
from fedvfm.protocol import codecs
from fedvfm.server.rounds import handshake
from fedvfm.state import state

_RESIDUAL = "codec."


class Broadcast:
    """Of one federation.

    Args:
        codec: the recipe's.
        manifest: of the global adapter.
    """

    def __init__(self, codec: str, manifest: state.Manifest) -> None:
        self._codec, self._manifest = codec, manifest
        self._step: codecs.Difference | None = None
        self._holds: dict[str, str] = {}

    def moved(
        self,
        before: state.AdapterState,
        after: state.AdapterState,
        kept: Mapping[str, state.Array],
        trained: Collection[str],
    ) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The adapter that the sites can make of the step from ``before`` to ``after``, and what that loses.

        Args:
            before: the global adapter of the round.
            after: where the server's step goes.
            kept: what the server kept; the residual of the round before is in it.
            trained: names of the arrays that trained; no other moves.

        Raises:
            TrainingError: if the step holds NaN or infinity.
        """
        if self._codec == codecs.PLAIN:
            return after, {}
        residual = {name.removeprefix(_RESIDUAL): array for name, array in kept.items() if name.startswith(_RESIDUAL)}
        try:
            coded = codecs.encode(self._codec, after.select(trained), before, residual)
        except ValueError as error:
            raise errors.TrainingError(f"the server's step: {error}. Lower the learning rates") from None
        held = state.AdapterState({**before, **coded.after})
        self._step = dataclasses.replace(coded.difference, target=held.fingerprint)
        return held, {_RESIDUAL + name: array for name, array in coded.residual.items()}

    def difference(self, member: handshake.Member, adapter: state.AdapterState) -> codecs.Difference | None:
        """What a site is sent in place of an adapter; None for the whole one.

        Args:
            member: the site.
            adapter: in its shapes.
        """
        if self._codec == codecs.PLAIN:
            return None
        held, wanted = self._holds.get(member.name, ""), adapter.fingerprint
        if held == wanted:
            return codecs.Difference(self._codec, held, wanted, {}, b"")
        step = self._step
        same = member.manifest.fingerprint == self._manifest.fingerprint
        return step if step is not None and same and (held, wanted) == (step.base, step.target) else None

    def holds(self, site: str, fingerprint: str) -> None:
        """A site answered about this adapter."""
        if self._codec != codecs.PLAIN:
            self._holds[site] = fingerprint

    def forget(self, site: str) -> None:
        """It is not known what a site holds."""
        self._holds.pop(site, None)
