"""The form of a stored span: which tensors its bytes hold, as its header and its capsule ask for, and how segments are
built from them.

What a codec makes of one tile is the template for all others: the maps, the kinds of stored rows, their shapes and
dtypes, and which layers share rows. A tile of random numbers is encoded for it, so that any family serves whose maps
do not depend on the tile; one whose maps do is found when a span is written (`require_template`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from ..codec import Encoded, LayerCodec, LayerGroupCodec
from ..codec.base import TILES
from ..errors import CapsuleError
from ..segments.packed_rows import Rows, read_sets, stored_tensors
from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from ..segments.storable_rows import storable, with_stored
from .capsule import Capsule
from .span_header import SpanHeader
from .tensor_bytes import Form

MAPS = ("score_map", "value_map", "value_mean", "q_map", "out_map")
"""Fields of a segment that come from the capsule."""
COS, SIN = "frame.cos", "frame.sin"


@dataclass(frozen=True)
class SpanForm:
    """What the bytes of a span hold."""

    header: SpanHeader
    template: dict[int, Segment]
    """A segment of one tile for each layer; empty where the span fills no tile."""
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, header: SpanHeader, capsule: Capsule, device: torch.device | str = "cpu") -> "SpanForm":
        """The form of a span of this header.

        Args:
            header: its header.
            capsule: the capsule that made it.
            device: where codecs without tensors encode.

        Raises:
            CapsuleError: if the header is not of this capsule.
        """
        config = capsule.config
        rotated = config.codec.canonical_frame and config.geometry.rotary != "none" and header.tiles > 0
        for name, value, expected in (
            ("family", header.family, config.family),
            ("base_model", header.base_model, config.base_model),
            ("tile", header.tile, config.codec.tile),
        ):
            if value != expected:
                raise CapsuleError(
                    f"{name} {value!r} in the header of a stored span does not fit the capsule, which has {expected!r}."
                )
        if header.align % config.codec.align or header.tile % header.align:
            raise CapsuleError(
                f"align {header.align} in the header of a stored span does not fit the capsule, whose tiles of"
                f" {header.tile} tokens begin at multiples of {config.codec.align}."
            )
        if (header.frame != "none") != rotated:
            raise CapsuleError(
                f"frame {header.frame!r} in the header of a stored span of {header.tiles} tiles does not fit the"
                f" capsule, which {'stores tiles in canonical frames' if rotated else 'has no frames here'}."
            )
        if strange := [layer for layer in header.layers if layer not in config.geometry.capsule_layers]:
            raise CapsuleError(
                f"layer {strange[0]} in the header of a stored span: the capsule has codecs for the layers"
                f" {list(config.geometry.capsule_layers)}."
            )
        template: dict[int, Segment] = {}
        if header.tiles:
            key = ("template", header.layers, header.kv_dtype, str(device))
            template = capsule.computed.get_or_make(
                capsule, key, lambda: _template(capsule, header.layers, header.kv_dtype, device)
            )
        return cls(header, template, config.geometry.kv_heads, config.geometry.head_dim)

    def coded(self) -> Iterator[tuple[str, int, str, Rows]]:
        """(name, layer, "keys" or "values", template) of all rows of tiles; rows that are one have one name, that of
        the first."""
        names: dict[int, str] = {}
        for layer, segment in self.template.items():
            for part in ("keys", "values"):
                rows = getattr(segment, part)
                yield names.setdefault(id(rows), f"layers.{layer}.{part}"), layer, part, rows

    def forms(self, rotation: Form | None) -> dict[str, Form]:
        """The tensors that the bytes must hold, by name; rotation: of the frame's cos as it was found."""
        header = self.header
        forms: dict[str, Form] = {}
        for name, _, _, rows in self.coded():
            for index, tensor in enumerate(stored_tensors(rows)):
                forms[f"{name}.{index}"] = Form(tensor.dtype, (header.tiles, *tensor.shape[1:]))
        for layer, segment in self.template.items():
            if segment.bias is not None:
                forms[f"layers.{layer}.bias"] = Form(segment.bias.dtype, (header.tiles, *segment.bias.shape[1:]))
        if header.frame != "none":
            channels = rotation.shape[1] if rotation is not None and len(rotation.shape) == 2 else 0
            # Channels that rotate, and their dtype, are the model's and in no config of the capsule.
            wide = rotation is not None and rotation.dtype == torch.float64
            form = Form(
                torch.float64 if wide else torch.float32, (header.tiles, max(1, min(channels, self.head_dim // 2)))
            )
            forms |= {COS: form, SIN: form}
        for part, tokens in (("rest", header.rest), ("text", header.text)):
            if tokens:
                form = Form(header.kv_dtype, (1, self.kv_heads, tokens, self.head_dim))
                forms |= {
                    f"layers.{layer}.{part}.{name}": form for layer in header.layers for name in ("keys", "values")
                }
        return forms

    def require(self, actual: Mapping[str, Form]) -> None:
        """Raises CapsuleError that names each tensor that is missing, unexpected or of another form."""
        expected = self.forms(actual.get(COS))
        faults = [f"{name} is missing" for name in expected if name not in actual]
        faults += [f"{name[:80]} is unexpected" for name in actual if name not in expected]
        faults += [
            f"{name} is {actual[name]} and not {form}"
            for name, form in expected.items()
            if name in actual and actual[name] != form
        ]
        if faults:
            listed = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise CapsuleError(f"the tensors are not those that the header and the capsule ask for: {listed}.")

    def segments(self, tensors: Mapping[str, torch.Tensor]) -> dict[int, list[Segment]]:
        """The visual segments of each layer, from tensors of `forms`: tiles, then what is in none."""
        header = self.header
        frame = None
        if header.frame != "none":
            frame = Frame(tensors[COS], tensors[SIN], header.frame == "interleaved")
        rows: dict[str, Rows] = {}
        parts: dict[int, dict[str, Rows]] = {layer: {} for layer in header.layers}
        for name, layer, part, template in self.coded():
            if name not in rows:
                rows[name] = with_stored(
                    template, [tensors[f"{name}.{i}"] for i in range(len(stored_tensors(template)))]
                )
            parts[layer][part] = rows[name]
        owner: torch.Tensor | None = None
        visual: dict[int, list[Segment]] = {}
        for layer in header.layers:
            visual[layer] = []
            if header.tiles:
                template_of = self.template[layer]
                if owner is None:
                    owner = torch.zeros(
                        header.tiles, dtype=torch.int64, device=stored_tensors(parts[layer]["keys"])[0].device
                    )
                keys, values = parts[layer]["keys"], parts[layer]["values"]
                bias = tensors.get(f"layers.{layer}.bias")
                tiles = replace(template_of, keys=keys, values=values, owner=owner, bias=bias, frame=frame)
                visual[layer].append(tiles)
            if header.rest:
                visual[layer].append(raw(tensors[f"layers.{layer}.rest.keys"], tensors[f"layers.{layer}.rest.values"]))
        return visual

    def text(self, tensors: Mapping[str, torch.Tensor]) -> dict[int, list[Segment]]:
        """The text segments of each layer, from tensors of `forms`."""
        segments: dict[int, list[Segment]] = {layer: [] for layer in self.header.layers}
        if self.header.text:
            for layer in self.header.layers:
                segments[layer] = [raw(tensors[f"layers.{layer}.text.keys"], tensors[f"layers.{layer}.text.values"])]
        return segments


def raw(keys: torch.Tensor, values: torch.Tensor) -> Segment:
    """Raw rows [1, H, N, D] of one batch row."""
    return Segment(keys, values, torch.zeros(1, dtype=torch.int64, device=keys.device), each_row=True)


def _template(
    capsule: Capsule, layers: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> dict[int, Segment]:
    config, geometry = capsule.config.codec, capsule.config.geometry
    generator = torch.Generator().manual_seed(0)
    shape = (1, geometry.kv_heads, config.tile, geometry.head_dim)
    noise = torch.randn(2, *shape, generator=generator).to(dtype)
    encoded: dict[int, Encoded] = {}
    # Maps made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if config.layer_group:
            places = {layer: divmod(geometry.place(layer), config.layer_group) for layer in layers}
            for group in sorted({group for group, _ in places.values()}):
                codec = capsule.layers[group]
                assert isinstance(codec, LayerGroupCodec)
                present = [layer for layer in layers if places[layer][0] == group]
                indices = [places[layer][1] for layer in present]
                keys, values = noise.to(_device(codec, device)).unbind()
                encoding = codec.start()
                for index in indices:
                    encoding.add(index, keys, values)
                encoded |= zip(present, encoding.finish(indices), strict=True)
        else:
            for layer in layers:
                codec = capsule.layers[geometry.place(layer)]
                assert isinstance(codec, LayerCodec)
                keys, values = noise.to(_device(codec, device)).unbind()
                one = codec.encode(keys, values)
                encoded[layer] = one.quantised(config.latent_bits) if config.latent_bits else one
    owner = torch.zeros(1, dtype=torch.int64)
    template = {layer: one.segment(owner, None) for layer, one in encoded.items()}
    for segment in template.values():
        for rows in (segment.keys, segment.values):
            if not storable(rows):
                raise CapsuleError(
                    f"spans of the family {capsule.config.family} cannot be stored: its {type(rows).__name__} has no"
                    " with_tensors (kvcapsule.segments.storable_rows), by which rows are built from stored tensors."
                )
    return template


def _device(codec: torch.nn.Module, device: torch.device | str) -> torch.device:
    return next((t.device for t in codec.state_dict().values()), torch.device(device))


def require_template(segment: Segment, template: Segment, layer: int, family: str) -> None:
    """Raises CapsuleError unless a segment of tiles is what the template makes of its stored tensors."""
    fault = None
    extra = [f.name for f in fields(segment) if f.name in ("mask", "head") and getattr(segment, f.name) is not None]
    if type(segment) is not Segment or extra or segment.tag != TILES:
        fault = f"it has {', '.join(extra)}" if extra else f"it is a {type(segment).__name__} with tag {segment.tag!r}"
    elif (segment.bias is None) != (template.bias is None):
        fault = "only some tiles have a bias"
    else:
        changed = [name for name in MAPS if not _same(getattr(segment, name), getattr(template, name))]
        kinds = [
            part
            for part in ("keys", "values")
            if not _built_alike(getattr(segment, part), getattr(template, part), segment.tokens)
        ]
        if changed or kinds:
            fault = f"its {', '.join([*changed, *kinds])} are not the same for every tile"
    if fault:
        raise CapsuleError(
            f"a segment of layer {layer} is not what the codec of the family {family} makes of a tile ({fault}): such"
            " spans cannot be stored."
        )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    where = [(t.data_ptr(), t.stride(), t.device) for t in (one, other)]
    return where[0] == where[1] or torch.equal(one, other.to(one.device))


def _built_alike(rows: Rows, template: Rows, tokens: int) -> bool:
    """Whether rows like the template's, built from the stored tensors of `rows`, are read as `rows` are."""
    if type(rows) is not type(template) or rows.shape[1:] != template.shape[1:]:
        return False
    if isinstance(rows, torch.Tensor):
        return True
    assert not isinstance(template, torch.Tensor)
    if len(rows.shared()) != len(template.shared()) or not all(map(_same, rows.shared(), template.shared())):
        return False
    if type(rows).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return True
    # Of another package's rows it is not known what they hold beside tensors.
    rebuilt = with_stored(template, stored_tensors(rows))
    return torch.equal(read_sets(rows, torch.float32), read_sets(rebuilt, torch.float32))
