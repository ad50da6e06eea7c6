"""Canonical frames undo a tile's place in the prompt, for rotations as transformers makes them."""

from typing import Any

import pytest
import torch
from transformers import CohereConfig, LlamaConfig, Qwen2_5_VLTextConfig
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from kvcapsule.kernels.reference import attend
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

HEADS, TILE, DIM = 2, 5, 16
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}


def llama_rope(kind: str) -> LlamaRotaryEmbedding:
    shape = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "head_dim": DIM, "max_position_embeddings": 256}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=ROPES[kind]))


def keys_and_query(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, HEADS, TILE, DIM, generator=generator), torch.randn(3, HEADS, 1, DIM, generator=generator)


@pytest.mark.parametrize("kind", ROPES)
def test_back_is_the_tile_at_position_zero(kind: str) -> None:
    rope, (keys, query), firsts = llama_rope(kind), keys_and_query(), torch.tensor([0, 37, 190])
    positions = torch.arange(220).expand(3, -1)
    cos, sin = rope(keys, positions)
    frame = Frame.at(cos, sin, torch.arange(3), firsts)
    tile = firsts[:, None] + torch.arange(TILE)
    rotated, _ = apply_rotary_pos_emb(keys, keys, *rope(keys, tile))
    at_zero, _ = apply_rotary_pos_emb(keys, keys, *rope(keys, torch.arange(TILE).expand(3, -1)))
    assert not torch.allclose(rotated[1:], at_zero[1:], atol=0.1)
    torch.testing.assert_close(frame.unrotate(rotated), at_zero, rtol=0, atol=1e-4)
    torch.testing.assert_close(frame.rotate(frame.unrotate(rotated)), rotated, rtol=0, atol=1e-6)
    torch.testing.assert_close(frame.unrotate(rotated).norm(dim=-1), rotated.norm(dim=-1), rtol=1e-6, atol=0)
    # The stored tile and a query turned back give the scores of the model's own keys and query.
    rotated_query, _ = apply_rotary_pos_emb(query, query, *rope(query, torch.full((3, 1), 215)))
    expected = rotated_query @ rotated.transpose(-1, -2)
    torch.testing.assert_close(
        frame.unrotate(rotated_query) @ frame.unrotate(rotated).transpose(-1, -2), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [DIM, DIM // 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unrotate_into_memory_is_unrotate(interleaved: bool, turned: int, dtype: torch.dtype) -> None:
    """All channels turned or half of them; memory in which heads are outside."""
    (keys, _), angles = keys_and_query(), torch.arange(3 * turned // 2).view(3, -1) / 7
    frame = Frame(angles.cos(), angles.sin(), interleaved)
    out = torch.full((HEADS, 3, TILE, DIM), torch.nan, dtype=dtype).transpose(0, 1)
    frame.unrotate_into(keys.to(dtype), out)
    torch.testing.assert_close(out, frame.unrotate(keys.to(dtype)), rtol=0, atol=1e-6)


def test_yarn_has_a_factor_that_the_frame_leaves_out() -> None:
    rope, (keys, _) = llama_rope("yarn"), keys_and_query()
    assert rope.attention_scaling > 1.05
    cos, sin = rope(keys, torch.arange(50)[None])
    frame = Frame.at(cos, sin, torch.zeros(1, dtype=torch.int64), torch.tensor([40]))
    torch.testing.assert_close(frame.cos.square() + frame.sin.square(), torch.ones(1, DIM // 2))


def test_one_row_of_positions_serves_all_rows() -> None:
    rope, (keys, _), firsts = llama_rope("default"), keys_and_query(), torch.tensor([3, 4, 5])
    shared = Frame.at(*rope(keys, torch.arange(9)[None]), torch.arange(3), firsts)
    own = Frame.at(*rope(keys, torch.arange(9).expand(3, -1)), torch.arange(3), firsts)
    assert torch.equal(shared.cos, own.cos)
    assert torch.equal(shared.sin, own.sin)


def test_sections_of_mrope_turn_back_each_by_its_own_position() -> None:
    """An image of 4 x 6 tokens behind 11 of text, in tiles that begin in the middle of a row."""
    sections: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLTextConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, rope_parameters=sections
    )
    rope = Qwen2_5_VLRotaryEmbedding(config)
    index = torch.arange(24)
    grid = torch.stack([torch.full_like(index, 11), 11 + index // 6, 11 + index % 6])[:, None]
    keys = torch.randn(1, HEADS, 24, DIM, generator=torch.Generator().manual_seed(1))
    cos, sin = rope(keys, grid)
    assert cos.shape == (1, 24, DIM)
    rotated, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    for first in (0, 8, 16):
        frame = Frame.at(cos, sin, torch.tensor([0]), torch.tensor([first]))
        tile = slice(first, first + 8)
        own = grid[:, :, tile] - grid[:, :, first : first + 1]
        at_zero, _ = apply_rotary_pos_emb(keys[:, :, tile], keys[:, :, tile], *rope(keys, own))
        torch.testing.assert_close(frame.unrotate(rotated[:, :, tile]), at_zero, rtol=0, atol=1e-5)


def test_channels_that_are_not_rotated_stay() -> None:
    rope, (keys, _) = llama_rope("default"), keys_and_query()
    frame = Frame.at(*rope(keys, torch.arange(9)[None]), torch.arange(3), torch.tensor([3, 4, 5]))
    wide = torch.cat([keys, keys.flip(0)], dim=-1)
    torch.testing.assert_close(
        frame.unrotate(wide), torch.cat([frame.unrotate(keys), keys.flip(0)], dim=-1), rtol=0, atol=0
    )


def test_half_precision_is_rounded_once() -> None:
    rope, (keys, _) = llama_rope("default"), keys_and_query()
    frame = Frame.at(*rope(keys, torch.arange(99)[None]), torch.arange(3), torch.tensor([33, 44, 55]))
    half = keys.bfloat16()
    assert torch.equal(frame.unrotate(half), frame.unrotate(half.float()).bfloat16())
    assert frame.unrotate(keys.double()).dtype == torch.float64


def test_attention_turns_the_query_instead() -> None:
    rope, (keys, query) = llama_rope("default"), keys_and_query()
    firsts, owner = torch.tensor([8, 20, 31]), torch.tensor([0, 2, 0])
    tile = firsts[:, None] + torch.arange(TILE)
    rotated, _ = apply_rotary_pos_emb(keys, keys, *rope(keys, tile))
    frame = Frame.at(*rope(keys, torch.arange(40)[None]), owner, firsts)
    tail = Segment(keys[:, :, :2], keys[:, :, 2:4], torch.arange(3))
    expected = attend(query, [Segment(rotated, keys, owner), tail], 0.25)
    torch.testing.assert_close(
        attend(query, [Segment(frame.unrotate(rotated), keys, owner, frame=frame), tail], 0.25), expected
    )
    assert not torch.allclose(
        attend(query, [Segment(frame.unrotate(rotated), keys, owner), tail], 0.25), expected, atol=1e-3
    )


def test_select() -> None:
    frame = Frame(torch.arange(6.0).view(3, 2), -torch.arange(6.0).view(3, 2))
    chosen = frame.select(torch.tensor([2, 0, 2]))
    assert chosen.cos.tolist() == [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]
    assert chosen.sin.tolist() == [[-4.0, -5.0], [0.0, -1.0], [-4.0, -5.0]]


def test_neighbouring_channels() -> None:
    """Cohere's and GLM's way: channels 2 i and 2 i + 1 turn together."""
    rope, (keys, _), firsts = (
        CohereRotaryEmbedding(CohereConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS)),
        keys_and_query(),
        (4, 9),
    )
    frame = Frame.at(*rope(keys, torch.arange(20)[None]), torch.zeros(2, dtype=torch.int64), torch.tensor(firsts))
    assert frame.interleaved and frame.cos.shape == (2, DIM // 2)
    assert frame.select(torch.tensor([1])).interleaved
    at_zero, _ = rotate_neighbours(keys[:2], keys[:2], *rope(keys, torch.arange(TILE)[None]))
    rotated = torch.cat(
        [
            rotate_neighbours(keys[i, None], keys[i, None], *rope(keys, first + torch.arange(TILE)[None]))[0]
            for i, first in enumerate(firsts)
        ]
    )
    assert not torch.allclose(rotated, at_zero, atol=0.1)
    torch.testing.assert_close(frame.unrotate(rotated), at_zero, rtol=0, atol=1e-5)
    torch.testing.assert_close(frame.rotate(at_zero), rotated, rtol=0, atol=1e-5)
    wide = torch.cat([rotated, keys[:2]], dim=-1)
    torch.testing.assert_close(frame.unrotate(wide), torch.cat([at_zero, keys[:2]], dim=-1), rtol=0, atol=1e-5)


def test_a_rotation_that_pairs_channels_otherwise_is_refused() -> None:
    angles = torch.arange(9.0)[None, :, None] * torch.arange(1.0, DIM + 1)
    with pytest.raises(ValueError, match="canonical_frame=False"):
        Frame.at(angles.cos(), angles.sin(), torch.tensor([0]), torch.tensor([4]))


def test_one_rotation_per_position_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1, 9, 16\).*one rotation a token"):
        Frame.at(torch.ones(3, 1, 9, DIM), torch.zeros(3, 1, 9, DIM), torch.tensor([0]), torch.tensor([4]))
