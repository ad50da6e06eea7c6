"""Stored spans: bytes of every family and back, what is refused, and the digest that binds them to a capsule."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support.builders import EVERY_FAMILY, GEOMETRY, TILE, cross_layer_capsule, identity_capsule, transform_capsule
from support.stored_spans import stored_span

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.capsule.digest import capsule_digest
from kvcapsule.capsule.stored_span import StoredSpan, from_bytes, read_header, to_bytes
from kvcapsule.codec import CodecConfig, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from kvcapsule.codec.identity import IdentityConfig, IdentityKeys, IdentityValues
from kvcapsule.errors import CapsuleError
from kvcapsule.segments.packed_rows import stored_tensors
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.geometry import KVGeometry

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=EVERY_FAMILY, ids=str)
def family(request: pytest.FixtureRequest) -> Callable[..., Capsule]:
    return EVERY_FAMILY[request.param]


def maps(segment: Segment) -> list[torch.Tensor]:
    return list(segment.parameter_tensors())


def assert_equal(one: StoredSpan, other: StoredSpan) -> None:
    assert one.header == other.header
    for ours, theirs in ((one.visual, other.visual), (one.text, other.text)):
        assert list(ours) == list(theirs) == list(one.header.layers)
        for layer in ours:
            for s, t in zip(ours[layer], theirs[layer], strict=True):
                assert (s.tag, s.each_row, s.tokens) == (t.tag, t.each_row, t.tokens)
                for a, b in zip((*s.entry_tensors(), *maps(s)), (*t.entry_tensors(), *maps(t)), strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b)
                read, expected = s.materialize(torch.float64), t.materialize(torch.float64)
                assert all(map(torch.equal, read, expected))


class TestBytesAndBack:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_family(self, family: Callable[..., Capsule], dtype: torch.dtype) -> None:
        capsule = family(GEOMETRY)
        span = stored_span(capsule, dtype=dtype)
        data = to_bytes(span, capsule)
        back = from_bytes(data, capsule)
        assert_equal(back, span)
        assert to_bytes(back, capsule) == data
        assert read_header(data) == span.header

    @pytest.mark.parametrize(("length", "text"), [(20, 0), (10, 1), (3, 2), (9, 0), (11, 0)])
    def test_of_any_length(self, family: Callable[..., Capsule], length: int, text: int) -> None:
        """Tiles alone, a rest, no tile, no text."""
        capsule = family(GEOMETRY)
        span = stored_span(capsule, length, text)
        assert_equal(from_bytes(to_bytes(span, capsule), capsule), span)
        assert [len(span.visual[0]), len(span.text[0])] == [(length >= TILE) + (length % TILE > 0), int(text > 0)]

    @pytest.mark.parametrize(("length", "text", "tiles"), [(24, 3, 2), (20, 5, 2), (23, 1, 1), (11, 2, 0), (3, 1, 0)])
    def test_tiles_at_blocks(self, family: Callable[..., Capsule], length: int, text: int, tiles: int) -> None:
        """Raw tokens before the first tile and behind the last are one piece."""
        capsule = family(GEOMETRY, align=5)
        span = stored_span(capsule, length, text)
        assert (span.header.tiles, span.header.rest) == (tiles, length - tiles * TILE)
        data = to_bytes(span, capsule)
        assert_equal(from_bytes(data, capsule), span)
        with pytest.raises(CapsuleError, match=r"made by the capsule"):
            from_bytes(data, family(GEOMETRY))

    def test_another_loaded_copy_of_the_capsule_reads_it(self, family: Callable[..., Capsule], tmp_path: Path) -> None:
        capsule = family(GEOMETRY)
        span = stored_span(capsule)
        capsule.save_pretrained(tmp_path / "c")
        loaded = Capsule.from_pretrained(tmp_path / "c")
        data = to_bytes(span, capsule)
        assert_equal(from_bytes(data, loaded), span)
        assert to_bytes(stored_span(loaded), loaded) == data

    def test_the_same_bytes_whatever_the_memory_looks_like(self, family: Callable[..., Capsule]) -> None:
        """Strides, and whether shared tensors are one object, do not show."""
        capsule = family(GEOMETRY)
        span = stored_span(capsule)
        moved = ({layer: [s.to("cpu") for s in segments] for layer, segments in part.items()} for part in span[1:])
        copied = StoredSpan(span.header, *moved)
        apart = copy.deepcopy(copied)
        for segments in apart.text.values():
            segments[0] = replace(segments[0], keys=segments[0].keys.transpose(1, 2).contiguous().transpose(1, 2))
        assert to_bytes(apart, capsule) == to_bytes(copied, capsule) == to_bytes(span, capsule)
        assert to_bytes(stored_span(capsule, seed=1), capsule) != to_bytes(span, capsule)

    def test_in_inference_mode(self, family: Callable[..., Capsule]) -> None:
        capsule = family(GEOMETRY)
        with torch.inference_mode():
            span = stored_span(capsule, dtype=torch.bfloat16)
            back = from_bytes(to_bytes(span, capsule), capsule)
        assert all(not t.is_inference() for segments in back.visual.values() for s in segments for t in maps(s))

    def test_what_layers_share_is_stored_once_and_shared_again(self) -> None:
        geometry = replace(GEOMETRY, layers=5)
        capsule = cross_layer_capsule(geometry, joint_layers=2)
        span = stored_span(capsule)
        tensors = load(to_bytes(span, capsule))
        rows = [name for name in tensors if "rest" not in name and "text" not in name]
        assert sorted(rows) == ["frame.cos", "frame.sin", *(f"layers.{group}.keys.0" for group in (0, 2, 4))]
        tiles = [segments[0] for segments in from_bytes(to_bytes(span, capsule), capsule).visual.values()]
        assert len({id(s.keys) for s in tiles}) == 3 and all(s.keys is s.values for s in tiles)
        assert len({id(s.frame) for s in tiles}) == len({id(s.owner) for s in tiles}) == 1
        assert all(s.keys.coding is capsule.layers[i // 2].transform.coding() for i, s in enumerate(tiles))

    def test_maps_are_the_capsules(self, family: Callable[..., Capsule]) -> None:
        """No map is in the bytes, and spans of one capsule share theirs."""
        capsule = family(GEOMETRY)
        spans = [from_bytes(to_bytes(stored_span(capsule, seed=seed), capsule), capsule) for seed in (0, 1)]
        for layer in range(GEOMETRY.layers):
            one, other = (maps(span.visual[layer][0]) for span in spans)
            assert [t.data_ptr() for t in one] == [t.data_ptr() for t in other]

    def test_any_reader_of_safetensors_reads_it(self) -> None:
        capsule = transform_capsule(GEOMETRY)
        span = stored_span(capsule)
        tensors = load(to_bytes(span, capsule))
        assert torch.equal(tensors["layers.1.values.0"], stored_tensors(span.visual[1][0].values)[0])
        assert torch.equal(tensors["layers.0.text.keys"], span.text[0][0].keys)
        assert torch.equal(tensors["frame.cos"], span.visual[0][0].frame.cos)

    def test_channels_that_do_not_rotate(self) -> None:
        """Partial rotary: the frame is narrower than half a head."""
        capsule = transform_capsule(GEOMETRY)
        span = stored_span(capsule)
        for segments in span.visual.values():
            frame = segments[0].frame
            segments[0] = replace(segments[0], frame=replace(frame, cos=frame.cos[:, :3], sin=frame.sin[:, :3]))
        assert_equal(from_bytes(to_bytes(span, capsule), capsule), span)

    def test_some_layers_of_a_group(self) -> None:
        """A model may have layers that are not in the capsule's passes."""
        geometry = replace(GEOMETRY, layers=4)
        capsule = cross_layer_capsule(geometry, joint_layers=4)
        full = stored_span(capsule)
        some = replace(full.header, layers=(1, 3))
        span = StoredSpan(some, *({layer: part[layer] for layer in some.layers} for part in full[1:]))
        assert_equal(from_bytes(to_bytes(span, capsule), capsule), span)


