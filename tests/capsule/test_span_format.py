"""The format of stored spans: the golden span of version 1, and what is documented."""

from dataclasses import fields
from pathlib import Path

import torch
from support.capsule_files import fixed_capsule

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.digest import capsule_digest
from kvcapsule.capsule.span_form import raw
from kvcapsule.capsule.span_header import SpanHeader
from kvcapsule.capsule.stored_span import KEY, StoredSpan, from_bytes, read_header, to_bytes
from kvcapsule.codec.base import TILES
from kvcapsule.codec.cross_layer import CrossLayerConfig
from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.rotary_frame import Frame

GOLDEN = Path(__file__).parents[1] / "golden" / "span-v1.safetensors"
FORMAT = Path(__file__).resolve().parents[2] / "checkpoints" / "FORMAT.md"
HEADER = SpanHeader(
    capsule="b6434d3945beea81a6c5bba7c0b7b14ed29ff2da2938397330d989ade9db0446",
    family="cross-layer",
    base_model="org/vlm",
    dtype="float16",
    grid=(1, 3, 6),
    tile=8,
    align=1,
    frame="half-split",
    start=7,
    length=18,
    text=5,
    layers=(0, 1),
    weights="a1b2",
    adapter="lora-3",
)


def capsule() -> Capsule:
    """Keys and values of two layers in one code, whose numbers are multiples of 1/64."""
    return fixed_capsule(family="cross-layer", codec=CrossLayerConfig(8, joint_layers=2, rows=(8,), channels=(6,)))


def golden_span() -> StoredSpan:
    """Of numbers that are the same on every machine."""
    of = capsule()
    coding = of.layers[0].transform.coding()
    codes = (torch.arange(2 * coding.layout.size) * 37 % 256).to(torch.uint8).view(2, -1)
    frame = Frame(torch.tensor([[1.0, 0.6], [0.0, -0.8]]), torch.tensor([[0.0, 0.8], [1.0, 0.6]]))
    encoding = of.layers[0].transform
    rows = CodedRows(codes, coding)
    visual, text = {}, {}
    for layer in (0, 1):
        tiles = encoding.encoded(layer, rows).segment(torch.zeros(2, dtype=torch.int64), frame)
        visual[layer] = [tiles, raw(*numbers(2, layer))]
        text[layer] = [raw(*numbers(5, 10 + layer))]
        assert tiles.tag == TILES
    return StoredSpan(HEADER, visual, text)


def numbers(tokens: int, salt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of raw tokens."""
    both = ((torch.arange(2 * 2 * tokens * 4) * 29 + salt) % 64 - 32).half() / 16
    return both.view(2, 1, 2, tokens, 4).unbind()


def test_golden_span_of_version_1() -> None:
    """A file that stays for ever: whoever changes the format adds another for the new version."""
    data = GOLDEN.read_bytes()
    assert read_header(data) == HEADER
    assert capsule_digest(capsule()) == HEADER.capsule
    span = from_bytes(data, capsule())
    expected = golden_span()
    for layer in (0, 1):
        (tiles, rest), (text,) = span.visual[layer], span.text[layer]
        assert tiles.keys is tiles.values is span.visual[0][0].keys
        assert tiles.keys.packed[:, :5].tolist() == [[0, 37, 74, 111, 148], [52, 89, 126, 163, 200]]
        assert tiles.frame.cos.tolist() == [[1.0, 0.6000000238418579], [0.0, -0.800000011920929]]
        assert rest.keys[0, 0].tolist() == [
            [(n * 29 + layer) % 64 / 16 - 2 for n in range(4 * token, 4 * token + 4)] for token in (0, 1)
        ]
        assert (rest.keys.dtype, text.tokens) == (torch.float16, 5)
        for one, other in zip((tiles, rest, text), (*expected.visual[layer], *expected.text[layer]), strict=True):
            assert all(map(torch.equal, one.materialize(torch.float64), other.materialize(torch.float64)))


def test_the_format_is_that_of_the_golden_span() -> None:
    """If this fails, spans written from now on differ from those of version 1: raise SPAN_FORMAT_VERSION and add a
    golden span. If the digest alone differs, all spans that anyone stored are lost: let it be what it was."""
    assert to_bytes(golden_span(), capsule()) == GOLDEN.read_bytes()


def test_the_format_is_documented() -> None:
    text = FORMAT.read_text()
    names = [field.name for field in fields(SpanHeader)]
    missing = [word for word in (*names, KEY, "sha256", "frame.cos", "frame.sin") if f"`{word}`" not in text]
    assert not missing, f"checkpoints/FORMAT.md does not explain {', '.join(missing)}."
