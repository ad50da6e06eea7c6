"""Equal bytes: every rival gets as many as the capsule that it is compared with."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.builders import rand
from support.noise_capsules import LAYERS, TOKEN_BYTES, TOKENS

from kvcapsule.errors import InputError
from kvcapsule.eval.entries import RIVALS, build
from kvcapsule.eval.equal_bytes import TOLERANCE, PerLayer, match
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Method
from kvcapsule.policy import EvenlySpaced, Full, PyramidKV
from kvcapsule.segments.segment import storage_bytes
from kvcapsule.vlm.spans import VisualSpan


def _prefills(visual: int, tokens: int) -> list[LayerPrefill]:
    """One row of random numbers with one image, for each layer."""
    valid, spans = torch.ones(1, tokens, dtype=torch.bool), [VisualSpan(0, 3, visual, (1, 1, visual))]
    drawn = [
        [rand(1, heads, tokens, 32, seed=9 * layer + i).float() for i, heads in enumerate((4, 2, 2))]
        for layer in range(LAYERS)
    ]
    return [
        LayerPrefill(layer=layer, query=query, keys=keys, values=values, spans=spans, valid=valid, scale=32**-0.5)
        for layer, (query, keys, values) in enumerate(drawn)
    ]


def _weigher(visual: int, tokens: int) -> Callable[[Method], int]:
    prefills = _prefills(visual, tokens)

    def stored(method: Method) -> int:
        run = method.begin_pass(range(LAYERS))
        done = [compressed for of in prefills for _, compressed in run.add(of)]
        return storage_bytes(t for part in done for segments in part for s in segments for t in s.entry_tensors())

    return stored


@pytest.fixture(scope="module")
def weigh() -> Callable[[Method], int]:
    return _weigher(TOKENS, TOKENS + 24)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_rivals_get_the_bytes_that_they_are_to_match(weigh, name: str, share: float) -> None:
    """Visual and text together, whatever the policy's budget is about."""
    target = int(share * weigh(Full()))
    found = match(target, partial(build, name, {}), weigh, LAYERS)
    assert abs(weigh(found) / target - 1) <= TOLERANCE


def _kept(method: Method) -> list[int]:
    """Visual tokens that each layer keeps of an image of 20."""
    return [sum(s.tokens for s in method.compress(of).visual) for of in _prefills(20, 30)]


SMALL = _weigher(20, 30)
TEXT_BYTES = LAYERS * (10 * TOKEN_BYTES + 8)
"""Ten text tokens in each layer, and the owner of their segment."""


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        # The first layers take what whole tokens leave.
        (10, [3, 3, 2, 2]),
        (40.3, [10, 10, 10, 10]),
        # 4.2 tokens over four layers, and 4 would be nearest; of all bytes it is 0.2 %.
        (4.2, [1, 1, 1, 1]),
        # Never less than one token, never more than all.
        (1, [1, 1, 1, 1]),
        (1000, [20, 20, 20, 20]),
    ],
)
def test_the_nearest_number_of_tokens(tokens: float, kept: list[int]) -> None:
    target = TEXT_BYTES + LAYERS * 8 + int(tokens * TOKEN_BYTES)
    assert _kept(match(target, EvenlySpaced, SMALL, LAYERS)) == kept


def test_where_bytes_cannot_be_equal_a_rival_gets_more() -> None:
    """Were there no text, 5.4 tokens would be 7 % from five: six are kept."""
    visual = LAYERS * 8 + int(5.4 * TOKEN_BYTES)
    assert _kept(match(visual, EvenlySpaced, lambda method: SMALL(method) - TEXT_BYTES, LAYERS)) == [2, 2, 1, 1]


def test_a_method_that_spreads_its_budget_is_not_mixed() -> None:
    pyramid = match(int(0.2 * SMALL(Full())) + TEXT_BYTES // 2, PyramidKV, SMALL, LAYERS)
    assert isinstance(pyramid, PyramidKV)
    assert isinstance(match(TEXT_BYTES + 10 * TOKEN_BYTES, EvenlySpaced, SMALL, LAYERS), PerLayer)


@pytest.mark.parametrize(("tokens", "least", "kept"), [(40, 0.3, 10), (8, 0.3, 6)])
def test_a_method_may_have_a_least_share(tokens: int, least: float, kept: int) -> None:
    """What it refuses is below all that it stores; what it refuses at 1 is an error."""

    def make(budget: float) -> Method:
        if budget < least:
            raise InputError("too little")
        return EvenlySpaced(budget)

    assert _kept(match(TEXT_BYTES + LAYERS * 8 + tokens * TOKEN_BYTES, make, SMALL, LAYERS)) == [kept] * LAYERS
    with pytest.raises(InputError, match="snapkv: window 0"):
        match(TEXT_BYTES, partial(build, "snapkv", {"window": 0}), SMALL, LAYERS)
