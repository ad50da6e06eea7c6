"""Coded compact capsules: what bits cost, that values make up for what was rounded before, and what is stored."""

from typing import Any

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, coded_compact_capsule, prefill, rand

from kvcapsule.codec.attention_matching import gather_rows
from kvcapsule.codec.coded_compact import CodedCompactConfig, CodedCompactLayer
from kvcapsule.codec.compact import CompactLayer
from kvcapsule.codec.row_rounding import ChannelMetric, codes_of_channels, codes_of_rows
from kvcapsule.errors import ConfigError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import BIAS_UNIT, Segment, storage_bytes

LONG, KEPT = 24, 12


def layer(bits: int, **options: Any) -> CodedCompactLayer:
    """A layer with a random bank, in the rows' own channels."""
    config = CodedCompactConfig(LONG, ratios=(KEPT / LONG,) * 2, bank=96, **options)
    built = config.build(GEOMETRY, 0)
    assert isinstance(built, CodedCompactLayer)
    built.bank.copy_(rand(*built.bank.shape, seed=9))
    built.value_in.copy_(torch.eye(DIM))
    built.value_out.copy_(torch.eye(DIM))
    for part in ("key", "value"):
        built.get_buffer(f"{part}_widths").fill_(bits)
        built.get_buffer(f"{part}_unit").fill_(4 / (2**bits - 1))
        built.get_buffer(f"{part}_centre").fill_(-2.0)
    return built


