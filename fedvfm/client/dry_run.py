"""A rehearsal: one real round on the site's own data, offline, and a list of every byte that would leave.

Messages are made here as a coordinator makes them and go the way of real ones: serialised, through the gate, under the
site's terms, to the ClientApp of the installed package and back. Only where they would be handed to the SuperNode they
are listed instead. What the terms note goes to a folder that is thrown away, so a rehearsal uses up no rounds or hours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import app as client_app
from fedvfm.client import privacy_report, recipe_review, state_folder
from fedvfm.client.adoption import adoption
from fedvfm.client.batch import jobs
from fedvfm.client.gate import enforcement, gate, policy, privacy_charge, reply_cache, split_pin
from fedvfm.client.process import limits
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.flower import internals
from fedvfm.model import device_check, precision
from fedvfm.protocol import protocol
from fedvfm.state import control_variates, factors, state
from fedvfm.storage import hash_chain
from fedvfm.trust import locked_recipe, signed_documents

NODE = 1
TTL_S = 12 * 3600.0
LAYOUT = "layout"


@dataclass(frozen=True)
class Array:
    """An array as it would leave; ``dtype`` is that of the numbers on the wire."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Reply:
    """One message that would leave the site.

    Attributes:
        kind: what it answers.
        seconds: from the message's arrival to the reply.
        bytes: of the whole as Flower serialises it.
        sha256: of the same.
        header: every field that is neither a number of a metric nor an array, by record and name.
        numbers: every number, by record and name.
        withheld: metrics that were computed and stay here.
        arrays: what the adapter's numbers are of.
        array_bytes: of the arrays as they travel, with their own headers.
        fingerprint: of the adapter in it.
    """

    kind: str
    seconds: float
    bytes: int
    sha256: str
    header: dict[str, Any]
    numbers: dict[str, Any]
    withheld: tuple[str, ...]
    arrays: tuple[Array, ...]
    array_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Rehearsal:
    """What a round would send, and what it cost.

    Attributes:
        approved: whether a person here approved the recipe; None before the site joined.
        precision: what it computed in, and why.
        open_now: whether the policy's hours allow a real round at this time.
        peak_mib: of this process's memory; ``gpu_mib`` of the GPU's.
        privacy: what the recipe's mechanism comes to here; None without one. A rehearsal charges nothing.
        training: what a round's update is made of here.
    """

    site: str
    recipe: str
    device: str
    precision: str
    approved: bool | None
    open_now: bool
    replies: tuple[Reply, ...]
    peak_mib: float
    gpu_mib: float
    privacy: privacy_report.Here | None = None
    training: str = ""

    @property
    def bytes(self) -> int:
        """Of all messages."""
        return sum(reply.bytes for reply in self.replies)

    @property
    def seconds(self) -> float:
        """Of all messages."""
        return round(sum(reply.seconds for reply in self.replies), 3)

    def to_json(self) -> dict[str, Any]:
        """All of it for scripts."""
        return {**dataclasses.asdict(self), "bytes": self.bytes, "seconds": self.seconds}


