"""AdapterState, Manifest and SiteUpdate: immutable named arrays and what describes them. NumPy only."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from fedvfm import errors

Array = NDArray[np.float32]

ROLES = ("A", "B", "dense")


_Name = Annotated[str, Field(min_length=1, max_length=200, strict=True)]
_Side = Annotated[int, Field(ge=0, le=10**9, strict=True)]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a manifest.

    Attributes:
        name: the wire name, ours and stable (``block.03.q.A``).
        shape: its shape.
        group: what it belongs to (``"lora"``, ``"norm"``, ``"bias"``, ``"head"``, ``"decoder"``).
        role: ``"A"`` or ``"B"`` for the factors of a low-rank pair, ``"dense"`` for all else.
        pair: the name both factors of a pair share (``block.03.q``), else empty.
        scale: alpha / rank of the pair, 1 for dense arrays.
        dtype: always ``"float32"`` on the wire.

    The bounds of each field are those of a file; see :class:`fedvfm.trust.locked_recipe.LockedRecipe`.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    name: _Name
    shape: Annotated[tuple[_Side, ...], Field(max_length=8)]
    group: _Name
    role: Annotated[str, Field(pattern="^(A|B|dense)$", strict=True)] = "dense"
    pair: Annotated[str, Field(max_length=200, strict=True)] = ""
    scale: Annotated[float, Field(strict=True)] = 1.0
    dtype: Annotated[str, Field(pattern="^float32$", strict=True)] = "float32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Manifest:
    """The exact list of arrays an AdapterState holds, sorted by name."""

    arrays: tuple[ArraySpec, ...]

    @staticmethod
    def of(arrays: Iterable[ArraySpec]) -> Manifest:
        """Sort by name and check names and roles.

        Raises:
            ProtocolError: on a repeated name or an unknown role.
        """
        ordered = tuple(sorted(arrays, key=lambda spec: spec.name))
        names = [spec.name for spec in ordered]
        if len(set(names)) != len(names):
            raise errors.ProtocolError("manifest: an array name is repeated")
        for spec in ordered:
            if spec.role not in ROLES or spec.dtype != "float32":
                raise errors.ProtocolError(
                    f"manifest: array '{spec.name}' has role {spec.role!r}, dtype {spec.dtype!r}"
                )
        return Manifest(ordered)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values for JSON."""
        return [spec.to_json() for spec in self.arrays]

    def __iter__(self) -> Iterator[ArraySpec]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(spec.size for spec in self.arrays)

    def fits(self, arrays: Mapping[str, Array]) -> bool:
        """Whether these are exactly the arrays of the list, by name and shape."""
        return {name: array.shape for name, array in arrays.items()} == {spec.name: spec.shape for spec in self}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in float32."""
        return 4 * self.parameters

    def pairs(self) -> dict[str, tuple[ArraySpec, ArraySpec]]:
        """Pair name -> (A, B), sorted by pair name."""
        found: dict[str, dict[str, ArraySpec]] = {}
        for spec in self.arrays:
            if spec.pair:
                found.setdefault(spec.pair, {})[spec.role] = spec
        return {pair: (both["A"], both["B"]) for pair, both in sorted(found.items())}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over every field of every row, in order; asked for every site in every round, computed once."""
        digest = hashlib.sha256()
        for spec in self.arrays:
            digest.update(repr(tuple(spec.to_json().items())).encode())
        return digest.hexdigest()


class AdapterState(Mapping[str, Array]):
    """Immutable named float32 arrays with vector arithmetic.

    Names iterate in sorted order. The arrays are read-only views, no copies: whoever hands one in writes to it no more.
    Arithmetic makes new states; two states are equal if names and bytes are.

    Raises:
        ProtocolError: if an array is not float32.
    """

    __slots__ = ("_arrays", "_fingerprint")

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        kept: dict[str, Array] = {}
        for name in sorted(arrays):
            array = np.asarray(arrays[name])
            if array.dtype != np.float32:
                raise errors.ProtocolError(f"array '{name}' is {array.dtype}, only float32 travels")
            view = array.view()
            view.flags.writeable = False
            kept[name] = view
        self._arrays = kept
        self._fingerprint = ""

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterState) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def _with(self, other: AdapterState, combine: Callable[[Array, Array], Array]) -> AdapterState:
        if list(self) != list(other):
            raise errors.ProtocolError("the two states do not hold the same arrays")
        return AdapterState({name: combine(self[name], other[name]) for name in self})

    def __add__(self, other: AdapterState) -> AdapterState:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: AdapterState) -> AdapterState:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> AdapterState:
        return AdapterState({name: array * np.float32(factor) for name, array in self.items()})

    __rmul__ = __mul__

    def norm(self) -> float:
        """Euclidean norm over all arrays, summed in float64."""
        return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in self.values()))

    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(np.isfinite(array).all()) for array in self.values())

    @property
    def parameters(self) -> int:
        """Number of numbers."""
        return sum(array.size for array in self.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of names, shapes and little-endian bytes; computed once."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for name, array in self.items():
                digest.update(f"{name}\x1f{array.shape}\x1f".encode())
                digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def select(self, names: Iterable[str]) -> AdapterState:
        """The state with only these arrays."""
        return AdapterState({name: self[name] for name in names})

    def __repr__(self) -> str:
        return f"AdapterState({len(self)} arrays, {self.parameters} numbers, {self.fingerprint[:12]})"


@dataclass(frozen=True, slots=True)
class SiteUpdate:
    """What a site sends after training.

    Attributes:
        site: the site's name.
        state: the site's adapter after training (not the difference).
        num_examples: training examples the site claims.
        base_round: the round whose global adapter training started from.
        base_fingerprint: that adapter's fingerprint.
        extra: further named arrays a rule asks for (SCAFFOLD's controls).
        metrics: plain numbers about training (loss, seconds).
    """

    site: str
    state: AdapterState
    num_examples: int
    base_round: int
    base_fingerprint: str
    extra: Mapping[str, Array] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
