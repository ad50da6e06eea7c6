"""A model on a device that is not the CPU (support/pretend_device.py): every method gives the CPU's tokens and bytes,
no tensors of two devices meet, and the host waits for the device no more often than it must."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import pretend_device, tiny_vlm
from support.builders import EVERY_FAMILY
from support.family_models import OPTIONS as LONGER
from support.pretend_device import DEVICE, MixedDevicesError, PretendTensor, pretended, to_device
from support.tiny_llava import llava
from support.tiny_vlm import Tiny
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.stored_span import from_bytes, to_bytes
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method
from kvcapsule.policy import REGISTRY
from kvcapsule.vlm.geometry import KVGeometry

OPTIONS = {**LONGER, "max_new_tokens": 3, "min_new_tokens": 3}
FEW, MANY = 2, 4
"""Layers of two models, whose difference shows what a layer costs."""
A_LAYER = 2
"""Waits of a layer's prefill, at most."""
A_FORWARD = 16
"""Waits of a prefill beside its layers', at most, those of transformers (4) included."""
SETTINGS: dict[str, dict[str, Any]] = {"quantized": {"bits": 4}, "hybridkv": {"budget": 0.5}}
"""Of policies that have no budget, or another name for it."""
ON_THE_HOST = "hybridkv"
"""Keeps a part of the cache in the host's memory, which decode steps fetch from; its prefill sorts heads by kind."""


def of_policy(name: str) -> Method:
    policy = REGISTRY.find(name)
    budget = {policy.budget_field: 0.5} if policy.budget_field else {}
    return policy(**SETTINGS.get(name, budget))  # type: ignore[no-any-return]


METHODS: dict[str, Callable[[KVGeometry], Method]] = {
    **{name: lambda geometry, build=build: build(geometry, tile=8) for name, build in EVERY_FAMILY.items()},
    **{name: lambda _, name=name: of_policy(name) for name in REGISTRY.names()},
}


class Model(NamedTuple):
    on_cpu: PreTrainedModel
    on_device: PreTrainedModel


class Run(NamedTuple):
    tokens: list[list[int]]
    bytes: Any
    prefill: int
    """Waits."""
    step: int
    """Waits of a decode step."""


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return llava()


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> dict[int, Model]:
    """By the number of layers."""
    found = {}
    for layers in (FEW, MANY):
        text = {**tiny.settings["text_config"], "num_hidden_layers": layers}
        model = tiny_vlm.build("llava", Tiny({**tiny.settings, "text_config": text}, tiny.picture))
        found[layers] = Model(model, to_device(copy.deepcopy(model)))
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(tiny: Tiny) -> BatchFeature:
    """Rows of two images, of one behind padding, of none."""
    first, second = tiny.picture(0), tiny.picture(1)
    return tiny_vlm.batch(tiny, [5, 6, first, 7, second, 8, 9], [3, second, 4, 4], [1, 2, 3])


def run(model: PreTrainedModel, method: Method | None, inputs: BatchFeature) -> Run:
    """method: None for the model's own cache."""
    marks: list[int] = []

    def mark(*_: Any) -> None:
        marks.append(pretend_device.waits.total())

    hooks = [model.register_forward_pre_hook(mark), model.register_forward_hook(mark)]
    try:
        if method is None:
            out, held = model.generate(**inputs, **OPTIONS), None
        else:
            cache = CapsuleCache(model.config, method)
            with attach(model, method):
                out = model.generate(**inputs, **cache_argument(cache), **OPTIONS)
            held = cache.bytes()
    finally:
        for hook in hooks:
            hook.remove()
    waits = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    return Run(out.sequences.tolist(), held, waits[0], max(waits[1:]))


def on_device(model: Model, method: Method | None, tiny: Tiny, again: bool = False) -> Run:
    """again: what is measured is the second run, when all that is made once is made."""
    with pretended():
        inputs = BatchFeature({name: x.to(DEVICE) for name, x in batch(tiny).items()})
        if isinstance(method, torch.nn.Module):
            to_device(method)
        if again:
            run(model.on_device, method, inputs)
        return run(model.on_device, method, inputs)