class _Terms(enforcement.SiteTerms):
    """The site's own terms at any hour: a rehearsal is a person's doing, and nobody waits for it.

    Nobody else takes part either, so an update is listed as it is before it is masked.
    """

    masks = False

    def __init__(self, listed: virtual_hospitals.Hospital | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._listed = listed

    def _hospital(self, config: schema.SiteConfig, recipe: schema.Recipe) -> virtual_hospitals.Hospital:
        return self._listed or super()._hospital(config, recipe)

    def account(self, task: protocol.Task) -> privacy_charge.Account:
        """Nothing is charged: the update is trained with its noise as a real one, and then thrown away."""
        return _NoAccount()

    def score_account(self, task: protocol.Task, *spent: Any) -> privacy_charge.Account:
        """Nor for scores, which have their noise too."""
        return _NoAccount()


class _NoAccount(privacy_charge.Account):
    """Charges nothing."""

    def __init__(self) -> None:
        """Of no ledger."""

    @property
    def mark(self) -> hash_chain.Mark:
        """As long as a real one."""
        return hash_chain.Mark(1, hash_chain.ZERO)

    @contextlib.contextmanager
    def hold(self) -> Iterator[privacy_charge.Reserved]:
        """Nothing is reserved."""
        yield _NoHold()


class _NoHold:
    """Reserves nothing."""

    token = ""

    def charge(self, update: str) -> None:
        """Nothing is charged."""


@dataclass
class _Site:
    """The site as messages meet it; ``initial`` and ``correction`` are what round 1 begins with."""

    gate: gate.Gate
    initial: Callable[[], state.AdapterState]
    correction: Callable[[], state.AdapterState | None]
    training: Callable[[], str]
    computed: dict[str, RecordDict] = field(default_factory=dict)
    faults: list[Exception] = field(default_factory=list)

    def ask(self, kind: str, task: protocol.Task) -> tuple[Message, float]:
        """The reply as it would arrive, and how long it took.

        Raises:
            Exception: whatever the site would have answered with a word.
        """
        message = Message(protocol.encode_task(task), NODE, kind, ttl=TTL_S, group_id=str(task.round))
        internals.set_message_id(message, f"{kind}-{task.round}")
        started = time.monotonic()
        reply = self.gate(internals.copy(message), internals.context(1, NODE, {}))
        seconds = round(time.monotonic() - started, 3)
        if reply.has_error():
            raise self.faults[-1] if self.faults else errors.ProtocolError(protocol.error_word(reply))
        return internals.copy(reply), seconds


def run(
    site: schema.SiteConfig,
    locked: locked_recipe.LockedRecipe,
    judged: privacy_report.Judged,
    where: state_folder.State | None = None,
) -> Rehearsal:
    """Rehearse a round of a recipe.

    Args:
        site: the site's own file.
        locked: the recipe.
        judged: the same under the site's policy.
        where: the state folder of a site that joined; its audit log gets one line.

    Raises:
        PolicyRefused: if the site's policy does not accept the recipe.
        DataError, WeightsError, TrainingError: as the round itself would.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    judged.require()
    if where is not None:
        split_pin.require(where, split_pin.of(locked.hash, site))
    privacy_charge.require(locked.recipe, site.privacy)
    device = "cpu" if site.batch is not None else device_check.first((site.device, *site.spare_devices))
    limits.apply(site.limits, device)
    beside = None if where is None else where.folder
    with tempfile.TemporaryDirectory(prefix=state_folder.REHEARSAL, dir=beside, ignore_cleanup_errors=True) as folder:
        asked = _site(_throwaway(Path(folder), site.name), site, locked, judged, device)
        replies = tuple(_round(asked, locked.recipe))
        training = asked.training()
    approved = None if where is None else locked.hash in where.approvals.stand()
    closed = site.policy.when is not None and policy.remaining(site.policy, audit.Usage()).seconds == 0
    computed = precision.words(locked.recipe.precision, device)
    cost, here = (_peak_mib(), _gpu_mib(device)), judged.here
    found = Rehearsal(site.name, locked.hash, device, computed, approved, not closed, replies, *cost, here, training)
    if where is not None:
        where.audit.record("rehearsed", recipe=locked.hash, bytes=found.bytes, seconds=found.seconds)
    return found


def _throwaway(folder: Path, site: str) -> state_folder.State:
    """A state folder as joining makes it, for what the terms write."""
    about = state_folder.About(
        federation="rehearsal",
        address="127.0.0.1:1",
        site=site,
        fingerprint="",
        joined=signed_documents.stamp(signed_documents.now()),
    )
    return state_folder.State(folder, about)


def _site(
    where: state_folder.State,
    site: schema.SiteConfig,
    locked: locked_recipe.LockedRecipe,
    judged: privacy_report.Judged,
    device: str,
) -> _Site:
    where.remember(locked)
    state_folder.approve(where, locked)
    # What this machine locked itself is what it builds.
    build = (lambda _: locked) if locked.holds_adapter else enforcement.built_here
    at_any_hour = site.policy.model_copy(update={"hours": None, "time_zone": ""})
    mine = _Terms(judged.hospital, where, site.model_copy(update={"policy": at_any_hour}), device, build)
    built = client_app.Models(threads=site.limits.threads)
    faults: list[Exception] = []
    computed: dict[str, RecordDict] = {}
    app = client_app.make_client_app(
        mine.site,
        built,
        lambda at, error: faults.append(error),
        adoption.Finals(where, lambda: mine.config.policy),
        elsewhere=jobs.Jobs(lambda: mine.judged) if site.batch is not None else None,
    )

    def listening(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if not reply.has_error():
            computed["last"] = reply.content
        return reply

    kept = reply_cache.Sent(where.sent)
    door = gate.Gate(listening, kept, mine, lambda at, error: faults.append(error))
    internals.be_server_task(1)
    recipe = sites.at_rank(locked.recipe, site.rank, site.name)

    def initial() -> state.AdapterState:
        return mine.lineage(locked.recipe, kept.adapters).first() or built.get(recipe, device).initial()

    def correction() -> state.AdapterState | None:
        manifest = mine.lineage(locked.recipe, kept.adapters).manifest
        return control_variates.first(manifest, locked.recipe, 1)

    def training() -> str:
        images = mine.site(internals.context(1, NODE, {})).split("train")
        return recipe_review.steps_here(locked.recipe, len({one.subject for one in images}), len(images))

    return _Site(door, initial, correction, training, computed, faults)


def _round(site: _Site, recipe: schema.Recipe) -> Iterator[Reply]:
    """Handshake, training, validation where the recipe asks for it, and the test of the final adapter."""
    first = protocol.Task(recipe)
    reply, seconds = site.ask(protocol.HANDSHAKE, first)
    yield listed("handshake, once", reply, seconds, ())
    hello = protocol.decode_hello(reply.content)
    base = site.initial()
    reply, seconds = site.ask(protocol.TRAIN, protocol.Task(recipe, 1, base, correction=site.correction()))
    update = protocol.decode_update(reply.content, base)
    adapter = factors.completed(update.state, base)
    before = protocol.decode_update(site.computed["last"], base).metrics
    often = "odd round; even ones send A for B" if recipe.adapter.factors == factors.ALTERNATE else "round"
    yield listed(f"update, every {often}", reply, seconds, _withheld(before, update.metrics), base)
    asked = [("test of the final adapter, once", protocol.Task(recipe, recipe.rounds, adapter, "test",
              recipe.evaluation.surface, final=True))]  # fmt: skip
    if recipe.evaluation.every and hello.examples.get("val", 0):
        asked.insert(0, ("validation", protocol.Task(recipe, 1, adapter, "val")))
    for kind, task in asked:
        reply, seconds = site.ask(protocol.EVALUATE, task)
        free = protocol.decode_evaluation(reply.content).metrics
        before = protocol.decode_evaluation(site.computed["last"], inside=True).metrics
        yield listed(kind, reply, seconds, _withheld(before, free))


def _withheld(computed: Any, free: Any) -> tuple[str, ...]:
    return tuple(sorted(set(computed) - set(free)))


def listed(
    kind: str, reply: Message, seconds: float, withheld: tuple[str, ...], base: state.AdapterState | None = None
) -> Reply:
    """Every record of a reply, whatever it holds; nothing is left out because it is not expected.

    ``base`` is the adapter that an update may be a difference to.
    """
    content, whole = reply.content, internals.serialise(reply)
    header: dict[str, Any] = {}
    for record, fields in content.config_records.items():
        header |= {f"{record}.{name}": value for name, value in fields.items()}
    numbers: dict[str, Any] = {}
    for record, values in content.metric_records.items():
        numbers |= {f"{record}.{name}": value for name, value in values.items()}
    packed = [array for record in content.array_records.values() for array in record.values()]
    parts: tuple[Array, ...] = ()
    fingerprint = ""
    if packed:
        adapter = protocol.decode_update(content, base).state
        parts = tuple(Array(name, one.shape, str(one.dtype), one.nbytes) for name, one in adapter.items())
        fingerprint = adapter.fingerprint
    size = sum(len(array.data) for array in packed)
    sha256 = hashlib.sha256(whole).hexdigest()
    return Reply(kind, seconds, len(whole), sha256, header, numbers, withheld, parts, size, fingerprint)


def _peak_mib() -> float:
    """Peak memory of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1024 / (1024 if sys.platform == "darwin" else 1), 1)


