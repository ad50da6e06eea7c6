"""Attention over segments equals ordinary attention over all tokens that they stand for."""

from collections.abc import Callable

import pytest
import torch
from support.dense_attention import attention, expand

from kvcapsule.kernels import reference
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment

HEADS, DIM, SCALE = 2, 8, 0.3
OWNERS = ([0, 1, 1, 2], [2, 0], [1, 1, 0, 0, 2, 2])
"""Batch rows of three segments' entries: several for one row, none for another."""


def ordinary(query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None) -> torch.Tensor:
    return attention(query, segments, SCALE, visible)


def query_of(group: int, queries: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(
        3, HEADS * group, queries, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_each_kind_beside_a_tail(kind: str, group: int, queries: int, random_segment: Callable[..., Segment]) -> None:
    segments = [random_segment(kind, owner, seed) for seed, owner in enumerate(OWNERS)]
    segments.append(random_segment("raw", [0, 1, 2], 7))
    query = query_of(group, queries)
    torch.testing.assert_close(attend(query, segments, SCALE), ordinary(query, segments), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_mixed_segments_and_a_causal_tail(seed: int, random_segment: Callable[..., Segment]) -> None:
    kinds = ("raw", "everything", "quantized", "mask", "frame", "bias", "maps", "coded", "joint")
    generator = torch.Generator().manual_seed(seed)
    segments = []
    for i, which in enumerate(torch.randperm(len(kinds), generator=generator)[:4].tolist()):
        owner = torch.randint(
            0, 3, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator
        ).tolist()
        segments.append(random_segment(kinds[which], owner, 10 * seed + i))
    tail = random_segment("raw", [0, 1, 2], seed + 100)
    visible = torch.ones(3, 3, tail.tokens, dtype=torch.bool).tril(tail.tokens - 3)
    visible[1, :, :2] = False
    query = query_of(2, 3, seed)
    expected = ordinary(query, [*segments, tail], visible)
    torch.testing.assert_close(attend(query, [*segments, tail], SCALE, visible), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(attend(query, [*segments, tail], SCALE), expected)


def test_materialize_is_what_attention_reads(kind: str, random_segment: Callable[..., Segment]) -> None:
    segment = random_segment(kind, [0, 0, 1])
    keys, values = segment.materialize(torch.float64)
    for entry in range(3):
        for head in range(HEADS):
            k, v, _ = expand(segment, entry, head)
            there = slice(None) if segment.mask is None else segment.mask[entry]
            torch.testing.assert_close(keys[entry, head][there], k, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(values[entry, head][there], v, rtol=1e-10, atol=1e-10)


def test_entries_apart_are_what_they_are_together(kind: str, random_segment: Callable[..., Segment]) -> None:
    """Each entry attended to alone, and merged by the mass of its softmax: also where entries share an owner."""
    segment, query = random_segment(kind, OWNERS[2]), torch.randn(3, HEADS * 2, 1, DIM, dtype=torch.float64)
    out, mass = reference.segment_partial(query.view(3, HEADS, 2, 1, DIM), segment, SCALE)
    for row in range(3):
        own = (segment.owner == row).nonzero()[:, 0]
        weights = mass[own].softmax(dim=0)[..., None]
        merged = torch.where(weights > 0, weights * out[own], 0.0).sum(dim=0)
        expected = attend(query, [segment], SCALE)[row].view(HEADS, 2, DIM)
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_no_query_sees_may_hold_nan(dtype: torch.dtype, random_segment: Callable[..., Segment]) -> None:
    masked = random_segment("mask", [0, 1, 1, 2], 3, dtype)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1] * 7, [0] * 7, [0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    tail = random_segment("raw", [0, 1, 2], 4, dtype)
    visible = torch.ones(3, 2, tail.tokens, dtype=torch.bool).tril(tail.tokens - 2)
    visible[0, :, :3] = False
    absent = random_segment("everything", [0, 1, 2], 5, dtype)
    absent_mask = torch.zeros(3, absent.tokens, dtype=torch.bool)
    absent_mask[0] = True
    query = query_of(2, 2).to(dtype)

    def build(poison: float) -> list[Segment]:
        hidden, unseen = ~mask[:, None, :, None], ~visible.any(dim=1)[:, None, :, None]
        gone = ~absent_mask.any(dim=1)[:, None, None, None]
        return [
            Segment(
                masked.keys.masked_fill(hidden, poison),
                masked.values.masked_fill(hidden, poison),
                masked.owner,
                mask=mask,
            ),
            Segment(
                absent.keys.masked_fill(gone, poison),
                absent.values.masked_fill(gone, poison),
                absent.owner,
                score_map=absent.score_map,
                value_map=absent.value_map,
                q_map=absent.q_map,
                out_map=absent.out_map,
                mask=absent_mask,
            ),
            Segment(tail.keys.masked_fill(unseen, poison), tail.values.masked_fill(unseen, poison), tail.owner),
        ]

    out = attend(query, build(torch.nan), SCALE, visible)
    assert out.isfinite().all()
    torch.testing.assert_close(out, attend(query, build(0.0), SCALE, visible), rtol=0, atol=0)


def test_nan_that_a_query_sees_is_not_hidden(random_segment: Callable[..., Segment]) -> None:
    raw = random_segment("raw", [0, 1, 2])
    for part in ("keys", "values"):
        broken = getattr(raw, part).clone()
        broken[1, 0, 3] = torch.nan
        segment = Segment(**{"keys": raw.keys, "values": raw.values, "owner": raw.owner, part: broken})
        out = attend(query_of(1, 1), [segment], SCALE)
        assert out[1, 0].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_an_entry_without_a_visible_token_weighs_nothing(random_segment: Callable[..., Segment]) -> None:
    empty = random_segment("raw", [0, 1])
    empty = Segment(empty.keys, empty.values, empty.owner, mask=torch.tensor([[False] * 7, [True] + [False] * 6]))
    query = query_of(1, 1)
    raw = random_segment("raw", [0, 1, 2], 1)
    torch.testing.assert_close(
        attend(query, [empty, raw], SCALE)[[0, 2]], attend(query, [raw], SCALE)[[0, 2]], rtol=0, atol=1e-15
    )


def test_scores_of_thousands_neither_overflow_nor_vanish(random_segment: Callable[..., Segment]) -> None:
    raw, biased = random_segment("raw", [0, 1, 2], 1), random_segment("bias", [0, 1, 2], 2)
    query = 1e4 * query_of(2, 1)
    out = attend(query, [raw, biased], SCALE)
    torch.testing.assert_close(out, ordinary(query, [raw, biased]), rtol=1e-10, atol=1e-10)
    half = attend(query.bfloat16(), [random_segment("raw", [0, 1, 2], 1, torch.bfloat16)], SCALE)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_segments_share_one_softmax() -> None:
    """Two entries of a row with the masses 1 and 3 weigh 1/4 and 3/4."""
    masses, values = torch.tensor([1.0, 3.0]).log().view(2, 1, 1), torch.tensor([8.0, 4.0]).view(2, 1, 1, 1)
    two = Segment(torch.zeros(2, 1, 1, 1), values, torch.tensor([0, 0]), bias=masses)
    torch.testing.assert_close(attend(torch.ones(1, 1, 1, 1), [two], SCALE), torch.full((1, 1, 1, 1), 5.0))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 17])
def test_few_bit_rows_of_any_length(bits: int, tokens: int) -> None:
    """As the rows that they are read to."""
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (
        QuantizedRows.pack(torch.randn(3, HEADS, tokens, DIM, generator=generator, dtype=torch.float64), bits)
        for _ in range(2)
    )
    owner, query = torch.tensor([2, 0, 1]), query_of(2, 2)
    plain = Segment(keys.read(torch.float64), values.read(torch.float64), owner)
    torch.testing.assert_close(
        attend(query, [Segment(keys, values, owner)], SCALE), attend(query, [plain], SCALE), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_bit_rows_keep_a_mean_that_is_almost_zero(bits: int) -> None:
    """The mean of thousands of values is small beside the least of them, which a channel's codes count from."""
    generator = torch.Generator().manual_seed(bits)
    keys, values = (torch.randn(1, HEADS, 8192, DIM, generator=generator) for _ in range(2))
    segment = Segment(QuantizedRows.pack(keys, bits), QuantizedRows.pack(values, bits), torch.tensor([0]))
    query = 0.1 * torch.randn(1, HEADS, 1, DIM, generator=generator)
    truth = ordinary(query.double(), [segment])
    error = (attend(query, [segment], SCALE) - truth).norm() / truth.norm()
    assert error < 1e-5


@pytest.mark.parametrize("kind", ["coded", "joint", "quantized", "mlp", "everything"])
@pytest.mark.parametrize("at_once", [1, 300])
def test_packed_rows_in_pieces(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch, random_segment: Callable[..., Segment]
) -> None:
    """As all at once: an entry at a time, or a few with fewer left at the end."""
    segments = [random_segment(kind, [2, 0, 1, 1, 0], 1), random_segment("raw", [0, 1, 2], 2)]
    query = query_of(2, 2)
    whole = attend(query, segments, SCALE)
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    torch.testing.assert_close(attend(query, segments, SCALE), whole, rtol=0, atol=1e-12)


def test_errors(random_segment: Callable[..., Segment]) -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        attend(query_of(1, 1), [], SCALE)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        attend(torch.zeros(3, 3, 1, DIM), [random_segment("raw", [0, 1, 2])], SCALE)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    """Padding before the first token: its output is used by no one, but must not spoil a sum with what is not a
    number."""
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(2, 1, n, 4, generator=generator) for n in (3, 3, 2))
    visible = torch.ones(2, 2, 3, dtype=torch.bool)
    visible[1, 0] = False
    out = attend(query, [Segment(keys, values, torch.arange(2))], 0.5, visible)
    assert bool((out[1, :, 0] == 0).all())
    seen = attend(query, [Segment(keys, values, torch.arange(2))], 0.5)
    torch.testing.assert_close(out[0], seen[0])
    torch.testing.assert_close(out[1, :, 1], seen[1, :, 1])