class TestDigest:
    def test_equal_capsules(self, family: Callable[..., Capsule], tmp_path: Path) -> None:
        capsule = family(GEOMETRY)
        digest = capsule_digest(capsule)
        assert len(digest) == 64 and int(digest, 16) and capsule_digest(capsule) == digest
        capsule.save_pretrained(tmp_path / "c")
        assert capsule_digest(Capsule.from_pretrained(tmp_path / "c")) == digest
        assert capsule_digest(copy.deepcopy(capsule)) == capsule_digest(family(GEOMETRY)) == digest
        noted = copy.deepcopy(capsule)
        noted.config = replace(noted.config, metadata={"samples": 3}, base_revision="abc")
        assert capsule_digest(noted) == digest

    def test_families_and_settings_differ(self) -> None:
        digests = {capsule_digest(build(GEOMETRY)) for build in EVERY_FAMILY.values()}
        assert len(digests) == len(EVERY_FAMILY)
        other = replace(GEOMETRY, query_heads=8)
        assert capsule_digest(identity_capsule(other)) not in digests
        assert capsule_digest(identity_capsule(GEOMETRY, tile=TILE + 1)) not in digests

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.layers[1].values.transform.channels_in[0, 0, 0].add_(1e-3),
            lambda c: c.layers[0].keys.transform.widths[0, 0, 0].bitwise_xor_(1),
            lambda c: c.load_state_dict({n: t + 1 for n, t in c.state_dict().items()}, assign=True),
            lambda c: c.bfloat16(),
            lambda c: c.layers[0].half(),
            lambda c: c.half().float(),
            lambda c: setattr(
                c.layers[0].keys.transform, "step", torch.nn.Parameter(c.layers[0].keys.transform.step * 2)
            ),
        ],
    )
    def test_changed_parameters_are_noticed(self, change: Callable[[Any], object]) -> None:
        capsule = transform_capsule(GEOMETRY)
        span = stored_span(capsule)
        data, before = to_bytes(span, capsule), capsule_digest(capsule)
        with torch.no_grad():
            change(capsule)
        assert capsule_digest(capsule) != before
        for use in (lambda: from_bytes(data, capsule), lambda: to_bytes(span, capsule)):
            with pytest.raises(CapsuleError, match=f"made by the capsule {before[:16]}"):
                use()

    def test_it_is_computed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        capsule = transform_capsule(GEOMETRY)
        capsule_digest(capsule)
        monkeypatch.setattr("kvcapsule.capsule.digest._digest", lambda capsule: "again")
        assert capsule_digest(capsule) != "again"
        capsule.computed.forget()
        assert capsule_digest(capsule) == "again"


