"""A site's device is looked at before each round; one that fails is a word, and the site stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.process import limits, supervisor
from fedvfm.client.training import compute
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.flower import internals
from fedvfm.model import adapted_model, device_check, memory
from fedvfm.protocol import protocol
from fedvfm.runtime import capacity
from fedvfm.state import state
from tests.privacy import test_private_training as drawn

CPU = device_check.probe("cpu")


def rounded(left: device_check.Matrix, right: device_check.Matrix) -> device_check.Matrix:
    """A device that loses one bit of one number."""
    product = CPU.multiply(left, right)
    product[3, 5] = np.nextafter(product[3, 5], np.float32(np.inf))
    return product


def gone(left: device_check.Matrix, right: device_check.Matrix) -> device_check.Matrix:
    raise RuntimeError("CUDA error: unspecified launch failure at /data/patient-7")


def test_a_device_that_computes_passes() -> None:
    device_check.require("cpu")
    device_check.require("cpu", lambda: 1.0, device_check.Probe(CPU.multiply, capacity.memory_mib))
    device_check.require("cpu", lambda: 1e12, CPU)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "tf32"])
def test_the_product_is_exact_in_each_format(kind: str) -> None:
    """TF32 rounds factors to 10 bits of mantissa; whole numbers up to 8 have at most 4."""
    import torch

    def multiply(left: device_check.Matrix, right: device_check.Matrix) -> device_check.Matrix:
        a, b = torch.from_numpy(left), torch.from_numpy(right)
        if kind == "tf32":
            a, b = ((each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in (a, b))
        elif kind == "bfloat16":
            a, b = (each.bfloat16().float() for each in (a, b))
        product: device_check.Matrix = (a @ b).numpy()
        return product

    device_check.require("cpu", asked=device_check.Probe(multiply))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (device_check.Probe(rounded), "computes wrong numbers"),
        (device_check.Probe(gone), r"does not compute \(RuntimeError\)"),
        (device_check.Probe(CPU.multiply, capacity.memory_mib), "a step takes about 1,000,000,000,000 MiB"),
        (device_check.Probe(CPU.multiply, lambda: float(gone)), r"does not compute \(TypeError\)"),
    ],
)
def test_one_that_does_not_is_a_code_without_its_text(asked: device_check.Probe, said: str) -> None:
    with pytest.raises(errors.DeviceError, match=said) as caught:
        device_check.require("cuda:0", lambda: 1e12, asked)
    assert "patient" not in str(caught.value)
    answer = protocol.refusal(caught.value)
    assert (answer.code, answer.reason, caught.value.code) == (1071, "device", "device")


def test_a_device_that_torch_lacks_does_not_compute() -> None:
    with pytest.raises(errors.DeviceError, match="does not compute"):
        device_check.require("cuda:7")


def test_the_first_device_that_computes_is_taken() -> None:
    assert device_check.first(["cuda:7", "cpu"]) == "cpu", "torch sees no CUDA device here"
    assert device_check.first(["cpu", "cuda:7"]) == "cpu"
    with pytest.raises(errors.ConfigError, match="no CUDA device"):
        device_check.first(
            ["cpu", "cuda"], check=lambda name: device_check.require(name, asked=device_check.Probe(gone))
        )


def test_a_hospital_that_trains_is_checked_and_a_virtual_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoModel:
        def get(self, recipe: Any, device: str) -> Any:
            return None

    asked: list[str] = []

    def failing(device: str, needed_mib: Any) -> None:
        asked.append(device)
        raise errors.DeviceError("away")

    monkeypatch.setattr(device_check, "shortage", failing)
    source: Any = None
    site = sites.Site("north", virtual_hospitals.Hospital("north", source, (), (), ()))
    here, task = compute.Here(NoModel()), protocol.Task(_recipe(), 1)
    start: Any = None
    with pytest.raises(errors.DeviceError):
        here.train(site, task, start, 0.0)
    site.simulated = True
    with pytest.raises(AttributeError):
        here.train(site, task, start, 0.0)
    assert asked == ["cpu"]


Full = dict[str, float | None]
"""MiB that are free, by device."""


def machine(monkeypatch: pytest.MonkeyPatch, free: Full) -> list[str]:
    """A machine with these devices, each of which is this CPU; those that were asked for a product, in order."""
    asked: list[str] = []

    def probe(device: str) -> device_check.Probe:
        asked.append(device)
        return device_check.Probe(CPU.multiply if device in free else gone, lambda: free[device])

    monkeypatch.setattr(device_check, "probe", probe)
    monkeypatch.setattr(device_check.devices, "choose", lambda name: name)
    return asked


@pytest.mark.parametrize(
    ("free", "taken"),
    [
        ({"cuda:0": 100.0, "cuda:1": 900.0, "cuda:2": 900.0}, "cuda:0"),
        ({"cuda:0": 99.0, "cuda:1": 99.0, "cuda:2": 100.0}, "cuda:2"),
        ({"cuda:0": 99.0, "cuda:2": 900.0}, "cuda:2"),
        (
            {"cuda:0": 99.0, "cuda:1": 0.0, "cuda:2": 0.0},
            "device 'cuda:0': a step takes about 100 MiB, 99 MiB are free",
        ),
        ({"cuda:1": 900.0}, "device 'cuda:0' does not compute"),
    ],
    ids=["the first has room", "the last alone has", "one is gone", "all are full", "the first is gone"],
)
def test_a_round_goes_to_the_first_gpu_with_room(monkeypatch: pytest.MonkeyPatch, free: Full, taken: str) -> None:
    machine(monkeypatch, free)
    names = ("cuda:0", "cuda:1", "cuda:2")
    if taken.startswith("device"):
        with pytest.raises(errors.DeviceError, match=taken):
            device_check.roomy(names, lambda name: 100.0, lambda name: True)
        return
    assert device_check.roomy(names, lambda name: 100.0, lambda name: True) == taken
    if taken == "cuda:2":  # that one computes in another precision than the handshake told
        with pytest.raises(errors.DeviceError, match="device 'cuda:0'"):
            device_check.roomy(names, lambda name: 100.0, lambda name: name != "cuda:2")


def test_the_site_s_share_of_a_gpu_holds_for_a_spare_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory that is free counts up to that share, and torch is told before anything lies there."""
    import torch

    shares: dict[str, float] = {}
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, at: shares.update({str(at): share})
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900 << 20, 1000 << 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50 << 20)
    monkeypatch.setattr(device_check, "_SHARES", {})
    assert device_check.probe("cuda:1").free_mib() == 900.0
    real = device_check.probe
    machine(monkeypatch, {"cuda:0": 1.0, "cuda:1": 900.0})
    assert device_check.roomy(("cuda:0", "cuda:1"), lambda name: 100.0, lambda name: True, 0.5) == "cuda:1"
    assert shares == {"cuda:1": 0.5}
    assert real("cuda:1").free_mib() == 450.0


