"""Round 0: who of the wanted sites is there, with the same backbone and the same manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedvfm import errors
from fedvfm.aggregators import base
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.secure_aggregation import round_keys
from fedvfm.state import state
from fedvfm.trust import locked_recipe


@dataclass(frozen=True)
class Member:
    """A site after the handshake; ``precision`` is what it computes in, ``labelled`` the classes it labels (all: none).

    ``lacking`` are the recipe's channels that it does not have. ``without_labels`` says that it labels nothing.
    ``keys`` are those it greeted with for its next session of secure aggregation: no part of what it is.
    """

    name: str
    node: int
    manifest: state.Manifest
    examples: Mapping[str, int]
    precision: str = schema.COMPUTED_IN[0]
    keys: round_keys.Advertised | None = dataclasses.field(default=None, compare=False)
    labelled: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    without_labels: bool = False


class RollCall:
    """Takes the nodes' answers one by one; a wanted site that did not answer as it should is absent in the end.

    A node that refuses or cannot be understood has no name, so it is left out and told of: nobody who is not wanted
    can stop a federation so, and nobody who is wanted can be missed.

    Args:
        locked: recipe, manifest and first adapter.
        rule: the aggregation rule; says whether it takes a site's rank.
        wanted: names of the sites that must be there.
    """

    def __init__(self, locked: locked_recipe.LockedRecipe, rule: base.Aggregator, wanted: Collection[str]) -> None:
        self.locked, self.rule, self.wanted = locked, rule, sorted(wanted)
        self.left_out: list[str] = []
        self._members: dict[str, Member] = {}
        self._settings: dict[str, str] = {}

    def leave_out(self, node: int, why: str) -> None:
        """A node's answer is no greeting."""
        self.left_out.append(f"node {node} {why}")

    def take(self, node: int, hello: protocol.Hello) -> None:
        """A node's greeting.

        Raises:
            HandshakeRefused: if it bears a wanted name and that is taken, or what it holds differs.
        """
        if hello.site not in self.wanted:
            return
        if hello.site in self._members:
            raise errors.HandshakeRefused(f"two nodes call themselves site '{hello.site}'")
        self._members[hello.site] = member(self.locked, self.rule, node, hello)
        self._settings[hello.backbone_config_sha256] = hello.site

    def members(self) -> dict[str, Member]:
        """All wanted sites by name.

        Raises:
            HandshakeRefused: if one is absent, or two hold the backbone with different settings.
        """
        absent = [name for name in self.wanted if name not in self._members]
        if absent:
            raise errors.HandshakeRefused("; ".join([f"sites not connected: {', '.join(absent)}", *self.left_out]))
        if len(self._settings) > 1:
            raise errors.HandshakeRefused(
                f"sites {' and '.join(sorted(self._settings.values())[:2])} hold the backbone with different settings "
                "(config.json). Fetch weights and config.json again at these sites"
            )
        return self._members


def member(locked: locked_recipe.LockedRecipe, rule: base.Aggregator, node: int, hello: protocol.Hello) -> Member:
    """What a greeting says of its site, once it was checked.

    Raises:
        HandshakeRefused: if the site holds another backbone or builds another adapter.
    """
    if hello.backbone_sha256 != locked.backbone_sha256:
        raise errors.HandshakeRefused(
            f"site '{hello.site}' holds backbone {hello.backbone_sha256[:12]}, the recipe is "
            f"locked to {locked.backbone_sha256[:12]}. "
            "Fetch the same weights at that site"
        )
    if locked.backbone_config_sha256 and hello.backbone_config_sha256 != locked.backbone_config_sha256:
        raise errors.HandshakeRefused(
            f"site '{hello.site}' holds the same backbone with other settings (config.json "
            f"{hello.backbone_config_sha256[:12]}, the recipe is locked to {locked.backbone_config_sha256[:12]}): "
            "it would compute something else. Fetch weights and config.json again at that site"
        )
    if hello.codec != locked.recipe.codec:
        raise errors.HandshakeRefused(
            f"site '{hello.site}' agrees to codec '{hello.codec}', the recipe says '{locked.recipe.codec}'. Install "
            "the same fedvfm at both ends"
        )
    known = locked.recipe.data.class_names if locked.recipe.task.partial_labels else ()
    strange = set(hello.labelled) - set(locked.recipe.data.class_names)
    if strange or len(hello.labelled) > len(known):
        raise errors.HandshakeRefused(
            f"site '{hello.site}' names {len(hello.labelled)} classes that it labels, {len(strange)} of them not the "
            f"recipe's; the recipe asks for {len(known)} at most. Correct labelled in its site.toml"
        )
    if hello.without_labels and (locked.recipe.unlabelled is None or hello.labelled):
        raise errors.HandshakeRefused(
            f"site '{hello.site}' has no labels, and the recipe takes no such site. Correct role in its site.toml, or "
            "lock a recipe with [recipe.unlabelled]"
        )
    others = set(hello.lacking) - set(locked.recipe.data.optional_channels)
    if others or len(hello.lacking) > len(locked.recipe.data.optional_channels):
        raise errors.HandshakeRefused(
            f"site '{hello.site}' lacks {len(hello.lacking)} channels, {len(others)} of them none that the recipe's "
            "data.optional_channels allows. Correct [data.channels] in its site.toml"
        )
    manifest = at_rank(locked.manifest, hello.rank)
    if hello.manifest_fingerprint != manifest.fingerprint:
        raise errors.HandshakeRefused(
            f"site '{hello.site}' builds another adapter from this recipe; install the same fedvfm at both ends"
        )
    rule.for_site(locked.adapter, manifest)
    own = hello.keys if hello.keys is not None and hello.keys.site == hello.site else None
    said = (hello.labelled, hello.lacking, hello.without_labels)
    return Member(hello.site, node, manifest, hello.examples, hello.precision, own, *said)


def at_rank(manifest: state.Manifest, rank: int) -> state.Manifest:
    """The manifest with every low-rank pair at ``rank``; alpha stays, so the scale becomes alpha / rank."""
    rows = []
    for spec in manifest:
        if not spec.pair:
            rows.append(spec)
            continue
        own = spec.shape[0] if spec.role == "A" else spec.shape[1]
        shape = (rank, spec.shape[1]) if spec.role == "A" else (spec.shape[0], rank)
        rows.append(dataclasses.replace(spec, shape=shape, scale=spec.scale * own / rank))
    return state.Manifest.of(rows)
