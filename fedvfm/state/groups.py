"""Which arrays of an adapter all sites share and which are each site's own: ``recipe.personal``. No torch.

Partial personalisation: a site trains all arrays together in every round. The shared ones leave and are joined; the
personal ones stay at the site and it goes on from them. In the global adapter a personal array is what it was in the
first adapter, so that a site which was in no round has a defined one too.

- ``head-local``: the head and the parts of a mask decoder are personal (FedPer).
- ``norm-local``: scale and shift of every normalisation layer that trains are personal (FedBN).
- ``share-A``: of every low-rank pair B is personal (FedSA-LoRA).
- ``by-part``: of every pair in the encoder A is personal, of every pair in a mask decoder B (IAT).

What is in none of these groups is shared.

Two kinds are trained *beside* the shared adapter: in every round a site first trains that one, as if there were no
personal kind, and then its own. So what leaves does not depend on what stays, bit for bit.

- ``ditto``: a whole adapter v, trained on the site's loss plus ``lambda / 2 ||v - w||^2``, w being the global adapter
  as the round began with it. It begins as the first one that came.
- ``dual``: a second pair beside every pair (``adapter.options.personal`` is its rank), trained on the loss of the sum
  of both, with the global adapter of the round as it came.

Source: Pillutla et al., "Federated Learning with Partial Model Personalization", ICML 2022, alg. 3 (FedSim: all arrays
    train together); Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv:1912.00818, 2019
    (FedPer); Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021; Guo
    et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025 (FedSA-LoRA); Li et al.,
    "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, alg. 1; Yang et al.,
    "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024 (FedDPA, of which the iterative form,
    FedDPA-T).
"""

from __future__ import annotations

from fedvfm.config import privacy, schema
from fedvfm.state import factors, state

NONE, HEAD_LOCAL, NORM_LOCAL, SHARE_A, BY_PART = "none", "head-local", "norm-local", "share-A", "by-part"
DITTO, DUAL = "ditto", "dual"
KINDS = {
    NONE: "",
    HEAD_LOCAL: "the head and the decoder parts",
    NORM_LOCAL: "scale and shift of the normalisation layers",
    SHARE_A: "B of every pair",
    BY_PART: "A of every pair in the encoder, B of every pair in the decoder",
    DITTO: "a whole adapter beside the global one",
    DUAL: "a second pair beside every pair",
}
"""Kind -> what is personal, for people."""
SPLITS_PAIRS = (SHARE_A, BY_PART)
"""Kinds under which one factor of a pair is shared and the other one is personal."""
BESIDE = (DITTO, DUAL)
"""Kinds whose personal arrays train beside the shared adapter and have no part in what leaves."""
BARE = "Part of it was trained without noise: no differential privacy"
"""Said of an adapter with arrays of which :func:`bare` holds."""
HEAD_GROUPS = ("head", "decoder")
"""Groups of a manifest that are the head and its like; their learning rate may be another."""


