"""Layer study: statistics of one layer, from a first pass (moments, raw similarity, drift) and a second one (centred
similarity, coefficients in the bases)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvcapsule.errors import InputError
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.tiles import cut_tiles

from ..harvest import LayerHarvest
from ..second_moments import Bases, CoefficientMoments
from .distortion import BITS, FULL_BITS, fixed_share, predict
from .drift import Drift, attention_on
from .similarity import Similarity
from .spectrum import ChannelMoments, Spectrum, TileMoments, spectrum

NAMES = ("keys", "values")


class Solved(NamedTuple):
    """Bases of the keys or the values from the first pass, and the statistics of the second pass."""

    bases: Bases
    centred: Similarity
    coefficients: CoefficientMoments


class LayerStudy:
    """Statistics of one layer: over the tokens of all visual spans unless stated otherwise; tiles do not include the
    incomplete tile at a span's end."""

    def __init__(self, prefill: LayerPrefill) -> None:
        """prefill: any prefill of the layer, for its heads, head dim and device."""
        _, heads, _, self.dim = prefill.keys.shape
        device = prefill.keys.device
        self.layer = prefill.layer
        self.raw = {name: Similarity() for name in NAMES}
        self.tokens = {name: ChannelMoments(heads, self.dim, device) for name in NAMES}
        self.unrotated = ChannelMoments(heads, self.dim, device)
        self.tiles: dict[str, TileMoments] = {}
        self.drift = Drift()
        self.framed = False
        self._solved: dict[str, Solved] = {}

    @property
    def count(self) -> int:
        """Number of tiles so far."""
        return self.tiles["keys"].tiles if self.tiles else 0

    def first(self, prefill: LayerPrefill, tiles: LayerHarvest | None, answers: Sequence[range]) -> None:
        """Add a batch to the first pass.

        Raises:
            InputError: if a tensor holds NaN or infinity; the message names layer and tensor.
        """
        _require_finite(prefill)
        for name, x_HND, width in _images(prefill):
            self.raw[name].add(x_HND, width)
            self.tokens[name].add(x_HND)
        if tiles is not None:
            for name, x_EHTD in (("keys", tiles.keys), ("values", tiles.values)):
                if name not in self.tiles:
                    _, heads, tile, dim = x_EHTD.shape
                    self.tiles[name] = TileMoments(heads, tile, dim, x_EHTD.device)
                self.tiles[name].add(x_EHTD)
            if tiles.frame is not None:
                self.framed = True
                self._add_unrotated(prefill)
        for row, answer in enumerate(answers):
            self._add_drift(prefill, row, answer)

    def second(self, prefill: LayerPrefill, tiles: LayerHarvest | None) -> None:
        """Add the same batch to the second pass."""
        solved = {name: self._solve(name) for name in NAMES}
        for name, x_HND, width in _images(prefill):
            solved[name].centred.add(x_HND, width)
        if tiles is not None:
            for name, x_EHTD in (("keys", tiles.keys), ("values", tiles.values)):
                solved[name].coefficients.add(solved[name].bases.coefficients(x_EHTD.double()))

    def result(self) -> dict[str, Any]:
        """The layer's entry in "layers" of the JSON object (docs/analyze.md)."""
        return {
            "layer": self.layer,
            "similarity": {name: self._similarity(name) for name in NAMES},
            "spectra": {"keys": self._key_spectra(), "values": self._tile_spectra("values")},
            "fixed_share": {name: fixed_share(self.tiles[name], self.variances(name)) for name in NAMES},
        }

    def predicted(self) -> list[dict[str, Any]]:
        """The layer's entries in "predicted" of the JSON object."""
        of = {name: (self.tiles[name], self.variances(name)) for name in NAMES}
        fields = []
        for bits in BITS:
            methods = {name: predict(*of[name], bits)._asdict() for name in NAMES}
            fields.append({"layer": self.layer, "bits": bits, "compression": FULL_BITS / bits, **methods})
        return fields

    def variances(self, name: str) -> torch.Tensor:
        """Unbiased variances [H, T, D] of the coefficients of the keys or the values."""
        return self._solved[name].coefficients.variance() * (self.count / (self.count - 1))

    def _solve(self, name: str) -> Solved:
        if name not in self._solved:
            moments = self.tiles[name].moments
            fresh = CoefficientMoments(*moments.total.shape).to(moments.total.device)
            self._solved[name] = Solved(moments.bases(), Similarity(self.tokens[name].mean()), fresh)
        return self._solved[name]

    def _similarity(self, name: str) -> dict[str, list[float]]:
        raw, centred = self.raw[name].means(), self._solved[name].centred.means()
        fields = {**raw._asdict(), **{f"{key}_centred": value for key, value in centred._asdict().items()}}
        return {key: value.tolist() for key, value in fields.items()}

    def _tile_spectra(self, name: str) -> dict[str, Any]:
        return {
            "tokens": _plain(spectrum(self.tiles[name].tokens())),
            "channels": _plain(spectrum(self.tiles[name].channels())),
        }

    def _key_spectra(self) -> dict[str, Any]:
        unrotated = _plain(spectrum(self.unrotated.covariance())) if self.framed else None
        rotated = _plain(spectrum(self.tokens["keys"].covariance()))
        return {**self._tile_spectra("keys"), "channels_rotated": rotated, "channels_unrotated": unrotated}

    def _add_unrotated(self, prefill: LayerPrefill) -> None:
        """Add keys without any rotation, as tiles of one token whose frame is the token's full rotation."""
        alone = cut_tiles(prefill, 1)
        assert alone is not None and alone.frame is not None
        self.unrotated.add(alone.frame.unrotate(alone.keys)[:, :, 0].transpose(0, 1))

    def _add_drift(self, prefill: LayerPrefill, row: int, answer: range) -> None:
        spans = [span for span in prefill.spans if span.row == row]
        behind = max((span.start + span.length for span in spans), default=answer.start)
        if not spans or answer.start <= behind:
            return
        places = range(behind, answer.stop)
        query, keys = prefill.query[row][:, behind : answer.stop], prefill.keys[row]
        attention = attention_on(query, keys, places, prefill.valid[row], prefill.scale)
        visual = attention[:, prefill.visual()[row]]
        prompt = answer.start - behind
        self.drift.add(visual[prompt - 1 :], visual[:prompt].sum(0))


def _images(prefill: LayerPrefill) -> list[tuple[str, torch.Tensor, int]]:
    """Name ("keys" or "values"), tokens [H, N, D] as rotated by the model, and grid width, of every visual span."""
    return [
        (name, tensor[span.row, :, span.start : span.start + span.length], span.grid[2])
        for span in prefill.spans
        for name, tensor in (("keys", prefill.keys), ("values", prefill.values))
    ]


def _require_finite(prefill: LayerPrefill) -> None:
    read = prefill.visual()
    places = torch.arange(read.shape[1], device=read.device)
    last = torch.where(read, places, -1).amax(1, keepdim=True)
    asks = prefill.valid & (places > last) & (last >= 0)
    for name, tensor, where in (
        ("keys", prefill.keys, read),
        ("values", prefill.values, read),
        ("queries", prefill.query, asks),
    ):
        if not bool(tensor.transpose(1, 2)[where].isfinite().all()):
            whose = "queries behind the image" if name == "queries" else f"{name} of visual tokens"
            raise InputError(
                f"layer {prefill.layer}: the {whose} hold NaN or infinity in"
                f" {str(tensor.dtype).removeprefix('torch.')}. Try another --dtype; if float32 has them too, the"
                " model's weights are broken."
            )


def _plain(of: Spectrum) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in of._asdict().items()}
