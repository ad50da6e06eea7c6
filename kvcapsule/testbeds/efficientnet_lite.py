"""EfficientNet-Lite vision tower: feature maps of several strides, resampled to one grid, as visual tokens.

EfficientNet-Lite (Tan and Le, arXiv:1905.11946, in its "lite" form of 2020) has inverted bottlenecks without
squeeze-and-excitation, and ReLU6 activations. transformers' EfficientNet always has squeeze-and-excitation, and returns
maps where LLaVA needs tokens; hence this class, which importing this module registers with the Auto classes
(kvcapsule.vlm.loading does). Batch norms are folded into the convolutions: the tower is for inference. Padding is
TensorFlow's "same", which the published weights need.

Shapes: B batch, C channels, S side of an image, W side of the grid, T = W * W tokens.
"""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Config of the tower; the defaults are those of Lite0."""

    model_type = "efficientnet_lite"

    image_size: int = 224
    """Side of an image in pixels, a multiple of 32."""
    patch_size: int = 16
    """Height and width in pixels that one visual token covers."""
    stem_channels: int = 32
    channels: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    """Output channels of each stage."""
    kernels: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    repeats: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expansions: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    feature_stages: list[int] | tuple[int, ...] = (2, 3, 4, 5, 6)
    """Stages whose maps are the features of a token; maps finer than the grid are folded into channels, coarser ones
    are interpolated."""
    position_waves: int = 8
    """Cosine position features per direction, appended to a token's features, because convolutions carry hardly any
    position. EfficientNet has none."""
    feature_size: int = 0
    hidden_size: int = 0
    """Channels of a token without and with the position features; both are derived from the fields above."""
    initializer_range: float = 0.1

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        lengths = {len(values) for values in (self.channels, self.kernels, self.strides, self.repeats, self.expansions)}
        if len(lengths) != 1:
            raise ValueError(
                f"channels, kernels, strides, repeats and expansions must have one entry a stage, got {sorted(lengths)}"
                " entries."
            )
        self.feature_size = sum(self.channels[stage] * self.folds(stage) ** 2 for stage in self.feature_stages)
        self.hidden_size = self.feature_size + 2 * self.position_waves

    def stride(self, stage: int) -> int:
        """Pixels between neighbouring positions of a stage's map."""
        stride = 2
        for factor in self.strides[: stage + 1]:
            stride *= factor
        return stride

    def folds(self, stage: int) -> int:
        """Positions of a stage's map along one side of a token, at least 1."""
        return max(1, self.patch_size // self.stride(stage))


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding; an odd pixel of padding goes to the right and the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        down, across = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[-2:])
        padded = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedBottleneck(nn.Module):
    """Inverted bottleneck: 1 x 1 expansion, depthwise convolution, 1 x 1 projection; with a skip connection if in- and
    output shapes agree."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = nn.Conv2d(inside, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, outside, 1)
        self.skips = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow: torch.Tensor = self.project(F.relu6(self.depthwise(wide)))
        return narrow + x if self.skips else narrow


class EfficientNetLiteModel(PreTrainedModel):
    """Vision tower: pixels [B, 3, S, S] to tokens [B, T, hidden_size], with features standardised by constants stored
    with the weights."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedBottleneck"]  # noqa: RUF012  transformers wants a list.

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv2d(3, config.stem_channels, 3, 2)
        inside = config.stem_channels
        self.stages = nn.ModuleList()
        rows = zip(config.channels, config.kernels, config.strides, config.repeats, config.expansions, strict=True)
        for outside, kernel, stride, repeats, expansion in rows:
            blocks = [InvertedBottleneck(inside, outside, kernel, stride, expansion)]
            blocks += [InvertedBottleneck(outside, outside, kernel, 1, expansion) for _ in range(repeats - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inside = outside
        self.mean = nn.Parameter(torch.zeros(config.feature_size), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(config.feature_size), requires_grad=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The output of each stage, [B, C, S / stride, S / stride]."""
        x = F.relu6(self.stem(pixel_values))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutput:
        """Tokens as last_hidden_state, and as the only entry of hidden_states (LLaVA's vision_feature_layer is -1).

        Raises:
            ValueError: if the image size is not the model's.
        """
        side = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            got = " x ".join(map(str, pixel_values.shape[-2:]))
            raise ValueError(
                f"images of {got} pixels: this tower reads {side} x {side}; let its image processor resize them."
            )
        maps = self.maps(pixel_values.to(self.stem.weight.dtype))
        grid = side // self.config.patch_size
        parts = []
        for stage in self.config.feature_stages:
            at = F.pixel_unshuffle(maps[stage], self.config.folds(stage))
            if at.shape[-1] != grid:
                at = F.interpolate(at, size=(grid, grid), mode="bilinear", align_corners=False)
            parts.append(at.flatten(2).transpose(1, 2))
        features_BTC = (torch.cat(parts, dim=-1) - self.mean) * self.scale
        places = positions(grid, self.config.position_waves).to(features_BTC)
        tokens_BTC = torch.cat([features_BTC, places.expand(len(features_BTC), -1, -1)], dim=-1)
        return BaseModelOutput(last_hidden_state=tokens_BTC, hidden_states=(tokens_BTC,))


def positions(grid: int, waves: int) -> torch.Tensor:
    """Position features [W * W, 2 * waves]: cosines of 1 to `waves` half periods, vertical ones first."""
    at = (torch.arange(grid) + 0.5) / grid
    wave = torch.cos(torch.pi * at[:, None] * torch.arange(1, waves + 1))
    return torch.cat([wave[:, None].expand(-1, grid, -1), wave[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
