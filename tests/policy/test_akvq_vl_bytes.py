"""AKVQ-VL: bits of an element, batches, precisions, and what is refused."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.akvq_vl_by_hand import DIM, GROUP, HEADS, POLICY, mixed, tokens
from support.builders import rand
from support.prefills import alone

from kvcapsule.errors import GeometryError
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import POLICIES, AkvqVl
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.segment import storage_bytes
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan

# Bytes


@pytest.mark.parametrize(("count", "printed"), [(4096, 2.49), (500, 6.0)])
def test_bits_for_an_element(count: int, printed: float) -> None:
    """2 + 14 * 143 / T of payload, as the method's readers count it, and two numbers of 16 bits for 128 channels of
    coded tokens."""
    dim, low = 128, 143
    x = rand(1, 1, count, dim).half()
    hidden = torch.zeros(1, count, 4)
    hidden[0, 20:35, 2] = 100.0
    of = LayerPrefill(
        layer=0,
        query=x,
        keys=x,
        values=x.clone(),
        spans=[VisualSpan(0, 5, 300, (1, 1, 300))],
        valid=torch.ones(1, count, dtype=torch.bool),
        scale=1.0,
        hidden=hidden,
    )
    stored = AkvqVl(()).compress(of)
    segments = [*stored.visual, *stored.text]
    elements = 2 * count * dim
    packed = [x for s in segments for x in (s.keys, s.values) if isinstance(x, GroupedRows)]
    raw = [x for s in segments for x in (s.keys, s.values) if isinstance(x, torch.Tensor)]
    payload = 8 * storage_bytes(iter([*raw, *(p.codes for p in packed)]))
    assert payload == elements * 2 + 14 * low * 2 * dim
    assert payload / elements == pytest.approx(printed, abs=0.01)
    scales = 8 * storage_bytes(t for p in packed for t in (p.scale, p.minimum))
    assert scales == (count - low) * 2 * 2 * 16
    everything = 8 * storage_bytes(t for s in segments for t in s.entry_tensors() if t is not s.owner)
    assert everything == payload + scales


def test_bits_for_an_element_of_a_text_salient_layer() -> None:
    """2 + 14 * n16 / T + 2 * n4 / T."""
    count, dim, recent, visual = 600, 128, 128, 300
    x = rand(1, 1, count, dim).half()
    of = LayerPrefill(
        layer=0,
        query=x,
        keys=x,
        values=x.clone(),
        spans=[VisualSpan(0, 5, visual, (1, 1, visual))],
        valid=torch.ones(1, count, dtype=torch.bool),
        scale=1.0,
    )
    stored = AkvqVl((0,)).compress(of)
    everything = 8 * storage_bytes(
        t for s in (*stored.visual, *stored.text) for t in s.entry_tensors() if t is not s.owner
    )
    text = count - recent - visual
    payload = 2 + 14 * recent / count + 2 * text / count
    assert everything == pytest.approx(2 * count * dim * (payload + 2 * 16 / 128 * (count - recent) / count), rel=1e-9)


def test_the_rotation_is_stored_once() -> None:
    stored = [AkvqVl((), recent=4, pivots=0).compress(tokens([(0, 3, 20)], [0], 30, layer)) for layer in (0, 1)]
    maps = [t for c in stored for s in (*c.visual, *c.text) for t in s.parameter_tensors()]
    assert storage_bytes(iter(maps)) == DIM * DIM * 8


def test_a_batch_is_its_rows_one_by_one() -> None:
    of = mixed()
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    visual, text = POLICY.compress(of)
    together = attend(query, [*visual, *text], 0.3)
    for row in range(3):
        visual, text = POLICY.compress(alone(of, row))
        torch.testing.assert_close(attend(query[row : row + 1], [*visual, *text], 0.3), together[row : row + 1])


def test_rows_can_be_chosen() -> None:
    visual, text = POLICY.compress(mixed())
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    before = attend(query, [*visual, *text], 0.3)
    rows = torch.tensor([1, 1, 0])
    chosen = [s.select(rows) for s in (*visual, *text)]
    torch.testing.assert_close(attend(query[rows], chosen, 0.3), before[rows])
    assert [s.tag for s in chosen] == [s.tag for s in (*visual, *text)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    of = mixed()
    assert of.hidden is not None
    tensors = {name: getattr(of, name).to(dtype) for name in ("query", "keys", "values", "hidden")}
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    near, far = (POLICY.compress(prefill) for prefill in (of, replace(of, **tensors)))
    difference = (
        attend(query, [*near.visual, *near.text], 0.3) - attend(query.to(dtype), [*far.visual, *far.text], 0.3).double()
    )
    assert float(difference.abs().mean()) < 0.02


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_layers": "first"}, "text_layers 'first': 'auto', or the indices"),
        ({"recent": -1}, "recent -1 counts tokens"),
        ({"pivots": -2}, "pivots -2 counts tokens"),
        ({"group": 0}, "group 0: at least one"),
        ({"clip": 0.0}, "clip 0.0 is outside (0, 1]"),
        ({"bits": 5}, "5 bits cannot be packed"),
        ({"bits": 4}, "text_bits 4 are to be more than the 4 bits"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AkvqVl(**settings)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GeometryError, match=re.escape("text_layers (0, 4): the model's layers are 0 to 3")):
        AkvqVl((0, 4)).require_geometry(KVGeometry("llava", 4, 4, 2, 8, "1d"))
    odd = KVGeometry("llava", 4, 4, 2, 9, "none")
    with pytest.raises(GeometryError, match="a head dim of 9 has no Walsh-Hadamard rotation"):
        AkvqVl().require_geometry(odd)
    assert POLICIES["akvq-vl"] is AkvqVl
