"""Transform code: coefficients and what is read of them, attention over the codes themselves, the whole capsule and its
files."""

import dataclasses

import pytest
import torch
from support import slow_decode
from support.builders import DIM, GEOMETRY, HEADS, TILE, prefill, rand, random_widths, transform_capsule
from support.transform_tiles import SIZES

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.bit_allocation import DISTORTION, SCALE
from kvcapsule.codec.transform import Transform, TransformConfig, TransformValues
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.segment import Segment, storage_bytes

TILES = [(0, 3), (0, 13), (1, 5)]
"""Row and first position of the tiles of `prefill`; four tokens of the first image fill no tile."""


@pytest.fixture(params=[1, 2], ids=["each head", "heads together"])
def joint(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def tiles_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor[row, :, start : start + TILE] for row, start in TILES])


def identity_transform(tile: int = 16, step: float = 0.05) -> Transform:
    """All components and all channels of one head in 8 bits: nothing is lost but what rounding to a step loses."""
    transform = (
        Transform(head_groups=1, heads=1, tile=tile, dim=DIM, rows=tile, channels=DIM).double().requires_grad_(False)
    )
    for matrix in (transform.tokens_in, transform.tokens_out, transform.channels_in, transform.channels_out):
        matrix.copy_(torch.eye(matrix.shape[1]))
    transform.widths.fill_(8)
    transform.step.fill_(step)
    return transform


# One layer's codec


def test_coefficients_by_hand() -> None:
    """A tile of two tokens and two channels: the first component is their sum, its channels are swapped and the second
    one doubled."""
    transform = Transform(head_groups=1, heads=1, tile=2, dim=2, rows=8, channels=2).requires_grad_(False)
    transform.tokens_in[0, 0] = torch.tensor([1.0, 1.0])
    transform.tokens_in[0, 7] = torch.tensor([1.0, -1.0])
    transform.channels_in.copy_(torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]))
    found = transform.coefficients(torch.tensor([[1.0, 2.0], [3.0, 5.0]])[None, None])[0, 0]
    assert found.tolist() == [[7.0, 8.0], *[[0.0, 0.0]] * 6, [-3.0, -4.0]]