def personal(manifest: state.Manifest, kind: str) -> frozenset[str]:
    """Names of the arrays that never leave a site; under ``ditto`` none: its arrays have the names of the shared ones.

    Args:
        manifest: every array of the adapter.
        kind: ``recipe.personal.kind``.

    Raises:
        ValueError: if the kind is none of :data:`KINDS`; nothing leaves by a kind that is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"personal kind '{kind}': known: {', '.join(KINDS)}")
    if kind in (NONE, DITTO):
        return frozenset()
    if kind == NORM_LOCAL:
        return _of_norms(manifest)
    return frozenset(spec.name for spec in manifest if _stays(spec, kind))


def _stays(spec: state.ArraySpec, kind: str) -> bool:
    if kind == HEAD_LOCAL:
        return spec.group in HEAD_GROUPS
    if kind == DUAL:
        return spec.group == factors.OWN
    if kind == SHARE_A:
        return spec.role == "B"
    return spec.role == ("B" if spec.name.startswith("decoder.") else "A")


def _of_norms(manifest: state.Manifest) -> frozenset[str]:
    """Scale and shift: a weight of one dimension beside a bias of the same shape; only normalisation layers have both.

    A normalisation layer of which the bias alone trains (adapter kind ``bias``) is not among them.
    """
    shapes = {spec.name: spec.shape for spec in manifest if spec.role == "dense"}
    scales = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 1]
    pairs = [(name, f"{name.removesuffix('weight')}bias") for name in scales]
    return frozenset(name for scale, bias in pairs if shapes.get(bias) == shapes[scale] for name in (scale, bias))


def kept(manifest: state.Manifest, kind: str) -> frozenset[str]:
    """Names of the arrays that each site keeps from round to round; :func:`joined` puts them in place.

    Raises:
        ValueError: as :func:`personal`.
    """
    if kind == DITTO:
        return frozenset(spec.name for spec in manifest if spec.group not in factors.STILL)
    return personal(manifest, kind)


def leaving(manifest: state.Manifest, recipe: schema.Recipe, round_number: int) -> tuple[str, ...]:
    """Names of the arrays that leave a site after a round: those that train in it and are shared; sorted.

    Args:
        manifest: every array of the adapter.
        recipe: says which factors train and what is personal.
        round_number: from 1.
    """
    own = personal(manifest, recipe.personal.kind)
    trained = factors.trained(manifest, recipe.adapter.factors, round_number)
    return tuple(name for name in trained if name not in own)


def moving(manifest: state.Manifest, recipe: schema.Recipe, round_number: int) -> tuple[str, ...]:
    """Names of the arrays that differ in the next global adapter: those that leave, and the residuals; sorted."""
    kept = {spec.name for spec in manifest if spec.group == factors.RESIDUAL}
    return tuple(sorted(kept.union(leaving(manifest, recipe, round_number))))


def leaving_numbers(manifest: state.Manifest, recipe: schema.Recipe, round_number: int) -> int:
    """How many numbers leave a site after a round."""
    return _numbers(manifest, leaving(manifest, recipe, round_number))


def personal_numbers(manifest: state.Manifest, recipe: schema.Recipe) -> int:
    """How many numbers stay at each site."""
    return _numbers(manifest, kept(manifest, recipe.personal.kind))


def _numbers(manifest: state.Manifest, names: tuple[str, ...] | frozenset[str]) -> int:
    chosen = set(names)
    return sum(spec.size for spec in manifest if spec.name in chosen)


def faults(manifest: state.Manifest, recipe: schema.Recipe) -> list[str]:
    """Why this kind has no meaning for these arrays, one sentence a fault."""
    kind, way = recipe.personal.kind, recipe.adapter.factors
    where = f"recipe.personal.kind = '{kind}'"
    if kind != DUAL and any(spec.group == factors.OWN for spec in manifest):
        return [
            f"{where}: nothing would train the second pairs of recipe.adapter.options.personal; leave them out, or use "
            f"personal.kind = '{DUAL}'"
        ]
    if kind in (NONE, DITTO):
        return []
    if kind in SPLITS_PAIRS and way != factors.BOTH:
        return [
            f"{where}: recipe.adapter.factors = '{way}' says which factor of a pair trains, and this kind which one "
            'leaves; use factors = "both"'
        ]
    if kind == DUAL and not personal(manifest, kind):
        return [
            f"{where}: the adapter has no second pairs; use adapter kind 'lora' and set "
            "recipe.adapter.options.personal to their rank, such as recipe.adapter.rank"
        ]
    if not personal(manifest, kind):
        return [f"{where}: the adapter has no such array ({KINDS[kind]}); leave it out, or use another kind"]
    if any(not leaving(manifest, recipe, number) for number in (1, 2)):
        return [f"{where}: nothing that trains would be shared; leave it out, or use another adapter kind"]
    return []


def told(manifest: state.Manifest, recipe: schema.Recipe) -> str:
    """How much leaves in a round, for people."""
    odd, even = (leaving_numbers(manifest, recipe, number) for number in (1, 2))
    size = f"{4 * max(odd, even) / 1e6:,.2f} MB"
    rows = f"{odd:,} trained numbers ({size})"
    if odd != even:
        rows = f"{odd:,} trained numbers in odd rounds, {even:,} in even ones (at most {size})"
    own = personal_numbers(manifest, recipe)
    return f"{rows}; {own:,} more train and never leave this site" if own else rows


def describe(recipe: schema.Recipe) -> str:
    """What is personal, for people; empty where all of the adapter is shared."""
    kind = recipe.personal.kind
    if kind in BESIDE:
        bare = "" if recipe.privacy.mechanism == privacy.NO_MECHANISM else ", trained without noise"
        return f"personal ({kind}): {KINDS[kind]} stays at each site and never leaves it{bare}"
    return "" if kind == NONE else f"personal ({kind}): {KINDS[kind]} stay at each site and never leave it"


def bare(recipe: schema.Recipe) -> bool:
    """Whether what a site keeps for itself is made of its records without the noise of the recipe's mechanism.

    The steps of a mechanism at the sites bound and noise personal arrays too. One at site level, or with shared noise,
    noises what leaves alone; and what trains beside the shared adapter has no mechanism.
    """
    kind, mechanism = recipe.personal.kind, recipe.privacy.mechanism
    if kind == NONE or mechanism == privacy.NO_MECHANISM:
        return False
    return kind in BESIDE or mechanism in {privacy.SITE_LEVEL, *privacy.SHARED}


def joined(
    adapter: state.AdapterState, own: dict[str, state.Array], manifest: state.Manifest, kind: str
) -> state.AdapterState:
    """The adapter as one site uses it: shared arrays from ``adapter``, the site's own in place of the personal ones.

    Args:
        adapter: as it came; its personal arrays are first values.
        own: what the site trained; empty where it was in no round yet.
        manifest: every array of the adapter, in the site's own rank.
        kind: ``recipe.personal.kind``.

    Raises:
        ValueError: if these are other arrays than the personal ones.
    """
    if not own:
        return adapter
    shapes = {spec.name: spec.shape for spec in manifest}
    wanted = {name: shapes[name] for name in kept(manifest, kind)}
    if {name: array.shape for name, array in own.items()} != wanted:
        raise ValueError(f"{len(own)} arrays are kept and {len(wanted)} are personal, or their shapes differ")
    return state.AdapterState({**adapter, **own})
