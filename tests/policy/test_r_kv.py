"""R-KV: its scores worked out in loops, and what is written stays at the budget however long the answer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import DIM, HEADS, rand
from support.r_kv_rows import (
    GROUP,
    PADDING,
    SMALL,
    TOKENS,
    WINDOW,
    best,
    importance,
    prompt,
    redundancy,
    softmax,
    tokens,
)

from kvcapsule.methods.method import Compressed
from kvcapsule.policy import RKV, r_kv


def asked(rows: int = 2, count: int = WINDOW) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries, all of them of real tokens, and the scale."""
    return rand(rows, HEADS * GROUP, count, DIM, seed=3), torch.ones(rows, count, dtype=torch.bool), DIM**-0.5


CHOICES: list[dict[str, Any]] = [
    {},
    {"beta": 0},
    {"beta": 3},
    {"threshold": 0.85},
    {"kernel": 1, "mix": 1.0},
    {"mix": 0.0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "defaults")
def test_scores_are_those_of_the_formulas(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row and head, padded or not; similarities in chunks of seven tokens."""
    monkeypatch.setattr(r_kv, "_CHUNK", 7)
    method, of = replace(SMALL, **choice), tokens()
    query, asking, scale = asked()
    important = method.importance(query, of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW], asking, scale)
    redundant = method.redundancy(of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW])
    kept = method.kept(of, query, asking, scale)
    for row, begin in enumerate(PADDING):
        for head in range(HEADS):
            keys = of.keys[row, head, begin:]
            i = importance(method, keys[:-WINDOW], query[row, head * GROUP : (head + 1) * GROUP], scale)
            r = redundancy(method, keys)
            for found, expected in ((important, i), (redundant, r)):
                torch.testing.assert_close(
                    found[row, head], torch.tensor([0.0] * begin + expected, dtype=torch.float64)
                )
            z = [method.mix * a - (1 - method.mix) * b for a, b in zip(i, r, strict=True)]
            expected_kept = [begin + j for j in best(z, 12 - WINDOW)] + list(range(TOKENS - WINDOW, TOKENS))
            assert kept[row, head].nonzero()[:, 0].tolist() == expected_kept


@pytest.mark.parametrize("choice", CHOICES[1:], ids=str)
def test_every_choice_matters(choice: dict[str, Any]) -> None:
    def scores(method: RKV) -> torch.Tensor:
        of, (query, asking, scale) = tokens(), asked()
        important = method.importance(query, of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW], asking, scale)
        redundant = method.redundancy(of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW])
        return method.mix * important - (1 - method.mix) * redundant

    assert not torch.allclose(scores(replace(SMALL, **choice)), scores(SMALL))


def test_of_near_duplicates_the_newest_stays() -> None:
    """Tokens a, b and c are alike and d is at right angles to them. a spares c, b spares c and c spares b."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, east, east, north], dtype=torch.float64)[None, None]
    valid = torch.ones(1, 1, 4, dtype=torch.bool)

    def expected(*means: float) -> torch.Tensor:
        return torch.tensor([[softmax(list(means))]], dtype=torch.float64)

    torch.testing.assert_close(SMALL.redundancy(keys, valid), expected(2 / 4, 1 / 4, 0.0, 0.0))
    torch.testing.assert_close(replace(SMALL, beta=0).redundancy(keys, valid), expected(2 / 4, 2 / 4, 2 / 4, 0.0))


def test_the_observed_tokens_count_within_the_budget() -> None:
    kept = SMALL.kept(tokens(), *asked())
    assert (kept.sum(dim=2) == 12).all()
    assert kept[:, :, -WINDOW:].all()


def test_padding_does_not_ask() -> None:
    """Queries of padding change nothing, and the mean is over the others."""
    of, (query, asking, scale) = tokens(1, (0,)), asked(1)
    asking[0, :2] = False
    candidates = of.valid[:, :, :-WINDOW]
    found = SMALL.importance(query, of.keys[:, :, :-WINDOW], candidates, asking, scale)
    alone = SMALL.importance(query[:, :, 2:], of.keys[:, :, :-WINDOW], candidates, asking[:, 2:], scale)
    torch.testing.assert_close(found, alone)


def test_what_lies_at_padding_does_not_matter() -> None:
    of, (query, asking, scale) = tokens(), asked()
    asking[1, 0] = False
    expected = SMALL.kept(of, query, asking, scale)
    query[1, :, 0] = torch.nan
    poisoned = replace(of, keys=of.keys.masked_fill(~of.valid[..., None], torch.nan))
    assert torch.equal(SMALL.kept(poisoned, query, asking, scale), expected)


def test_scores_are_computed_in_full_precision() -> None:
    half = tokens(padding=(0, 0))
    half = replace(half, keys=half.keys.bfloat16())
    query, asking, scale = asked()
    expected = SMALL.kept(replace(half, keys=half.keys.float()), query.bfloat16().float(), asking, scale)
    assert torch.equal(SMALL.kept(half, query.bfloat16(), asking, scale), expected)


def test_it_is_a_method_that_acts_again() -> None:
    assert SMALL.decode_time() is SMALL and (SMALL.interval, SMALL.window) == (8, WINDOW)
    assert RKV.budget_field is None
    assert isinstance(SMALL.compress(prompt(spans=())), Compressed) and SMALL.compress(prompt(spans=())).visual == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "prompt"}, "scope 'prompt' is neither 'generated' nor 'all'"),
        ({"window": 0}, "window 0: at least one"),
        ({"buffer": 7}, "buffer 7 is smaller than the window 8"),
        ({"budget_tokens": 8}, "budget_tokens 8 leaves no room beside the 8 observed"),
        ({"kernel": 4}, "kernel 4 is to be odd"),
        ({"mix": 1.1}, "mix 1.1 is the share"),
        ({"threshold": -2.0}, "threshold -2.0 is a cosine"),
        ({"beta": -1}, "beta -1 counts tokens"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RKV(**options)
