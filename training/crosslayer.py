"""Training of the cross-layer family: what each layer's errors cost, one basis for a stack of layers, then gradient descent."""

from collections.abc import Iterator, Sequence

import torch
from rich.table import Table
from torch import nn

from kvcapsule.codec.crosslayer import CrossLayerCodec, CrossLayerConfig, CrossLayerTransform
from kvcapsule.codec.transform import side_by_side
from kvcapsule.segment import Segment

from .allocation import allocate
from .harvest import LayerHarvest
from .module import Task
from .sets import joint_layers, stacks
from .spectra import Moments
from .straight_through import coded
from .transform import TransformFit, Unit, used


class CrossLayerFit(TransformFit):
    """As a transform code's, but that keys and values of a stack are one source.

    They are laid side by side in coordinates in which an error of one costs all parts the same: keys under the metric of their queries, and
    each part times the root of what its errors add to attention's output (`sensitivities`). Principal axes and reverse water-filling then
    share out the bits among layers, keys and values by themselves.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        geometry, recipe = task.geometry, task.recipe.transform
        if recipe.allocation != "output" or recipe.key_bits is not None:
            raise ValueError(
                "a cross-layer code shares its bits out by what they save in attention's output: leave --transform.allocation, "
                "--transform.key_bits and --transform.value_bits out, or train the transform family."
            )
        self.joint = min(geometry.layers, recipe.joint_layers or joint_layers(self.heads, geometry.head_dim))
        self.stacks = stacks(geometry.layers, self.joint)

    def prepare(self) -> None:
        batches = self.task.recipe.moment_batches
        alone = self._units(batches)
        factors = self._factors(alone, self.sensitivities(alone))
        units = self._stacks(batches, [into for into, _ in factors])
        widths = allocate([unit.cells for unit in units], self.budget(2 * self.task.geometry.layers))
        self.layers = nn.ModuleList(
            CrossLayerCodec(self._transform(unit, w, [factors[i] for layer in stack for i in (2 * layer, 2 * layer + 1)]))
            for unit, w, stack in zip(units, widths, self.stacks, strict=True)
        )

    def codec_config(self) -> CrossLayerConfig:
        transforms, task = [self._of(stack) for stack in range(len(self.layers))], self.task
        coded_bytes = sum(int(t.widths.long().sum()) for t in transforms)
        return CrossLayerConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            joint_layers=self.joint,
            joint_heads=self.heads,
            rows=tuple(t.tokens_in.shape[1] for t in transforms),
            channels=tuple(t.channels_in.shape[3] for t in transforms),
            bits=round(coded_bytes * 8 / self._elements(2 * task.geometry.layers), 4),
        )

    def codec(self, index: int) -> CrossLayerCodec:
        codec = self.layers[index]
        assert isinstance(codec, CrossLayerCodec)
        return codec

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        found: list[Segment] = []
        for index, stack in enumerate(self.stacks):
            transform = self._of(index)
            sums = torch.stack([transform.across(p, layers[i].keys.float(), layers[i].values.float()) for p, i in enumerate(stack)]).sum(0)
            rows = coded(transform, transform.coefficients(sums))
            found += [transform.encoded(place, rows).segment(layers[i].owner, layers[i].frame) for place, i in enumerate(stack)]
        return found

    def derived(self) -> Table:
        transforms, config = [self._of(stack) for stack in range(len(self.layers))], self.codec_config()
        maps = sum(t.decoder_bytes() for t in transforms) / 2**20
        table = Table(
            title=f"{self.task.recipe.model}: tiles of {self.task.tile} visual tokens, {config.bits:.3f} bit an element, "
            f"{maps:.1f} MiB of maps stored once"
        )
        for column in ("layers", "bits", "rows x channels", "coded cells"):
            table.add_column(column, justify="right")
        for stack, t in zip(self.stacks, transforms, strict=True):
            bits = int(t.widths.long().sum()) * 8 / self._elements(2 * len(stack))
            cells = f"{int((t.widths > 0).sum()):,} of {t.widths.numel():,}"
            table.add_row(f"{stack[0]} to {stack[-1]}", f"{bits:.2f}", f"{t.tokens_in.shape[1]} x {t.channels_in.shape[3]}", cells)
        return table

    def _of(self, stack: int) -> CrossLayerTransform:
        return self.codec(stack).transform

    def _factors(self, units: list[Unit], costs: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For the keys and the values of each layer in turn: into the coordinates of the stack and back, [S, W, W] each."""
        factors = []
        # Numbers keep the size that they had, for which rates of learning are made.
        usual = torch.stack(costs).mean().clamp_min(1e-12)
        for unit, cost in zip(units, costs, strict=True):
            root = (cost / usual).clamp_min(1e-12).sqrt()[:, None, None].to(unit.bases.channels_in)
            factors.append((unit.bases.channels_in * root, unit.bases.channels_out / root))
        return factors

    def _stacks(self, batches: int, into: list[torch.Tensor]) -> list[Unit]:
        """Bases, variances and extremes of the stacks, from two passes over the same batches."""
        sets, tile, device = len(into[0]), self.task.tile, self.task.model.device
        sizes = [2 * len(stack) * into[0].shape[2] for stack in self.stacks]
        moments = [Moments(sets, tile, size).to(device) for size in sizes]
        for stack, x in self._tiles(batches, into, "moments of stacks of layers"):
            moments[stack].add(x)
        for sums in moments:
            self.reduce(sums)
        return self.measured([own.bases() for own in moments], self._tiles(batches, into, "variances of their coefficients"))

    def _tiles(self, batches: int, into: list[torch.Tensor], title: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Each stack's number and its tiles of each batch, [E, S, T, P W], in its coordinates: one stack after another, to hold one."""
        for batch in self.batches(batches, title):
            layers = self.harvest(batch)
            for stack, own in enumerate(self.stacks):
                parts = [(x, into[2 * i + part]) for i in own for part, x in enumerate((layers[i].keys, layers[i].values))]
                yield stack, torch.cat([side_by_side(x.double(), self.heads) @ factor for x, factor in parts], dim=3)

    def _transform(self, unit: Unit, widths: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]]) -> CrossLayerTransform:
        rows, channels = used(widths)
        sizes = (self.task.tile, self.task.geometry.head_dim, rows, channels)
        built = CrossLayerTransform(len(factors) // 2, len(widths), self.heads, *sizes).to(unit.variance.device)
        unit.fill(built, widths)
        with torch.no_grad():
            for part, (into, back) in enumerate(factors):
                own = slice(part * into.shape[2], (part + 1) * into.shape[2])
                built.channels_in[part].copy_(into @ unit.bases.channels_in[:, own, :channels])
                built.channels_out[part].copy_(back @ unit.bases.channels_out[:, own, :channels])
        return built
