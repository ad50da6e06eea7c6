"""A segment's shapes are checked, its rows can be chosen and repeated, and its bytes are those of its storages."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvcapsule.kernels.reference import attend
from kvcapsule.segments.packed_rows import Packed
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment, storage_bytes


def query(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1, 0], [2], [0, 0, 1, 1, 2, 2]])
def test_select_reads_as_the_chosen_rows(kind: str, rows: list[int], random_segment: Callable[..., Segment]) -> None:
    """Attention of the chosen rows over the chosen segment is that of the whole batch, row by row."""
    segments = [random_segment(kind, [1, 0, 1, 1], 1), random_segment("raw", [0, 1, 2], 2)]
    index = torch.tensor(rows)
    q = query(3)
    expected = attend(q, segments, 0.3)[index]
    torch.testing.assert_close(
        attend(q[index], [s.select(index) for s in segments], 0.3), expected, rtol=1e-12, atol=1e-12
    )


def test_select_is_the_segment_built_from_the_chosen_entries() -> None:
    keys = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    frame = Frame(torch.arange(4.0)[:, None].cos(), torch.arange(4.0)[:, None].sin())
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    segment = Segment(keys, keys + 10, torch.tensor([1, 0, 1, 3]), bias=keys[..., 0] + 20, mask=mask, frame=frame)
    chosen = segment.select(torch.tensor([3, 1, 1]))
    assert chosen.owner.tolist() == [0, 1, 1, 2, 2]
    entries = [3, 0, 2, 0, 2]
    assert torch.equal(chosen.keys, keys[entries])
    assert torch.equal(chosen.values, keys[entries] + 10)
    assert chosen.bias is not None and torch.equal(chosen.bias, keys[entries][..., 0] + 20)
    assert chosen.mask is not None and torch.equal(chosen.mask, mask[entries])
    assert chosen.frame is not None and torch.equal(chosen.frame.cos, frame.cos[entries])


def test_select_shares_the_maps(random_segment: Callable[..., Segment]) -> None:
    segment = random_segment("everything", [0, 1])
    chosen = segment.select(torch.tensor([1, 0, 0]))
    own = [t.data_ptr() for t in segment.parameter_tensors()]
    assert len(own) == 5
    assert [t.data_ptr() for t in chosen.parameter_tensors()] == own


@pytest.mark.parametrize("sets", [1, 2, 4])
def test_a_map_serves_neighbouring_heads(sets: int) -> None:
    """As if it were written down for each of them."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values, q = rand(3, 4, 5, 8), rand(3, 4, 6, 8), rand(2, 8, 3, 8)
    score_map, value_map, owner = rand(sets, 7, 5), rand(sets, 7, 6), torch.tensor([0, 1, 1])
    of_head = [head // (4 // sets) for head in range(4)]
    few = Segment(keys, values, owner, score_map=score_map, value_map=value_map)
    each = Segment(keys, values, owner, score_map=score_map[of_head], value_map=value_map[of_head])
    torch.testing.assert_close(attend(q, [few], 0.3), attend(q, [each], 0.3), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(few.materialize(torch.float64), each.materialize(torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(set(of_head)) == sets


def test_rows_without_entries_leave_an_empty_segment(random_segment: Callable[..., Segment]) -> None:
    segments = [random_segment("everything", [0, 0]), random_segment("raw", [0, 1], 1)]
    chosen = [s.select(torch.tensor([1])) for s in segments]
    assert chosen[0].keys.shape[0] == 0
    q = query(2)
    torch.testing.assert_close(attend(q[1:], chosen, 0.3), attend(q, segments, 0.3)[1:])


def test_tokens_are_logical(random_segment: Callable[..., Segment]) -> None:
    assert [random_segment(kind, [0]).tokens for kind in ("raw", "maps", "quantized", "mlp", "coded")] == [7] * 5
    assert isinstance(random_segment("quantized", [0]).keys, Packed)
    assert isinstance(random_segment("mlp", [0]).keys, Packed)
    assert isinstance(random_segment("coded", [0]).keys, Packed)


def test_storage_bytes_counts_views_once_and_whole() -> None:
    base = torch.zeros(10, 10)
    assert storage_bytes(iter([base[:1], base[2:3].t(), base])) == 400
    assert storage_bytes(iter([base[:1], base[:1].clone()])) == 440
    assert storage_bytes(iter([])) == 0
    assert storage_bytes(iter([torch.zeros(0), torch.zeros(0)])) == 0


def test_bytes_of_entries_and_of_parameters(random_segment: Callable[..., Segment]) -> None:
    segment = random_segment("everything", [0, 0, 1])
    keys, values, owner, bias, mask, frames = (
        3 * 2 * 3 * 4 * 8,
        3 * 2 * 4 * 4 * 8,
        3 * 8,
        3 * 2 * 7 * 8,
        3 * 7,
        2 * 3 * 4 * 8,
    )
    assert storage_bytes(segment.entry_tensors()) == keys + values + owner + bias + mask + frames
    maps = 2 * 7 * 3 + 2 * 7 * 4 + 2 * 4 + 2 * 8 * 4 + 2 * 4 * 8
    assert storage_bytes(segment.parameter_tensors()) == 8 * maps
    packed = random_segment("quantized", [0, 0, 1])
    codes = 3 * 2 * 8 * (2 + 8)  # 7 tokens, packed as 8: 2 bytes at 2 bits, 8 bytes at 8 bits
    steps_and_zeros = 4 * 3 * 2 * 8 * 8
    assert storage_bytes(packed.entry_tensors()) == codes + steps_and_zeros + owner
    mlp = random_segment("mlp", [0, 0, 1])
    assert storage_bytes(mlp.entry_tensors()) == 3 * 2 * 8 * 8 * (3 + 7) + owner
    assert storage_bytes(mlp.parameter_tensors()) == 4 * 2 * (5 * 3 + 5 + 7 * 5 + 7)
    coded = random_segment("coded", [0, 0, 1])
    assert storage_bytes(coded.entry_tensors()) == 3 * (6 * 3 + 12 * 3) + owner  # 6 and 12 cells, 3 bytes in the mean
    codings = 2 * 3 * (1 + 8 + 8 * 8) + 2 * 6 * (1 + 8 + 8 * 8)
    assert storage_bytes(coded.parameter_tensors()) == codings + 8 * 2 * (7 * 8 + 7 * 16 + 8 * 3 + 3 * 8)
    joint = random_segment("joint", [0, 0, 1])  # one set of two heads: 3 and 6 cells, widths 8 4 3 and all six
    assert storage_bytes(joint.entry_tensors()) == 3 * (15 + 18) + owner
    assert storage_bytes(joint.parameter_tensors()) == codings // 2 + 8 * (7 * 8 + 7 * 16) + 8 * 2 * (8 * 3 + 3 * 8)
    assert list(packed.parameter_tensors()) == list(random_segment("raw", [0]).parameter_tensors()) == []


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("values", (2, 2, 6, 8), "logical tokens must agree"),
        ("values", (1, 2, 7, 8), "entries, KV heads"),
        ("values", (2, 1, 7, 8), "entries, KV heads"),
        ("owner", (3,), "owners"),
        ("score_map", (2, 7, 6), "score_map .* does not map"),
        ("score_map", (3, 7, 7), "score_map .* does not map"),
        ("score_map", (4, 7, 7), "score_map .* does not map"),
        ("value_map", (2, 7, 6), "value_map .* does not map"),
        ("value_map", (3, 7, 7), "value_map .* does not map"),
        ("value_map", (2, 6, 7), "logical tokens must agree"),
        ("value_mean", (2, 7), "value_mean"),
        ("q_map", (2, 8, 7), "q_map"),
        ("q_map", (1, 8, 8), "q_map"),
        ("out_map", (2, 7, 8), "out_map"),
        ("bias", (2, 2, 6), "bias"),
        ("mask", (2, 1), "mask"),
        ("mask", (1, 7), "mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    part: str, shape: tuple[int, ...], message: str, random_segment: Callable[..., Segment]
) -> None:
    raw = random_segment("raw", [0, 1])
    with pytest.raises(ValueError, match=message):
        replace(raw, **{part: torch.zeros(shape, dtype=torch.int64 if part == "owner" else torch.float64)})


def test_frames_of_other_entries_are_refused(random_segment: Callable[..., Segment]) -> None:
    with pytest.raises(ValueError, match="frame"):
        replace(random_segment("raw", [0, 1]), frame=Frame(torch.ones(3, 4), torch.zeros(3, 4)))
