"""Bytes of stored spans that were damaged or made up: each fault ends in a CapsuleError that names it."""

import json
import random
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.builders import EVERY_FAMILY, GEOMETRY
from support.stored_spans import stored_span

from kvcapsule.capsule import tensor_bytes
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.stored_span import KEY, from_bytes, read_header, to_bytes
from kvcapsule.errors import CapsuleError

FAMILIES = ("cross-layer", "kvcapsule in 4 bits", "compact")
JUNK: list[Any] = [None, True, -1, 0, 1, 7, 10**30, "", "x", "float16", "none", "\ud800", [], [1], [1, 4, 6], [0, 1, 2]]
JUNK += [{}, {"a": 1}, [[]], [True, 1, 24], ["a", "b", "c"], [1, 0], "x" * 2000]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Capsule, bytes]:
    capsule = EVERY_FAMILY[request.param](GEOMETRY)
    return capsule, to_bytes(stored_span(capsule), capsule)


def outcome(data: bytes, capsule: Capsule) -> str:
    """What reading says; fails unless it is a CapsuleError, or the very span of these bytes."""
    try:
        span = from_bytes(data, capsule)
    except CapsuleError as error:
        assert len(str(error)) > 20
        str(error).encode("utf-8", "backslashreplace")
        return str(error)
    assert to_bytes(span, capsule) == data
    return ""


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    contents = tensor_bytes.read(KEY, data, "span")
    return contents.values, contents.tensors()


def sealed(head: bytes, data: bytes) -> bytes:
    """A head as it is given, without a sound checksum."""
    return len(head).to_bytes(8, "little") + head + data


