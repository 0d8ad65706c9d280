"""Before anything is trained it is said how much of the masks the recipe's size loses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals
from fedvfm.simulation import detail, experiment, run


class Fine:
    """Lines of one pixel on images of 200 pixels; the first image cannot be read."""

    info = data.SourceInfo("fine", "segmentation", ("background", "box"), "drawn")

    def read(self, sample: data.Sample) -> data.Pixels:
        if sample.id == "0":
            raise defect.UNREADABLE.error("image 0 is cut short")
        mask = np.zeros((200, 200), dtype=np.int64)
        mask[::10] = 1
        return data.Pixels(mask[None].astype(np.float32), mask)


def hospital(**more: Any) -> virtual_hospitals.Hospital:
    train = tuple(data.Sample(str(at), patient=str(at)) for at in range(9))
    return virtual_hospitals.Hospital("site-a", Fine(), train, (), (), **more)  # type: ignore[arg-type]


def prepared(tiny: Any, **contract: Any) -> Any:
    own = {**tiny.values["recipe"]["data"], **contract}
    return run.prepare({**tiny.values, "recipe": {**tiny.values["recipe"], "data": own}})[0]


def test_what_no_arm_can_score_is_said_before_training(tiny: Any) -> None:
    said = detail.note(prepared(tiny), [hospital()])
    assert "input_size = 56 x 56" in said
    assert "(2 looked at)" in said, "one of three cannot be read, which is told where it is trained on"
    kept = float(said.split("Dice of box ")[1].split()[0])
    assert 0.0 <= kept < 0.7
    assert said in run.notes(prepared(tiny), [hospital()])


@pytest.mark.parametrize("contract", [{"fit": "native"}, {"input_size": [224, 224]}])
def test_nothing_is_said_where_nothing_is_lost(tiny: Any, contract: dict[str, Any]) -> None:
    assert detail.note(prepared(tiny, **contract), [hospital()]) == ""


def test_hospitals_without_labels_and_images_that_keep_their_detail(tiny: Any) -> None:
    assert detail.note(prepared(tiny), [hospital(without_labels=True)]) == ""
    assert detail.note(prepared(tiny), experiment.hospitals(prepared(tiny))) == ""