class TestTheDevice:
    """It refuses and counts what an accelerator would, or the tests here would hold for any code."""

    @pytest.mark.parametrize(
        "mix",
        [
            lambda x, y: x + y,
            lambda x, y: torch.cat([y, x]),
            lambda x, y: x @ y.T,
            lambda x, y: torch.where(x > 0, x, y),
            lambda x, y: y.index_select(0, torch.zeros(1, dtype=torch.int64, device=DEVICE)),
            lambda x, y: x.add_(y),
            lambda x, y: x.gather(0, y.long()),
        ],
    )
    def test_two_devices_do_not_mix(self, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        with pretended():
            here, there = torch.ones(3, 3), torch.ones(3, 3, device=DEVICE)
            assert isinstance(there, PretendTensor) and there.device.type == "pretend"
            with pytest.raises(MixedDevicesError, match="two devices"):
                mix(there, here)

    @pytest.mark.parametrize(
        "asking",
        [
            lambda x: x[0, 0].item(),
            lambda x: x.tolist(),
            lambda x: bool((x > 0).all()),
            lambda x: int(x.sum()),
            lambda x: x.cpu(),
            lambda x: x.nonzero(),
            lambda x: x.unique(),
            lambda x: x[x > 0],
            lambda x: torch.equal(x, x),
            lambda x: x[torch.tensor([0, 1])],
            lambda x: torch.ones(3, 3).copy_(x),
        ],
    )
    def test_waits_are_counted(self, asking: Callable[[torch.Tensor], Any]) -> None:
        with pretended() as waits:
            there = torch.ones(3, 3, device=DEVICE)
            ((there + 1) @ there).sort().values[:, :2].softmax(-1)
            assert waits.total() == 0
            asking(there)
            assert waits.total() == 1

    def test_gradients(self) -> None:
        with pretended():
            x = torch.ones(3, device=DEVICE, requires_grad=True)
            (slope,) = torch.autograd.grad((x * x).sum(), x)
            assert slope.tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", METHODS)
def test_tokens_bytes_and_waits(name: str, models: dict[int, Model], tiny: Tiny) -> None:
    runs = {}
    for layers, model in models.items():
        geometry = KVGeometry.from_config(model.on_cpu.config)
        expected = run(model.on_cpu, METHODS[name](geometry), batch(tiny))
        runs[layers] = on_device(model, METHODS[name](geometry), tiny, again=True)
        assert runs[layers].tokens == expected.tokens
        assert runs[layers].bytes == expected.bytes
    own = on_device(models[MANY], None, tiny)
    if name != ON_THE_HOST:
        assert runs[MANY].step <= own.step
        assert runs[MANY].prefill - runs[FEW].prefill <= A_LAYER * (MANY - FEW)
        assert runs[FEW].prefill <= A_FORWARD + A_LAYER * FEW
    else:
        assert runs[MANY].step > own.step


def test_the_models_own_cache(models: dict[int, Model], tiny: Tiny) -> None:
    expected, own = run(models[FEW].on_cpu, None, batch(tiny)), on_device(models[FEW], None, tiny)
    assert own.tokens == expected.tokens
    assert (own.prefill, own.step) == (4, 1)


@pytest.mark.parametrize(
    "name", ["transform", "cross-layer", "compact in 3 bits", "coded-compact", "kvcapsule in 4 bits"]
)
def test_bytes_of_an_image(name: str, models: dict[int, Model], tiny: Tiny) -> None:
    """Given out of a cache on the device and taken into one there, they are those of the CPU's cache."""
    model = models[FEW]
    geometry, prompt = KVGeometry.from_config(model.on_cpu.config), [5, 6, tiny.picture(0), 7, 8]
    capsule = EVERY_FAMILY[name](geometry, tile=8)
    cache = CapsuleCache(model.on_cpu.config, capsule)
    with attach(model.on_cpu, capsule):
        model.on_cpu.generate(**tiny_vlm.batch(tiny, prompt), **cache_argument(cache), **OPTIONS)
    (span,) = cache.stored_spans()
    expected = to_bytes(span, capsule)
    with pretended():
        there = to_device(EVERY_FAMILY[name](geometry, tile=8))
        assert isinstance(there, Capsule)
        cache = CapsuleCache(model.on_device.config, there)
        inputs = BatchFeature({key: x.to(DEVICE) for key, x in tiny_vlm.batch(tiny, prompt).items()})
        with attach(model.on_device, there):
            model.on_device.generate(**inputs, **cache_argument(cache), **OPTIONS)
        (span,) = cache.stored_spans()
        data = to_bytes(span, there)
        assert len(data) == len(expected)
        taken = CapsuleCache(model.on_device.config, there)
        taken.take_in([from_bytes(data, there, DEVICE)])
        assert taken.bytes().visual == cache.bytes().visual
        (again,) = taken.stored_spans()
        assert to_bytes(again, there) == data