def _gpu_mib(device: str) -> float:
    import torch

    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.startswith("cuda") else 0.0


def lines(found: Rehearsal) -> list[str]:
    """What a person reads."""
    rows = [
        f"site {found.site}, recipe {found.recipe}, device {found.device}; nothing was sent",
        f"precision: {found.precision}",
        f"training: {found.training}",
        "",
    ]
    for reply in found.replies:
        rows += _lines(reply)
    rows.append(
        f"total: {found.bytes:,} bytes in {len(found.replies)} messages, {found.seconds:.1f} s, peak memory "
        f"{found.peak_mib:,.0f} MiB" + (f", of the GPU {found.gpu_mib:,.0f} MiB" if found.gpu_mib else "")
    )
    rows.append(
        "Besides, Flower's SuperNode sends what every node does: its public key, signatures with the time, heartbeats, "
        "and the numbers of node, run and message."
    )
    if found.privacy is not None:
        rows += [f"privacy: {text}" for text in privacy_report.words(found.privacy)]
        rows.append("privacy: the rehearsal trained with fresh noise and charged nothing; a real round is charged")
    if found.approved is False:
        rows.append(f"note: no person here approved this recipe yet: fedvfm client approve {found.recipe}")
    if not found.open_now:
        rows.append("note: it is outside policy.hours now; a real message would be refused with 'policy-closed'")
    return rows


def _lines(reply: Reply) -> list[str]:
    rows = [f"{reply.kind}: {reply.bytes:,} bytes, {reply.seconds:.1f} s, sha256 {reply.sha256}"]
    width = max((len(name) for name in (*reply.header, *reply.numbers, *(one.name for one in reply.arrays))), default=0)
    for name, value in {**reply.header, **reply.numbers}.items():
        rows.append(f"  {name:{width}}  {_shown(name, value)}")
    for one in reply.arrays:
        shape = " x ".join(map(str, one.shape))
        rows.append(f"  {one.name:{width}}  {one.dtype} {shape}, {one.bytes:,} bytes")
    if reply.arrays:
        rows.append(f"  {len(reply.arrays)} arrays, {reply.array_bytes:,} bytes, fingerprint {reply.fingerprint}")
    if reply.withheld:
        rows.append(f"  held back by the policy: {', '.join(reply.withheld)}")
    left = reply.bytes - reply.array_bytes
    return [
        *rows,
        f"  {left:,} bytes are the fields and the framing of the message",
        "",
    ]


def _shown(name: str, value: Any) -> str:
    if value in ("", []):
        return "(empty)"
    if name.endswith(f".{LAYOUT}"):
        return f"names and shapes of the arrays below, {len(str(value)):,} characters"
    return signed_documents.shown(f"{value:.6g}" if isinstance(value, float) else str(value))