def parts(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def test_each_changed_byte_is_found(case: tuple[Capsule, bytes]) -> None:
    capsule, data = case
    draw = random.Random(0)
    size = 8 + len(parts(data)[0])
    places = [*range(16), *(draw.randrange(size) for _ in range(200)), *(draw.randrange(len(data)) for _ in range(100))]
    for place in places:
        mutated = bytearray(data)
        mutated[place] ^= 1 << draw.randrange(8)
        assert outcome(bytes(mutated), capsule), place
        with pytest.raises(CapsuleError):
            read_header(bytes(mutated))


def test_bytes_that_were_cut_moved_or_doubled(case: tuple[Capsule, bytes]) -> None:
    capsule, data = case
    draw = random.Random(1)
    for _ in range(150):
        one, other = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        for mutated in (data[:one], data[:one] + data[other:], data[:other] + data[one:], data + data[:one]):
            assert bool(outcome(mutated, capsule)) == (mutated != data)


def test_digits_that_were_exchanged(case: tuple[Capsule, bytes]) -> None:
    """Of the head: it stays JSON, and its numbers are others."""
    capsule, data = case
    head, numbers = parts(data)
    digits = [i for i, byte in enumerate(head) if chr(byte).isdigit()]
    draw = random.Random(2)
    for place in draw.sample(digits, 150):
        changed = bytearray(head)
        changed[place] = ord(str((int(chr(head[place])) + 1 + draw.randrange(8)) % 10))
        assert outcome(sealed(bytes(changed), numbers), capsule)


def test_made_up_headers(case: tuple[Capsule, bytes]) -> None:
    """With a sound checksum: every value against what the tensors and the capsule ask for."""
    capsule, data = case
    values, tensors = opened(data)
    for key in values:
        for junk in JUNK:
            made_up = tensor_bytes.write(KEY, {**values, key: junk}, tensors)
            message = outcome(made_up, capsule)
            free = key in ("weights", "adapter") and isinstance(junk, str) and len(junk) < 1000
            free |= key == "start" and junk == 7
            free |= key == "grid" and junk == [1, 4, 6]
            same = json.dumps(junk) == json.dumps(values[key])
            assert bool(message) == (not same and not free), (key, junk, message)
            if message and key != "capsule":
                assert key in message or "tensors are not those" in message or "format version" in message
        assert (
            f"lacks {key}"
            in outcome(tensor_bytes.write(KEY, {k: v for k, v in values.items() if k != key}, tensors), capsule)
            or key == "format_version"
        )
    assert "unknown keys 'colour'" in outcome(tensor_bytes.write(KEY, {**values, "colour": 1}, tensors), capsule)
    assert "format version 2 " in outcome(tensor_bytes.write(KEY, {**values, "format_version": 2}, tensors), capsule)


def test_made_up_tensors(case: tuple[Capsule, bytes]) -> None:
    """With a sound checksum: names, shapes, dtypes and numbers."""
    capsule, data = case
    values, tensors = opened(data)

    def said(changes: dict[str, torch.Tensor | None]) -> str:
        kept = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        return outcome(tensor_bytes.write(KEY, values, kept), capsule)

    for name, tensor in tensors.items():
        assert f"{name} is missing" in said({name: None}) or name == "frame.cos"
        assert f"{name}x is unexpected" in said({name: None, f"{name}x": tensor})
        for other in (
            tensor[:-1],
            tensor[..., :-1],
            tensor[None],
            tensor.flatten(),
            tensor[:0],
            tensor.to(torch.int16),
        ):
            # The width of a rotation is the model's: cos and sin must have the same.
            assert f"{name.replace('cos', 'sin')} is " in said({name: other}) or f"{name} is " in said({name: other})
        if tensor.is_floating_point():
            for wrong in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.view(-1)[-1] = wrong
                assert f"not finite stand in {name}" in said({name: broken})
    assert "no rotation" in said({"frame.cos": tensors["frame.cos"] + 1})
    assert said({}) == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no stored span"),
        (b"\x00" * 7, "7 bytes are no stored span"),
        (b"\xff" * 64, "announces a head of 18,446,744,073,709,551,615"),
        ((5 * 2**20).to_bytes(8, "little") + b" " * (6 * 2**20), "announces a head of 5,242,880"),
        (sealed(b"[" * 100_000, b""), "is not JSON"),
        (sealed(b'{"__metadata__":{"kvcapsule_span":' + b"[" * 9000 + b"]" * 9000 + b"}}", b""), "is not JSON"),
        (sealed(json.dumps({"__metadata__": {KEY: '{"a":' * 900 + "1" + "}" * 900}}).encode(), b""), "stored span"),
        (sealed(b"null", b""), "metadata is not one kvcapsule_span"),
        (sealed(b"[1]", b""), "metadata is not one kvcapsule_span"),
        (sealed(b"{}", b""), "metadata is not one kvcapsule_span|is not JSON"),
        (sealed(b'{"__metadata__":{"kvcapsule_span":"1"}}', b""), "metadata is not one kvcapsule_span"),
        (sealed(b'{"__metadata__":{"kvcapsule_span":"{}"}}', b""), "has no sha256"),
        (sealed(b'{"__metadata__":{"kvcapsule_span":"{\\"a\\":1e999}"}}', b""), "1e999 is no whole number"),
        (sealed(b'{"__metadata__":{"kvcapsule_span":"{\\"a\\":NaN}"}}', b""), "NaN is no whole number"),
        (sealed(b'{"a":1,"a":2}', b""), "a name stands in it twice"),
        (sealed(b"\xff\xfe", b""), "is not JSON"),
        (sealed(b"1" * 10_000, b""), "is not JSON"),
        (save({"a": torch.zeros(2)}), "stored span"),
        (save({"a": torch.zeros(2)}, {"format": "pt"}), "metadata is not one kvcapsule_span"),
        (save({"a": torch.zeros(2)}, {KEY: "{}"}), "has no sha256"),
    ],
)
def test_bytes_that_are_something_else(data: bytes, message: str) -> None:
    with pytest.raises(CapsuleError, match=message):
        read_header(data)


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"dtype": "F8", "shape": [1]},
        {"dtype": ["F32"], "shape": [1]},
        {"dtype": "F32", "shape": 1},
        {"dtype": "F32", "shape": [-1]},
        {"dtype": "F32", "shape": [True]},
        {"dtype": "F32", "shape": [10**2000, 10**2000, 10**2000]},
        {"dtype": "F32", "shape": [1] * 9},
    ],
)
def test_tensors_of_no_known_form(entry: Any) -> None:
    head = json.dumps({"__metadata__": {KEY: "{}"}, "a": entry}).encode()
    with pytest.raises(CapsuleError, match="tensor 'a' of this stored span has no form"):
        read_header(sealed(head, b"\x00" * 4))


def test_heads_in_another_form(case: tuple[Capsule, bytes]) -> None:
    """The same JSON otherwise written, tensors in another order or with holes between them."""
    capsule, data = case
    head, numbers = parts(data)
    document = json.loads(head)
    metadata = document.pop("__metadata__")
    turned = {"__metadata__": metadata, **dict(reversed(document.items()))}
    shifted = {name: {**e, "data_offsets": [o + 1 for o in e["data_offsets"]]} for name, e in document.items()}
    for other in (turned, {**document, "__metadata__": metadata}, {"__metadata__": metadata, **shifted}):
        text = json.dumps(other, separators=(",", ":")).encode()
        assert "not in the form" in outcome(sealed(text + b" " * (-len(text) % 8), numbers), capsule)
    assert "not in the form" in outcome(sealed(head + b" " * 8, numbers), capsule)
    assert outcome(sealed(head, numbers), capsule) == ""


def test_a_digest_of_another_capsule(case: tuple[Capsule, bytes]) -> None:
    _, data = case
    other = EVERY_FAMILY["transform, no frames"](GEOMETRY)
    assert "give the capsule that made it" in outcome(data, other)
