"""TensorBoard: event files in a folder, one subfolder a run. Written by the package tensorboard; no TensorFlow."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm.tracking import base


class TensorBoard:
    """Writes event files.

    Args:
        target: the folder; ``tensorboard --logdir`` takes it.
    """

    def __init__(self, target: str) -> None:
        self._folder = Path(target)
        self._writers: dict[str, Any] = {}

    def begin(self, run: base.Run, known: str) -> str:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        if known:
            return known
        others = itertools.chain([run.place], (f"{run.place}-{number}" for number in itertools.count(2)))
        place = next(place for place in others if not (self._folder / place).exists())
        self._write(place, _text(run.parameters), 0)
        return place

    def log(self, known: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        from tensorboard.compat.proto import summary_pb2

        rows = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(known, rows, step)

    def _write(self, place: str, rows: list[Any], step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import event_file_writer

        if place not in self._writers:
            folder = self._folder / place
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._writers[place] = event_file_writer.EventFileWriter(str(folder))
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=rows))
        self._writers[place].add_event(event)
        self._writers[place].flush()

    def end(self, known: str) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        writer = self._writers.pop(known, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        for place in list(self._writers):
            with contextlib.suppress(OSError):
                self.end(place)


def _text(parameters: Mapping[str, str]) -> list[Any]:
    """The recipe as a table of the plugin for text."""
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

    lines = ["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in sorted(parameters.items()))]
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=["\n".join(lines).encode()])
    return [
        summary_pb2.Summary.Value(
            tag="recipe/text_summary", metadata=summary_pb2.SummaryMetadata(plugin_data=plugin), tensor=tensor
        )
    ]
