"""``--set key.path=VALUE``: assignments to a table of TOML values."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from fedvfm import errors


def apply(values: dict[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """Apply ``key.path=TOML value`` assignments to a copy of ``values``.

    Raises:
        ConfigError: listing every assignment that cannot be read.
    """
    result: dict[str, Any] = _copy_tables(values)
    faults = []
    for assignment in sets:
        path, equals, text = assignment.partition("=")
        steps = _steps(path) if equals else []
        value = _toml_value(text)
        if not steps:
            faults.append(f"--set {assignment}: write it as key.path=value")
        elif value is None:
            quoted = f'{path}="{text.strip()}"'
            faults.append(f"--set {assignment}: the value is not TOML; strings need quotes: --set '{quoted}'")
        elif (fault := _put(result, steps, value)) is not None:
            faults.append(f"--set {assignment}: {fault}")
    if faults:
        raise errors.ConfigError("--set", faults)
    return result


def put(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same with values of Python, by dotted key.

    Raises:
        ConfigError: listing every key that cannot be set.
    """
    result: dict[str, Any] = _copy_tables(values)
    faults = []
    for path, value in changes.items():
        steps = _steps(path)
        fault = _put(result, steps, value) if steps else "write the key as key.path"
        faults += [f"{path}: {fault}"] if fault else []
    if faults:
        raise errors.ConfigError("overrides", faults)
    return result


def _steps(path: str) -> list[str]:
    """The keys of a dotted TOML path, quoted ones (site names) included; empty if it is none."""
    try:
        table: Any = tomllib.loads(f"{path} = 0")
    except tomllib.TOMLDecodeError:
        return []
    steps = []
    while isinstance(table, dict) and len(table) == 1:
        ((key, table),) = table.items()
        steps.append(key)
    return steps if table == 0 else []


def _toml_value(text: str) -> Any:
    """The TOML value of a text, or None: TOML has no null."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return None
    return table["value"] if len(table) == 1 else None


def _put(table: dict[str, Any], steps: list[str], value: Any) -> str | None:
    """Set a value below ``table``; what is wrong, if anything."""
    inner: Any = table
    for step in steps[:-1]:
        inner = inner.setdefault(step, {})
        if not isinstance(inner, dict):
            return f"'{step}' is a value, not a table"
    inner[steps[-1]] = value
    return None


def _copy_tables(values: Any) -> Any:
    return {key: _copy_tables(value) for key, value in values.items()} if isinstance(values, dict) else values
