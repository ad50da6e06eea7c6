"""The kernels by which compact capsules are encoded on a CPU agree with PyTorch in double precision, for any number of threads.

Whatever is allocated and not written holds NaN throughout this file.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcapsule.codec import attention_matching
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.kernels.native import bank as kernels
from kvcapsule.kernels.native import share
from kvcapsule.vlm.geometry import KVGeometry

SIZES = {
    "one of each": (1, 1, 1, 16, 16),
    "odd": (2, 3, 49, 48, 80),
    "63": (3, 1, 63, 16, 16),
    "64": (1, 2, 64, 128, 512),
    "65": (2, 1, 65, 32, 48),
    "196": (1, 2, 196, 64, 96),
}
"""Heads, tiles, tokens, head dim and queries."""


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def however_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is shared out however little it is."""
    monkeypatch.setattr(share, "_LEAST", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were called."""
    made: list[str] = []
    for name in ("read", "targets", "products", "added"):
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, name=name, plain=plain: (made.append(name), plain(*given))[1])
    return made


def drawn(
    heads: int, tiles: int, tokens: int, dim: int, queries: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [H, 1, Q, D], and keys and values [H, E, T, D] as a layer's prefill has them: more tokens between heads."""
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(heads, tiles * tokens + 5, dim, generator=generator) for _ in range(2))
    given = (x[:, 3 : 3 + tiles * tokens].unflatten(1, (tiles, tokens)) for x in (keys, values))
    return 2 * torch.randn(heads, 1, queries, dim, generator=generator) / dim**0.5, *given


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shortlist", [False, True])
def test_kernels_agree_with_pytorch(size: tuple[int, ...], shortlist: bool, threads: int, calls: list[str]) -> None:
    queries, keys, values = drawn(*size)
    found, expected = (
        attention_matching.read_by(queries, keys),
        attention_matching.read_by(queries.double(), keys.double()),
    )
    for name in ("scores", "attention", "log_mass", "energy", "mass"):
        near(getattr(found, name), getattr(expected, name))
    among = attention_matching.highest(expected.energy, max(1, size[2] * 2 // 3)) if shortlist else None
    wanted = attention_matching.targets(expected, values.double(), among)
    for one, other in zip(attention_matching.targets(found, values, among), wanted, strict=True):
        near(one, other)
    ranking = expected.energy if among is None else expected.energy.gather(-1, among)
    for passes in (1, 2):
        gains = attention_matching.added(wanted.gram.float(), wanted.target.float(), ranking.float(), passes)
        near(gains, attention_matching.added(wanted.gram, wanted.target, ranking, passes), 1e-5)
    assert calls == ["read", "targets", "added", "added"]
    rows = found.attention[:, :, : max(1, size[2] // 7)]
    near(
        attention_matching.products(rows, found.attention),
        attention_matching.products(rows.double(), found.attention.double()),
    )
    assert calls[4:] == ["products"]


def test_of_equals_the_earlier_one_is_ranked_first() -> None:
    """Two tokens that are alike: what the first explains is not left to the second."""
    gram, target = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3)
    gains = attention_matching.added(gram, target, torch.ones(1, 1, 2))
    torch.testing.assert_close(
        gains, attention_matching.added(gram.double(), target.double(), torch.ones(1, 1, 2).double()).float()
    )
    assert float(gains[0, 0, 0]) > 100 * float(gains[0, 0, 1])


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_scores_of_any_size_stay_finite(factor: float) -> None:
    queries, keys, _ = drawn(2, 2, 33, 16, 32)
    found = attention_matching.read_by(factor * queries, keys)
    expected = attention_matching.read_by(factor * queries.double(), keys.double())
    assert all(bool(x.isfinite().all()) for x in found)
    torch.testing.assert_close(found.log_mass.double(), expected.log_mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.attention.sum(-2), torch.ones(2, 2, 32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [49, 160], ids=["all compete", "a shortlist competes"])
@pytest.mark.parametrize("options", [{}, {"latent_bits": 4}, {"selector": "learned"}], ids=str)
def test_the_same_rows_are_kept(
    tile: int, options: dict[str, Any], calls: list[str], backends: Callable[[str], None]
) -> None:
    codec = CompactConfig(tile, ratios=(0.1,), attention_matching=96, **options).build(
        KVGeometry("llava", 1, 4, 2, 16, "1d"), 0
    )
    assert isinstance(codec, CompactLayer)
    codec.requires_grad_(False).bank.copy_(torch.randn(codec.bank.shape, generator=torch.Generator().manual_seed(0)))
    _, keys, values = drawn(2, 5, tile, 16, 16)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    found = codec.encode(keys, values)
    assert set(calls) == {"read", "targets", "products", "added"}
    calls.clear()
    backends("reference")
    expected = codec.encode(keys, values)
    assert not calls
    torch.testing.assert_close(found.keys.keys, expected.keys.keys, rtol=0, atol=0)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.values.values, expected.values.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "sizes", [(7, 16), (16, 7), (24, 16)], ids=["queries", "head dim", "queries that fill half a vector"]
)
def test_what_fills_no_vector_is_left_to_pytorch(sizes: tuple[int, int], calls: list[str]) -> None:
    count, dim = sizes
    queries, keys, values = drawn(2, 2, 9, dim, count)
    found, expected = (
        attention_matching.read_by(queries, keys),
        attention_matching.read_by(queries.double(), keys.double()),
    )
    near(found.attention, expected.attention)
    for one, other in zip(
        attention_matching.targets(found, values), attention_matching.targets(expected, values.double()), strict=True
    ):
        near(one, other)
    assert not set(calls) - {"products"}


def test_keys_in_half_precision_are_read_in_single(calls: list[str]) -> None:
    queries, keys, _ = drawn(2, 2, 9, 16, 16)
    found = attention_matching.read_by(queries, keys.bfloat16())
    near(found.attention, attention_matching.read_by(queries.double(), keys.bfloat16().double()).attention)
    assert calls == ["read"]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has another backend serve."""
    return lambda name: monkeypatch.setattr(attention_matching, "backend", lambda device: name)