def test_spare_devices_are_those_behind_the_one_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cuda:7", "cuda:8", "auto", "cpu")
    assert device_check.after(names, "cpu") == ("cpu",), "torch sees no CUDA device here: auto is the CPU"
    assert device_check.after(("cpu",), "cpu") == ()
    assert device_check.after((), "cpu") == ()


def test_a_round_on_a_spare_device_is_bit_by_bit_that_of_the_first(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next round is the first device's again, once there is room."""
    free: Full = {"first": 10_000.0, "second": 10_000.0}
    asked = machine(monkeypatch, free)
    on: list[str] = []
    model = adapted_model.AdaptedModel(recipe := drawn.recipe(tiny_dino, privacy={"mechanism": "none"}))

    class Held:
        def get(self, recipe: Any, device: str) -> adapted_model.AdaptedModel:
            on.append(device)
            return model

    monkeypatch.setattr(compute.precision, "of", lambda asked, device: "float32")
    site = sites.Site("here", drawn.Drawn(56), "first", spare_devices=("second",))
    task = protocol.Task(recipe, 1)
    here = compute.Here(Held())
    free["first"] = 1.0
    here.hello(site, task)
    here.shapes(site, recipe)
    assert on == ["second", "second"], "a greeting puts no model on a device that is full"
    free["second"] = 1.0
    with pytest.raises(errors.DeviceError, match="device 'first': a step takes"):
        here.hello(site, task)
    free |= {"first": 10_000.0, "second": 10_000.0}
    del on[:], asked[:]
    here = compute.Here(Held())
    first = here.train(site, task, model.initial(), math.inf)
    free["first"] = 1.0
    second = here.train(site, task, model.initial(), math.inf)
    assert first.state.fingerprint == second.state.fingerprint
    with here._placed(site, recipe):
        assert site.device == "second", "it is scored where it was trained"
    free["first"] = 10_000.0
    here.train(site, task, model.initial(), math.inf)
    assert on == ["first", "second", "first"]
    assert asked == ["first", "first", "second", "first"]
    assert site.device == "first"


def test_a_private_step_needs_memory_for_the_units_that_it_holds_alone(tiny_dino: Path) -> None:
    def needed(batch: int, **own: Any) -> float:
        asked = drawn.recipe(tiny_dino, privacy=own)
        larger = asked.model_copy(update={"optimiser": asked.optimiser.model_copy(update={"batch_size": batch})})
        model = adapted_model.AdaptedModel(larger, with_weights=False)
        step = device_check.step_mib(model)
        trained = memory.memory(model, [], memory.Places(0)).activations - step
        numbers = 4 * model.manifest.parameters / memory.MIB
        rows = 0 if own["mechanism"] == "none" else 3 * (own.get("microbatch") or 16) * numbers
        assert trained == pytest.approx(memory.COPIES * numbers + rows), "what data check and plans count beside it"
        return step

    plain, private = {"mechanism": "none"}, drawn.PRIVACY | {"mechanism": "record-level"}
    assert needed(64, **plain) > 3 * needed(8, **plain)
    assert needed(512, **private) == needed(256, **private)
    assert needed(512, **private, microbatch=2) < needed(512, **private) / 3


@pytest.mark.parametrize("kind", [protocol.HANDSHAKE, protocol.TRAIN, protocol.EVALUATE])
def test_a_site_without_any_device_says_so_each_time(tmp_path: Path, kind: str) -> None:
    own = {"name": "n", "device": "cuda:7", "data": {"source": "folder", "path": str(tmp_path)}}
    device, fault = supervisor.device_or_fault(schema.parse(schema.SiteConfig, own, "site"))
    assert device == "cpu", "where nothing is computed"
    assert fault is not None
    source: Any = None
    site = sites.Site("n", virtual_hospitals.Hospital("n", source, (), (), ()))
    seen: list[Exception] = []
    app = client_app.make_client_app(
        lambda context: site, report=lambda at, error: seen.append(error), elsewhere=compute.Nowhere(fault)
    )
    internals.be_server_task(1)
    start = state.AdapterState({"head.weight": np.zeros((2, 3), np.float32)})
    message = Message(protocol.encode_task(protocol.Task(_recipe(), 1, start)), 7, kind, ttl=60.0)
    internals.set_message_id(message, "m1")
    assert protocol.error_word(app(message, internals.context(1, 7, {}))) == "device"
    (error,) = seen
    assert isinstance(error, errors.DeviceError), "so the process ends, and the next one looks again"
    assert "CUDA" in str(error)
    spared = schema.parse(schema.SiteConfig, {**own, "spare_devices": ["cpu"]}, "site")
    assert supervisor.device_or_fault(spared) == ("cpu", None)


def _recipe() -> schema.Recipe:
    values = {"backbone": {"name": "x"}, "data": {"class_names": ["a", "b"], "input_size": [28, 28]}}
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize(("spare", "hidden"), [((), True), (("cpu",), True), (("cuda:1",), False)])
def test_a_site_without_a_gpu_among_its_devices_sees_none(tmp_path: Path, spare: tuple[str, ...], hidden: bool) -> None:
    data = {"source": "folder", "path": str(tmp_path)}
    site = schema.parse(schema.SiteConfig, {"name": "n", "data": data, "spare_devices": list(spare)}, "site")
    assert ("CUDA_VISIBLE_DEVICES" in limits.environment(site)) == hidden
