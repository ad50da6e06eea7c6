"""The identity of a model: equal for equal models, another one for whatever changes what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kvcapsule.vlm.weights import ModelIdentity, UnreadableError, tensor_digest, weights_digest


class Config:
    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(300, 5), nn.Linear(5, 5, bias=False)
        self.register_buffer("saved", torch.arange(5.0))
        self.register_buffer("unsaved", torch.arange(7), persistent=False)
        self.config = Config(width=5, _attn_implementation="sdpa", kinds={"b", "a"})


def test_equal_models_have_one_identity() -> None:
    assert ModelIdentity(Small()).get() == ModelIdentity(Small()).get()
    other = Small()
    other.config.values["_attn_implementation"] = "eager"
    assert weights_digest(other) == weights_digest(Small())


@torch.no_grad()
def in_place(model: Small) -> None:
    model.first.weight[3, 1] += 1


def through_data(model: Small) -> None:
    model.first.weight.data *= 1.001


def replaced(model: Small) -> None:
    model.second.weight = nn.Parameter(model.second.weight.detach() * 2)


def in_an_unsaved_buffer(model: Small) -> None:
    model.unsaved[0] = 1


def in_another_dtype(model: Small) -> None:
    model.to(torch.float16)


def swapped(model: Small) -> None:
    model.second.weight.data = model.second.weight.data.T.contiguous()


def in_its_config(model: Small) -> None:
    model.config.values["width"] = 6


@pytest.mark.parametrize(
    "change", [in_its_config, in_place, through_data, replaced, in_an_unsaved_buffer, in_another_dtype, swapped]
)
def test_a_change_is_noticed(change: Callable[[Small], None]) -> None:
    model = Small()
    identity = ModelIdentity(model)
    before = identity.get()
    change(model)
    assert identity.get() != before
    assert identity.get() == ModelIdentity(model).get()


def test_config_and_class_count() -> None:
    class Other(Small):
        pass

    changed = Small()
    changed.config.values["width"] = 6
    assert len({weights_digest(model) for model in (Small(), changed, Other())}) == 3


def test_values_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Small(), []
    identity = ModelIdentity(model)
    expected = identity.get()
    monkeypatch.setattr("kvcapsule.vlm.weights.tensor_digest", lambda t: calls.append(t) or tensor_digest(t))
    assert identity.get() == expected and not calls
    identity.forget()
    assert identity.get() == expected and calls


def test_what_cannot_be_read_is_refused() -> None:
    with torch.device("meta"):
        model = Small()
    with pytest.raises(UnreadableError, match="not in memory"):
        ModelIdentity(model).get()
    with pytest.raises(UnreadableError, match="plain bytes"):
        tensor_digest(torch.eye(3).to_sparse())


class Sharded(torch.Tensor):
    """Stands for tensors of other libraries, which are a description of values that lie elsewhere."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> "Sharded":
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{function} of a Sharded")


def test_weights_of_another_kind_are_refused() -> None:
    model = Small()
    model.first.weight = nn.Parameter(Sharded(model.first.weight), requires_grad=False)
    for _ in range(2):
        with pytest.raises(UnreadableError, match="of the kind Sharded, which has no plain bytes"):
            ModelIdentity(model).get()


def test_a_tensors_digest_is_of_type_shape_and_values() -> None:
    one = torch.arange(6.0)
    different = [one, one.view(2, 3), one.view(3, 2), one.double(), one.view(torch.int32), one + 1, one[:0], one[0]]
    assert len({tensor_digest(tensor) for tensor in different}) == len(different)
    assert tensor_digest(one.view(2, 3).T) == tensor_digest(one.view(2, 3).T.contiguous())
    assert tensor_digest(torch.tensor([True, False])) != tensor_digest(torch.tensor([1, 0], dtype=torch.uint8))