class _Doubled:
    """Packed rows of another package: a tensor that is read doubled, or times a number that no tensor shows."""

    def __init__(self, rows: torch.Tensor, factor: float = 2) -> None:
        self.rows, self.factor = rows, factor

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        return self.factor * self.rows.to(dtype)

    def select(self, index: torch.Tensor) -> "_Doubled":
        return type(self)(self.rows[index], self.factor)

    def to(self, device: torch.device | str) -> "_Doubled":
        return type(self)(self.rows.to(device), self.factor)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.rows,)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()


class _Storable(_Doubled):
    def with_tensors(self, tensors: Any) -> "_Storable":
        return _Storable(tensors[0], self.factor)


class _Keys(KeyCodec):
    def __init__(self, make: Callable[[torch.Tensor], KeyPart]) -> None:
        super().__init__()
        self.make = make

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return self.make(k_EHTD)


class _MeanValues(ValueCodec):
    """The mean value of the images themselves as a map."""

    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        mean = v_EHTD.mean((0, 2))
        return ValuePart(v_EHTD - mean[:, None], value_mean=mean)


def foreign_capsule(keys: KeyCodec, values: ValueCodec) -> Capsule:
    class Config(IdentityConfig):
        def build(self, geometry: KVGeometry, layer: int) -> PairCodec:
            return PairCodec(keys, values)

    config: CodecConfig = Config(TILE)
    return Capsule(CapsuleConfig("foreign", config, GEOMETRY, "tiny"))


class TestFamiliesOfOtherPackages:
    @pytest.mark.parametrize(
        "make",
        [
            lambda k: KeyPart(_Storable(k)),
            lambda k: KeyPart(k[:, :, ::2].clone(), score_map=torch.ones(2, TILE, 5, dtype=k.dtype)),
            lambda k: KeyPart(_Storable((k * 10).to(torch.int8), 0.1)),
        ],
    )
    def test_served(self, make: Callable[[torch.Tensor], KeyPart]) -> None:
        capsule = foreign_capsule(_Keys(make), IdentityValues())
        span = stored_span(capsule)
        assert_equal(from_bytes(to_bytes(span, capsule), capsule), span)

    @pytest.mark.parametrize(
        ("keys", "values", "message"),
        [
            (_Keys(lambda k: KeyPart(_Doubled(k))), IdentityValues(), "family foreign cannot be stored: its _Doubled"),
            (IdentityKeys(), _MeanValues(), "value_mean are not the same for every tile"),
            (_Keys(lambda k: KeyPart(_Storable(k, float(k.abs().max())))), IdentityValues(), "keys are not the same"),
            (_Keys(lambda k: KeyPart(k > 0)), IdentityValues(), r"torch\.bool cannot be stored"),
            (_Keys(lambda k: KeyPart(k[:, :, : 3 + len(k)], torch.ones(1, TILE, 3 + len(k)))), IdentityValues(), "map"),
        ],
        ids=[
            "no with_tensors",
            "a map of the image",
            "a number of the image",
            "a dtype",
            "rows by the number of tiles",
        ],
    )
    def test_refused(self, keys: KeyCodec, values: ValueCodec, message: str) -> None:
        capsule = foreign_capsule(keys, values)
        with pytest.raises(CapsuleError, match=message):
            to_bytes(stored_span(capsule), capsule)


