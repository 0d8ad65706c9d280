"""``--plugin FILE``: a person's own Python file, which registers parts before a simulation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema

ENGINE = "in-process"


def load(paths: Sequence[Path]) -> None:
    """Run these files once each. They run with the rights of whoever calls, like any script.

    Raises:
        ConfigError: listing every file that is none, or breaks.
    """
    faults = [fault for path in paths if (fault := _fault(path))]
    if faults:
        raise errors.ConfigError("--plugin", faults)


def _fault(path: Path) -> str:
    if path.suffix != ".py" or not path.is_file():
        return f"{path}: give a Python file (.py) that is there"
    name = f"fedvfm_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return f"{path}: cannot be read as Python"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except errors.FedvfmError as error:
        return f"{path}: {error}"
    except Exception as error:  # of the person's own code
        line = getattr(error.__traceback__ and error.__traceback__.tb_next, "tb_lineno", None)
        return f"{path}: {type(error).__name__}: {error}{f' (line {line})' if line else ''}"
    return ""


def require_engine(what: schema.Experiment, paths: Sequence[Path]) -> None:
    """Refuse engines whose other processes would not know what was registered here.

    Raises:
        ConfigError: naming the one that does.
    """
    if paths and what.engine != ENGINE:
        why = f"only engine '{ENGINE}' knows what a file registers, not '{what.engine}'"
        raise errors.ConfigError("--plugin", [f"{why}; take that, or install a package with entry points"])