def test_heads_of_a_set_lie_side_by_side() -> None:
    """Four heads of three channels in two sets: channel 4 of the second set is the second channel of the fourth
    head."""
    transform = Transform(head_groups=2, heads=2, tile=5, dim=3, rows=8, channels=6).requires_grad_(False)
    transform.tokens_in[:, :5] = torch.eye(5)
    transform.channels_in.copy_(torch.eye(6))
    x = torch.randn(7, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    found = transform.coefficients(x)
    assert found.shape == (7, 2, 8, 6)
    for channel in range(6):
        assert torch.equal(found[:, 1, :5, channel], x[:, 2 + channel // 3, :, channel % 3])


def test_reading_by_hand() -> None:
    """One coefficient of 1 bit and step 4 about 10 reads as 8 or 12; both tokens have half of it in their second
    channel."""
    transform = Transform(head_groups=1, heads=1, tile=2, dim=2, rows=8, channels=1).requires_grad_(False)
    transform.tokens_in[0, 0] = 1.0
    transform.tokens_out[0, :, 0] = 0.5
    transform.channels_in.copy_(torch.tensor([[[0.0], [1.0]]]))
    transform.channels_out.copy_(torch.tensor([[[0.0], [1.0]]]))
    transform.offset[0, 0] = 10.0
    transform.step.fill_(4.0)
    transform.widths.fill_(1)
    part = TransformValues(transform).encode(torch.tensor([[[[3.0, 2.0], [4.0, 5.0]]], [[[0.0, 70.0], [0.0, 1.0]]]]))
    segment = Segment(
        torch.zeros(2, 1, 2, 2), part.values, torch.tensor([0, 1]), value_map=part.value_map, out_map=part.out_map
    )
    assert segment.materialize()[1][:, 0].tolist() == [[[0.0, 4.0], [0.0, 4.0]], [[0.0, 6.0], [0.0, 6.0]]]
    assert isinstance(part.values, CodedRows)
    assert part.values.packed.tolist() == [[0b11111110], [0b11111111]]


def test_all_components_in_fine_steps_give_the_tile_back() -> None:
    transform = identity_transform()
    values = rand(3, 1, 16, DIM, seed=4)
    part = TransformValues(transform).encode(values)
    segment = Segment(values, part.values, torch.arange(3), value_map=part.value_map, out_map=part.out_map)
    error = (segment.materialize(torch.float64)[1] - values).abs()
    assert values.abs().max() < 127 * 0.05
    assert 0.02 < error.max() <= 0.025 + 1e-12


def test_what_is_read_is_the_decoder_of_the_codes(joint: int) -> None:
    """By the module's equation, a head at a time, from bytes that are decoded one by one; keys in the frame of their
    tile."""
    capsule, of = transform_capsule(joint_heads=joint), prefill(1)
    segment = capsule.compress(of).visual[0]
    layer = capsule.layers[1]
    assert segment.owner.tolist() == [row for row, _ in TILES]
    assert segment.frame is not None
    keys, values = segment.materialize(torch.float64)
    in_frame = (tiles_of(of.keys), segment.frame.unrotate(tiles_of(of.keys)))
    assert not torch.allclose(*in_frame, atol=0.1)
    for rows, codec, read, x in (
        (segment.keys, layer.keys.transform, segment.frame.unrotate(keys), in_frame[1]),
        (segment.values, layer.values.transform, values, tiles_of(of.values)),
    ):
        encoded = CodedRows.encode(_coefficients(codec, x, joint), codec.coding())
        assert torch.equal(rows.packed, encoded.packed)
        for entry in range(len(TILES)):
            for head in range(HEADS):
                own, within = divmod(head, joint)
                channels_out = codec.channels_out[own].double()[within * DIM : (within + 1) * DIM]
                expected = codec.tokens_out[own].double() @ slow_decode.coded(rows, entry, head) @ channels_out.T
                torch.testing.assert_close(read[entry, head], expected, rtol=1e-10, atol=1e-10)


def _coefficients(transform: Transform, x_EHTD: torch.Tensor, joint: int) -> torch.Tensor:
    """[E, S, M, C] of each set in turn."""
    found = []
    for own in range(HEADS // joint):
        wide = torch.cat([x_EHTD[:, own * joint + within] for within in range(joint)], dim=-1)
        found.append(transform.tokens_in[own].double() @ wide @ transform.channels_in[own].double())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("width", WIDTHS)
def test_error_of_a_gaussian_is_the_one_that_allocation_counts_on(width: int) -> None:
    """The integral over its density, point by point."""
    transform = identity_transform(step=SCALE[width])
    transform.widths.fill_(width)
    values = torch.linspace(-7, 7, 1000 * 16 * DIM, dtype=torch.float64).view(1000, 1, 16, DIM)
    part = TransformValues(transform).encode(values)
    assert isinstance(part.values, CodedRows)
    assert part.values.packed.shape == (1000, width * 2 * DIM)
    density = (-values.square() / 2).exp()
    error = (density * (part.values.read(torch.float64) - values).square()).sum() / density.sum()
    assert float(error) == pytest.approx(DISTORTION[width], rel=1e-2)


def test_without_any_bits_every_tile_reads_as_the_mean(joint: int) -> None:
    capsule, of = transform_capsule(joint_heads=joint), prefill()
    for layer in capsule.layers:
        layer.keys.transform.widths.zero_()
        layer.values.transform.widths.zero_()
    segment = capsule.compress(of).visual[0]
    assert storage_bytes(iter((*segment.keys.tensors(), *segment.values.tensors()))) == 0
    codec = capsule.layers[0].values.transform
    mean = codec.tokens_out @ codec.offset @ codec.channels_out.transpose(1, 2)
    expected = torch.cat([mean[head // joint][:, DIM * (head % joint) :][:, :DIM] for head in range(HEADS)]).view(
        HEADS, TILE, DIM
    )
    read = segment.materialize()[1]
    torch.testing.assert_close(read, expected.expand_as(read), rtol=1e-5, atol=1e-5)
    assert attend(of.query, [segment], of.scale).isfinite().all()


def test_an_untrained_codec_reads_zeros() -> None:
    capsule = Capsule(CapsuleConfig("transform", TransformConfig(TILE, **SIZES), GEOMETRY, "tiny"))
    keys, values = capsule.compress(prefill()).visual[0].materialize()
    assert not keys.any() and not values.any()


def test_half_precision_is_coded_from_its_own_numbers() -> None:
    """Codes of bfloat16 tiles are those of the same numbers in float32, and codes are all that is kept of them."""
    capsule, of = transform_capsule(canonical_frame=False), prefill()
    half = dataclasses.replace(of, keys=of.keys.bfloat16(), values=of.values.bfloat16(), query=of.query.bfloat16())
    full = dataclasses.replace(half, keys=half.keys.float(), values=half.values.float(), shared={})
    ours, theirs = capsule.compress(half).visual[0], capsule.compress(full).visual[0]
    assert torch.equal(ours.keys.packed, theirs.keys.packed)
    assert torch.equal(ours.values.packed, theirs.values.packed)
    assert attend(half.query, [ours], of.scale).dtype == torch.bfloat16


# The coding that is kept


def test_the_coding_is_made_once_for_all_calls() -> None:
    transform = identity_transform()
    first = transform.encode(rand(1, 1, 16, DIM))
    assert transform.encode(rand(2, 1, 16, DIM)).coding is first.coding
    assert transform.coding().layout is first.coding.layout


@pytest.mark.parametrize("assign", [False, True])
def test_a_coding_does_not_outlive_its_parameters(assign: bool) -> None:
    """What is loaded into a codec that has encoded before is what it encodes with afterwards."""
    used, other = transform_capsule(), transform_capsule()
    generator = torch.Generator().manual_seed(9)
    for layer in other.layers:
        for codec in (layer.keys.transform, layer.values.transform):
            codec.widths.copy_(random_widths(tuple(codec.widths.shape), generator))
            codec.step.copy_(6 / 2.0 ** codec.widths.float())
    before = used.compress(prefill()).visual[0]
    used.load_state_dict(other.state_dict(), assign=assign)
    after, expected = used.compress(prefill()).visual[0], other.compress(prefill()).visual[0]
    assert torch.equal(after.keys.packed, expected.keys.packed)
    for ours, theirs in zip(after.materialize(), expected.materialize(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(before.keys.packed, expected.keys.packed)


def test_widths_that_are_written_in_place_are_noticed() -> None:
    transform, x = identity_transform(), rand(1, 1, 16, DIM)
    assert transform.encode(x).packed.shape[1] == 2 * DIM * 8
    transform.widths[0, 1] = 3
    coded = transform.encode(x)
    assert coded.packed.shape[1] == DIM * (8 + 3)
    torch.testing.assert_close(coded.read(torch.float64)[0, 0], slow_decode.coded(coded, 0, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["step", "offset"])
def test_a_parameter_that_is_replaced_is_read(name: str) -> None:
    transform, x = identity_transform(), rand(1, 1, 16, DIM)
    assert (transform.encode(x).read(torch.float64) - x).abs().max() < 0.03
    setattr(transform, name, torch.nn.Parameter(torch.full_like(getattr(transform, name), 100.0)))
    assert (transform.encode(x).read(torch.float64) - x).abs().max() > 30


def test_a_capsule_made_in_inference_mode_encodes_alike() -> None:
    """Its tensors count no versions."""
    expected = transform_capsule().compress(prefill()).visual[0]
    with torch.inference_mode():
        found = transform_capsule().compress(prefill()).visual[0]
    assert torch.equal(found.keys.packed, expected.keys.packed)
    assert torch.equal(found.values.packed, expected.values.packed)


def test_a_cast_capsule_reads_with_the_cast_parameters() -> None:
    capsule = transform_capsule()
    codec = capsule.layers[0].keys.transform
    assert codec.coding().scale.dtype == torch.float32
    capsule.double()
    assert codec.coding().scale.dtype == codec.coding().offset.dtype == torch.float64


# Attention


@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_over_codes_is_attention_over_what_they_stand_for(frames: bool, queries: int, joint: int) -> None:
    """Several tiles, the raw remainder, the text and a raw tail, all in one softmax; in float64."""
    of = prefill(1)
    visual, text = transform_capsule(canonical_frame=frames, joint_heads=joint).compress(of)
    coded = visual[0]
    assert (coded.frame is not None) == frames
    tail = Segment(rand(2, HEADS, 4, DIM, seed=11), rand(2, HEADS, 4, DIM, seed=12), torch.arange(2))
    others = [*visual[1:], *text, tail]
    query = rand(2, 4, queries, DIM, seed=13)
    written_out = Segment(*coded.materialize(torch.float64), coded.owner)
    expected = attend(query, [written_out, *others], of.scale)
    torch.testing.assert_close(attend(query, [coded, *others], of.scale), expected, rtol=1e-10, atol=1e-10)
    everything = Segment(of.keys, of.values, torch.arange(2))
    assert not torch.allclose(attend(query, [everything, tail], of.scale), expected, atol=1e-2)
    assert not torch.allclose(attend(query, others, of.scale), expected, atol=1e-2)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_the_order_of_tiles_and_their_segments_does_not_matter(order: list[int], joint: int) -> None:
    of = prefill()
    visual, text = transform_capsule(joint_heads=joint).compress(of)
    coded, rest = visual[0], [*visual[1:], *text]
    expected = attend(of.query, [coded, *rest], of.scale)

    def entries(index: list[int]) -> Segment:
        chosen = torch.tensor(index)
        keys, values = coded.keys.select(chosen), coded.values.select(chosen)
        return dataclasses.replace(
            coded, keys=keys, values=values, owner=coded.owner[chosen], frame=coded.frame.select(chosen)
        )

    torch.testing.assert_close(attend(of.query, [entries(order), *rest], of.scale), expected, rtol=1e-12, atol=1e-12)
    apart = [entries([entry]) for entry in order]
    torch.testing.assert_close(attend(of.query, [*apart, *rest], of.scale), expected, rtol=1e-12, atol=1e-12)
    wrong = dataclasses.replace(entries(order), frame=coded.frame)
    assert not torch.allclose(attend(of.query, [wrong, *rest], of.scale), expected, atol=1e-3)


def test_rows_can_be_chosen_and_repeated() -> None:
    of = prefill()
    visual, text = transform_capsule().compress(of)
    segments, rows = [*visual, *text], torch.tensor([1, 0, 0])
    expected = attend(of.query, segments, of.scale)[rows]
    found = attend(of.query[rows], [s.select(rows) for s in segments], of.scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
