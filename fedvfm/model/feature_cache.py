"""What is kept of images between steps, so that nothing is computed twice: in memory, and in files beside it.

Views go round in a circle, so what was used last is what is needed latest: a full memory keeps what came first and
lets later things be computed anew, in place of throwing out exactly what is needed next. Only what nobody asks for any
longer (features of another arm's frozen blocks) makes room.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedvfm.backbones import base as backbones
from fedvfm.model import feature_counts, feature_files

MIB = 1 << 20


class FeatureCache:
    """Prepared images and features, bounded in bytes, shared by all sites of a process.

    Images are kept in memory alone: they are quick to prepare, and no copy of a patient's image goes to a disk.

    Args:
        limit: bytes in memory.
        files: a second place for features; None for none.
        files_first: whether features go to the files while there is room, so that other processes find them, and to
            memory only then; otherwise the other way round, so that nothing is written while memory is enough.
    """

    def __init__(
        self, limit: int = 0, files: feature_files.FeatureFiles | None = None, *, files_first: bool = False
    ) -> None:
        self._memory, self._files, self._files_first = _Memory(limit), files, files_first
        self._computed: set[str] = set()
        self._lock = threading.Lock()
        self.counts = feature_counts.Counts()

    @property
    def enabled(self) -> bool:
        """Whether it may hold anything."""
        return self._memory.limit > 0 or self._files is not None

    @property
    def held(self) -> int:
        """Bytes that are kept in memory."""
        return self._memory.used

    def divide(self, processes: int) -> None:
        """Take this process's share of the memory; called in each of ``processes`` that were forked from one."""
        self._memory.limit //= processes

    def image(self, key: Hashable, size: Callable[[Any], int], make: Callable[[], Any]) -> Any:
        """The kept value of ``key``, or a new one (kept if there is room for its ``size`` in bytes)."""
        found = self._memory.find("images", key)
        if found is None:
            found = make()
            with self._lock:
                self._memory.keep("images", key, found, size(found))
        return found

    def features(
        self, image: NDArray[np.float32], about: Hashable, compute: Callable[[], backbones.Prefix]
    ) -> backbones.Prefix:
        """What the frozen blocks compute of an image, with a batch axis of 1, in the CPU's memory.

        A kept one has the bits of a new one: what is kept is what ``compute`` gave.

        Args:
            image: exactly what they see, not normalised.
            about: all else that the result depends on: weights, blocks, precision, normalisation.
            compute: computes it.
        """
        name = _digest(image, about)
        found: backbones.Prefix | None = self._memory.find(about, name)
        if found is not None:
            self._count(memory=1)
            return found
        found = self._read(name)
        if found is not None:
            self._count(files=1)
            return found
        made = _on_cpu(compute())
        self._count(computed=1, again=int(name in self._computed))
        self._computed.add(name)
        if self._files_first:
            self._write(name, made) or self._hold(about, name, made)
        else:
            self._hold(about, name, made) or self._write(name, made)
        return made

    def _count(self, **more: int) -> None:
        with self._lock:
            now = {key: getattr(self.counts, key) + value for key, value in more.items()}
            self.counts = dataclasses.replace(self.counts, **now)

    def _hold(self, about: Hashable, name: str, prefix: backbones.Prefix) -> bool:
        with self._lock:
            return self._memory.keep(about, name, prefix, nbytes(prefix))

    def _read(self, name: str) -> backbones.Prefix | None:
        found = None if self._files is None else self._files.read(name)
        if found is None:
            return None
        stop, taken = int(found.pop("stop")), {}
        for key, tensor in found.items():
            if key.startswith(_TAP):
                taken[int(key.removeprefix(_TAP))] = tensor
        return backbones.Prefix(stop, found.get("hidden", taken.get(stop)), taken)  # type: ignore[arg-type]

    def _write(self, name: str, prefix: backbones.Prefix) -> bool:
        if self._files is None:
            return False
        tensors = {f"{_TAP}{tap}": tokens for tap, tokens in prefix.taken.items()}
        if prefix.taken.get(prefix.stop) is not prefix.hidden:
            tensors["hidden"] = prefix.hidden
        return self._files.write(name, {**tensors, "stop": torch.tensor(prefix.stop)})


_TAP = "taken."


def nbytes(prefix: backbones.Prefix) -> int:
    """Bytes of the tensors of a prefix, each once."""
    tensors = {id(tensor): tensor for tensor in (prefix.hidden, *prefix.taken.values())}
    return sum(tensor.element_size() * tensor.numel() for tensor in tensors.values())


def joined(prefixes: Sequence[backbones.Prefix], device: str) -> backbones.Prefix:
    """One batch on the device, in float32. A copy: nothing that computes with it can change what is kept."""

    def batch(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(device).float()

    stop = prefixes[0].stop
    taken = {tap: batch([prefix.taken[tap] for prefix in prefixes]) for tap in prefixes[0].taken}
    hidden = taken[stop] if stop in taken else batch([prefix.hidden for prefix in prefixes])
    return backbones.Prefix(stop, hidden, taken)


def _on_cpu(prefix: backbones.Prefix) -> backbones.Prefix:
    taken = {tap: tokens.cpu() for tap, tokens in prefix.taken.items()}
    same = prefix.taken.get(prefix.stop) is prefix.hidden
    return backbones.Prefix(prefix.stop, taken[prefix.stop] if same else prefix.hidden.cpu(), taken)


def _digest(image: NDArray[np.float32], about: Hashable) -> str:
    """A name for the result: equal only where image, settings and what computes are equal to the last bit.

    One and two threads, or two kinds of CPU, differ in the last bits.
    """
    here = (*_releases(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    made = hashlib.sha256(repr((about, here, image.shape)).encode())
    made.update(np.ascontiguousarray(image).data)
    return made.hexdigest()


@functools.cache
def _releases() -> tuple[str, ...]:
    """Of what computes: a run may be resumed under others."""
    return tuple(metadata.version(name) for name in ("fedvfm", "torch", "transformers"))


class _Memory:
    """A store that keeps what came first, in groups of things that are asked for together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self._turn = limit, 0, 0
        self._groups: dict[Hashable, dict[Hashable, tuple[Any, int]]] = {}
        self._asked: dict[Hashable, int] = {}

    def find(self, group: Hashable, key: Hashable) -> Any:
        """The kept value, or None."""
        self._turn += 1
        self._asked[group] = self._turn
        return self._groups.get(group, {}).get(key, (None, 0))[0]

    def keep(self, group: Hashable, key: Hashable, value: Any, need: int) -> bool:
        """Keep a value if there is room, or can be made by letting go of what nobody asks for; whether it is kept."""
        while need <= self.limit < self.used + need:
            if not self._let_go():
                break
        if self.used + need > self.limit:
            return False
        held = self._groups.setdefault(group, {})
        if key not in held:  # another thread may have been quicker
            held[key] = (value, need)
            self.used += need
        return True

    def _let_go(self) -> bool:
        """Drop one thing of a group that was not asked for while everything held could have been, once over."""
        held = sum(map(len, self._groups.values()))
        for group, members in self._groups.items():
            if members and self._turn - self._asked[group] > held:
                self.used -= members.pop(next(iter(members)))[1]
                return True
        return False