def changed(span: StoredSpan, layer: int, part: int, **fields: Any) -> StoredSpan:
    """The span with other fields in one visual segment."""
    segments = list(span.visual[layer])
    segments[part] = replace(segments[part], **fields)
    return span._replace(visual={**span.visual, layer: segments})


class TestSpansThatAreNotWhatTheirHeaderSays:
    """Refused when they are written."""

    @pytest.fixture
    def capsule(self) -> Capsule:
        return cross_layer_capsule(GEOMETRY)

    @pytest.fixture
    def span(self, capsule: Capsule) -> StoredSpan:
        return stored_span(capsule)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"length": 34, "grid": (1, 1, 34)}, r"layers\.0\.keys\.0 is uint8 \[2, \d+\] and not uint8 \[3, \d+\]"),
            ({"length": 25, "grid": (1, 5, 5)}, r"layers\.0\.rest\.keys is float32 \[1, 2, 4, 8\] and not"),
            ({"length": 20, "grid": (1, 4, 5)}, "2 visual and 1 text segments where the header asks for 1 and 1"),
            ({"text": 0}, "2 visual and 1 text segments where the header asks for 2 and 0"),
            ({"text": 2}, r"layers\.0\.text\.keys is float32 \[1, 2, 3, 8\] and not float32 \[1, 2, 2, 8\]"),
            ({"tile": 12}, "tile 12 in the header of a stored span does not fit the capsule, which has 10"),
            ({"align": 4}, "align 4 in the header of a stored span does not fit the capsule, whose tiles of 10 tokens"),
            ({"family": "transform"}, "family 'transform' in the header"),
            ({"base_model": "other"}, "base_model 'other' in the header"),
            ({"dtype": "bfloat16"}, "rest.*is float32 .* and not bfloat16"),
            ({"frame": "none"}, "frame 'none' .* does not fit the capsule, which stores tiles in canonical frames"),
            ({"frame": "interleaved"}, "frame is half-split where the header says interleaved"),
            ({"layers": (0,)}, r"layers \[0, 1\] where the header names \[0\]"),
            ({"layers": (0, 1, 2)}, "layer 2 in the header of a stored span: the capsule has codecs for the layers"),
            ({"capsule": "0" * 64}, "made by the capsule 0000"),
        ],
    )
    def test_header(self, values: dict[str, Any], message: str, capsule: Capsule, span: StoredSpan) -> None:
        with pytest.raises(CapsuleError, match=message):
            to_bytes(span._replace(header=replace(span.header, **values)), capsule)

    def test_segments(self, capsule: Capsule, span: StoredSpan) -> None:
        tiles, rest = span.visual[1]
        other = stored_span(capsule, seed=1).visual[1][0]
        nan = rest.keys.clone()
        nan[0, 0, 0, 0] = float("nan")
        for broken, message in (
            (changed(span, 1, 0, out_map=tiles.out_map + 1), "out_map are not the same for every tile"),
            (changed(span, 1, 0, q_map=None), "q_map are not the same"),
            (changed(span, 1, 0, tag=None), "it is a Segment with tag None"),
            (changed(span, 1, 0, mask=torch.ones(2, TILE, dtype=torch.bool)), "it has mask"),
            (changed(span, 1, 0, bias=torch.ones(2, 2, TILE)), "bias"),
            (changed(span, 1, 0, keys=other.keys, values=other.keys), "layer 1 differ from layers.0.keys"),
            (changed(span, 1, 0, frame=replace(tiles.frame, cos=-tiles.frame.cos)), "frames differ"),
            (changed(span, 1, 0, frame=None), "some layers have frames"),
            (changed(span, 0, 0, frame=None), "frame is none where the header says half-split"),
            (changed(span, 1, 1, keys=nan), r"not finite stand in layers\.1\.rest\.keys"),
            (changed(span, 1, 1, each_row=False), "rest of layer 1 is not raw rows"),
            (changed(span, 1, 1, bias=torch.zeros(1, 2, 4)), "rest of layer 1 has a bias or padding"),
            (span._replace(text={}), "where the header names"),
        ):
            with pytest.raises(CapsuleError, match=message):
                to_bytes(broken, capsule)

    def test_a_frame_that_is_no_rotation(self, capsule: Capsule, span: StoredSpan) -> None:
        frame = span.visual[0][0].frame
        longer = replace(frame, cos=frame.cos * 2)
        for layer in (0, 1):
            span = changed(span, layer, 0, frame=longer)
        with pytest.raises(CapsuleError, match=r"frame\.cos and frame\.sin are no rotation"):
            to_bytes(span, capsule)