def tiles(entries: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    basis = rand(entries, HEADS, LONG, 4, seed=1).float()
    keys, values = (basis @ rand(entries, HEADS, 4, DIM, seed=s).float() for s in (2, 4))
    return 0.5 * keys, values + 0.1 * rand(entries, HEADS, LONG, DIM, seed=5).float()


def error(codec: CompactLayer, how: str = "encode") -> float:
    """Relative squared error of attention's output, over the tile alone, for queries of the bank."""
    keys, values = tiles()
    owner = torch.arange(len(keys))
    encoded = codec.encode(keys, values) if how == "encode" else CompactLayer.encode(codec, keys, values)
    query = codec.bank[None, :, :40].expand(len(keys), -1, -1, -1)
    truth = attend(query, [Segment(keys, values, owner)], DIM**-0.5)
    read = attend(query, [encoded.segment(owner, None)], DIM**-0.5)
    return float((read - truth).square().sum() / truth.square().sum())


def test_more_bits_come_nearer_to_the_rows_that_are_not_coded() -> None:
    errors = [error(layer(bits)) for bits in (2, 3, 4, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.1 * error(layer(7), "exact") + 1e-4


def test_rows_rounded_in_a_metric_make_up_for_each_other() -> None:
    """Against each row rounded by itself; and the first row that is rounded is rounded to the nearest."""
    rows = rand(3, HEADS, KEPT, DIM, seed=3).float()
    mixed = rand(3, HEADS, KEPT, 2 * KEPT, seed=4).float().abs()
    gram = mixed @ mixed.transpose(-1, -2) + 0.01 * torch.eye(KEPT)
    form = layer(3).codings().values
    grid = form.grid(form.side(rows), torch.float32)

    def cost(codes: torch.Tensor) -> float:
        lost = grid.values(codes) - rows
        return float((lost * (gram @ lost)).sum())

    together, alone = codes_of_rows(rows, gram, grid), grid.codes(rows)
    assert cost(together) < 0.6 * cost(alone)
    first = gram.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    assert torch.equal(gather_rows(together, first), gather_rows(alone, first))
    assert torch.equal(codes_of_rows(rows, torch.eye(KEPT).expand_as(gram), grid), alone)


def test_channels_rounded_in_the_queries_metric_make_up_for_each_other() -> None:
    """Against each channel rounded by itself; and the channel with the most to lose is rounded to the nearest."""
    rows, queries = rand(HEADS, 3, KEPT, DIM, seed=3).float(), rand(HEADS, 40, 3, seed=4).float()
    gram = queries @ rand(HEADS, 3, DIM, seed=5).float()
    gram = gram.transpose(1, 2) @ gram + 0.01 * torch.eye(DIM)
    form = layer(3).codings().keys
    grid = form.grid(form.side(rows.transpose(0, 1)), torch.float32).heads_first()
    spread = rows.std((1, 2))

    def cost(codes: torch.Tensor) -> float:
        lost = grid.values(codes) - rows
        return float((lost * (lost @ gram[:, None])).sum())

    metric = ChannelMetric.of(gram, spread)
    together, alone = codes_of_channels(rows, metric, grid), grid.codes(rows)
    assert cost(together) < 0.3 * cost(alone)
    first = (gram.diagonal(dim1=1, dim2=2) * spread.square()).argmax(-1)
    for head, channel in enumerate(first.tolist()):
        assert torch.equal(together[head, ..., channel], alone[head, ..., channel])
    even = ChannelMetric.of(torch.eye(DIM).expand(HEADS, -1, -1), spread)
    assert torch.equal(codes_of_channels(rows, even, grid), alone)
    torch.testing.assert_close(even.weight, torch.ones(HEADS, DIM))
    root = torch.linalg.det(gram.double())
    torch.testing.assert_close(metric.weight.double().prod(1), root, rtol=1e-2, atol=0)


def test_what_is_stored_is_rows_of_bits_a_byte_a_channel_with_bits_and_a_byte_a_row() -> None:
    codec = layer(3)
    codec.key_widths[0, 2] = 0  # type: ignore[index, operator]
    encoded = codec.encode(*tiles(1))
    rows = KEPT * 2 * HEADS * DIM * 3 // 8
    assert storage_bytes(encoded.tensors()) == rows + 2 * HEADS * DIM - 1 + HEADS * KEPT
    assert encoded.bias is not None and encoded.bias.dtype == torch.int8 and encoded.keys.q_map is None
    segment = encoded.segment(torch.zeros(1, dtype=torch.int64), None)
    torch.testing.assert_close(segment.score_bias(torch.float32), encoded.bias.float() * BIAS_UNIT)


def test_several_codings_of_the_same_tokens_are_each_what_it_is_alone() -> None:
    codec, keys = layer(4), layer(2).codings().keys
    ways = [codec.codings()._replace(keys=keys), codec.codings(), codec.codings()._replace(keys=keys, values=keys)]
    for way, together in zip(ways, codec.encode_with(*tiles(), ways), strict=True):
        (alone,) = codec.encode_with(*tiles(), [way])
        assert all(map(torch.equal, together.tensors(), alone.tensors()))


def test_tiles_and_heads_are_coded_alone_as_together() -> None:
    codec = layer(4)
    keys, values = tiles()
    together = codec.encode(keys, values)
    for i in range(len(keys)):
        alone = codec.encode(keys[i : i + 1], values[i : i + 1])
        for one, all_ in zip(alone.tensors(), together.tensors(), strict=True):
            assert torch.equal(one[0], all_[i])


def test_a_capsule_compresses_what_the_cache_gives_it() -> None:
    capsule = coded_compact_capsule()
    compressed = capsule.compress(prefill(spans=((0, 3, 2 * TILE),), rotary=True))
    (segment,) = compressed.visual
    keys, values = segment.materialize()
    assert segment.tokens == TILE // 2 and keys.shape == values.shape == (2, HEADS, TILE // 2, DIM)


@pytest.mark.parametrize(
    ("options", "message"), [({"latent_bits": 4}, "leave latent_bits out"), ({"ratios": (0.5,)}, "1 retention ratios")]
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodedCompactConfig(LONG, **{"ratios": (0.5, 0.5), **options}).build(GEOMETRY, 0)


@pytest.mark.parametrize(("name", "number"), [("key_widths", 8), ("value_widths", 9), ("key_unit", 0)])
def test_tensors_that_cannot_be_read_are_refused(name: str, number: int) -> None:
    codec = layer(4)
    codec.get_buffer(name)[..., 0] = number
    with pytest.raises(ConfigError, match=name):
        codec.check_tensors()
