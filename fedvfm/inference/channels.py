"""Files that are the channels of one case: ``CASE_0000.*``, ``CASE_0001.*``, as nnU-Net calls them.

What a model takes is in its recipe (``recipe.data.channels``). A model of three channels gets the files of a case
together, as the data sources give them in training; a model of one gets one file, and files that must be channels of
a case are refused, because each alone would be predicted as if it were the image.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedvfm import errors
from fedvfm.data import channels as unlike
from fedvfm.data import formats
from fedvfm.data.sources import cases
from fedvfm.data.volumes import volumes
from fedvfm.inference import inputs

MOST = 16
"""More files of one name with a number are a numbering, not channels."""

Group = dict[int, inputs.Item]


@dataclass
class Joined:
    """What there is to predict once channels stand together.

    Attributes:
        items: in the order of names, DICOM last.
        failed: name -> why its files cannot be used.
    """

    items: list[inputs.Item] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def read_numbers(text: str) -> tuple[int, ...]:
    """``"0,1,3"`` as numbers, with ``-`` for a channel that is lacking; empty for nothing.

    Raises:
        ConfigError: if it is no list of different channel numbers.
    """
    words = [word.strip() for word in text.split(",")] if text else []
    numbers = tuple(int(word) if word != "-" else unlike.ABSENT for word in words if re.fullmatch(r"\d{1,4}|-", word))
    there = [number for number in numbers if number != unlike.ABSENT]
    if len(numbers) < len(words) or len(set(there)) < len(there) or (words and not there):
        raise errors.ConfigError(
            "--channels",
            [f"'{text}': give different channel numbers from 0, like 0,1,3, and - for a lacking one"],
        )
    return numbers


def join(
    found: Sequence[inputs.Item],
    named: Sequence[str],
    chosen: Sequence[int],
    *,
    alone: bool,
    optional: Sequence[str] = (),
) -> Joined:
    """Put the channels of every case together, or refuse the case.

    Args:
        found: what there is to predict.
        named: the channels of the recipe; empty where an image is one file.
        chosen: numbers of the files to take, in the order of the recipe's channels; empty for 0, 1, 2, ...
        alone: whether the one file was named by hand: its neighbours are then looked for where the model needs them,
            and nothing is guessed where it needs none.
        optional: channels of the recipe that may be lacking.

    Raises:
        ConfigError: if other numbers of channels are chosen than the model takes, or one is lacking that it needs.
    """
    need = max(1, len(named))
    if chosen and len(chosen) != need:
        takes = cases.shown(named) if named else "one file a case"
        raise errors.ConfigError("--channels", [f"{len(chosen)} channel numbers, but the model takes {takes}"])
    needed = [
        name for name, number in zip(named, chosen, strict=False) if number == unlike.ABSENT and name not in optional
    ]
    if needed:
        raise errors.ConfigError(
            "--channels",
            [f"'-' for {', '.join(needed)}: the model may lack {', '.join(optional) or 'no channel'}; bring a file"],
        )
    given = _with_neighbours(found) if alone and need > 1 else list(found)
    groups = _groups(given)
    made = Joined()
    if need == 1 and not chosen:
        doubtful = {} if alone else _channel_sets(groups)
        for name, group in doubtful.items():
            made.failed[name] = _one_wanted(group, named)
        members = {id(item) for group in doubtful.values() for item in group.values()}
        made.items = [item for item in given if id(item) not in members]
        return made
    numbers = tuple(chosen) or tuple(range(need))
    taken = {id(item) for group in groups.values() for item in group.values()}
    for item in given:
        if id(item) not in taken:
            _add_alone(made, item, named)
    for name, group in groups.items():
        _add_group(made, name, group, numbers, named, exact=not chosen)
    made.items.sort(key=lambda item: (item.kind == "dicom", item.name))
    return made


def _groups(found: Sequence[inputs.Item]) -> dict[str, Group]:
    """Files with a channel number, by the name of their case."""
    made: dict[str, Group] = {}
    for item in found:
        match = None if item.kind == "dicom" else re.fullmatch(r"(.+)_(\d{4})", formats.stem(item.path))
        if match is not None:
            folder = item.name.rpartition("/")[0]
            made.setdefault(f"{folder}/{match[1]}" if folder else match[1], {})[int(match[2])] = item
    return made


def _channel_sets(groups: Mapping[str, Group]) -> dict[str, Group]:
    """Groups that are channels beyond doubt; a mere numbering of images has more files, or grids of their own."""
    whole = {name: one for name, one in groups.items() if 1 < len(one) <= MOST and sorted(one) == list(range(len(one)))}
    shapes = [len(one) for one in groups.values()]
    alike = len(groups) > 1 and len(set(shapes)) == 1 and len(whole) == len(groups)
    return {name: one for name, one in whole.items() if alike or _one_grid(one)}


def _one_grid(group: Group) -> bool:
    if any(item.kind == "picture" for item in group.values()):
        return False
    try:
        grids = [volumes.read_header(item.path).grid for item in group.values()]
    except Exception:
        return False  # told when it is read, whatever it is
    return all(one.fits(grids[0]) for one in grids[1:])


def _one_wanted(group: Group, named: Sequence[str]) -> str:
    takes = f"one ({named[0]})" if named else "one"
    return (
        f"{len(group)} files ({_listed(group)}) that are channels of one case, but the model takes {takes}: say which "
        f"with --channels 0; if each is a case of its own, give them one by one ({group[0].path.name}), or under names "
        "without _0000"
    )


def _listed(numbers: Sequence[int] | Group) -> str:
    shown = [f"_{number:04d}" for number in sorted(numbers)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _add_alone(made: Joined, item: inputs.Item, named: Sequence[str]) -> None:
    """A file without a channel number: pictures and DICOM may hold three channels in colour, NIfTI and NRRD one."""
    if item.kind != "volume" or len(named) < 2:
        made.items.append(item)
        return
    ending = formats.ending(item.path)
    made.failed[item.name] = (
        f"one file, so one channel, but the model takes {cases.shown(named)}; give a file for each, called "
        + ", ".join(f"NAME_{number:04d}{ending} ({one})" for number, one in enumerate(named))
    )


def _add_group(
    made: Joined, name: str, group: Group, numbers: Sequence[int], named: Sequence[str], *, exact: bool
) -> None:
    first = group[min(group)]
    missing = [number for number in numbers if number not in group and number != unlike.ABSENT]
    surplus = sorted(set(group) - set(numbers)) if exact else []
    if len(named) > 1 and list(group) == [0] and first.kind == "picture":
        made.items.append(first)  # in colour it holds its three channels in one file; else reading refuses it
    elif missing or surplus:
        takes = cases.shown(named) if named else "one file a case"
        what = [f"no {_listed(missing)}"] if missing else []
        what += [f"{_listed(surplus)} besides"] if surplus else []
        remedy = "bring a file for each" if missing else f"choose {len(numbers)} of them with --channels, like 0,1,3"
        made.failed[name] = f"files {_listed(group)}: {' and '.join(what)}, but the model takes {takes}; {remedy}"
    elif len({item.kind for item in group.values()}) > 1:
        made.failed[name] = "pictures and volumes mixed; convert one to the other's kind"
    else:
        there = [number for number in numbers if number != unlike.ABSENT]
        files = tuple(group[number].path for number in there)
        absent = tuple(at for at, number in enumerate(numbers) if number == unlike.ABSENT)
        made.items.append(dataclasses.replace(first, name=name, path=files[0], more=files[1:], absent=absent))


def _with_neighbours(found: Sequence[inputs.Item]) -> list[inputs.Item]:
    """The one file with those beside it that differ in the channel number alone."""
    (item,) = found
    match = None if item.kind == "dicom" else re.fullmatch(r"(.+)_\d{4}", formats.stem(item.path))
    if match is None:
        return list(found)
    begins, ending = f"{match[1]}_", formats.ending(item.path)
    pattern = re.compile(re.escape(begins) + r"\d{4}" + re.escape(ending), re.IGNORECASE)
    beside = sorted(path for path in item.path.parent.iterdir() if pattern.fullmatch(path.name))
    return [inputs.Item(formats.stem(path), item.kind, path) for path in beside]
