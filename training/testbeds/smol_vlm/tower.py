"""Conversion of the published EfficientNet-Lite0 to kvcapsule's vision tower: batch norms are folded into convolutions,
and features standardised by the batch norms' statistics."""

from collections.abc import Mapping

import torch

from kvcapsule.testbeds.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

BATCH_NORM_EPS = 1e-3
IMAGE_MEAN = 127 / 255
IMAGE_STD = 128 / 255
"""The published model was trained on pixels (value - 127) / 128 with values in 0..255."""


def build_tower(
    published: Mapping[str, torch.Tensor], config: EfficientNetLiteConfig | None = None
) -> EfficientNetLiteModel:
    """Build the tower from a state dict of efficientnet_lite_pytorch, without its classifier.

    Raises:
        KeyError: if a weight is missing.
    """
    config = config or EfficientNetLiteConfig()
    tower = EfficientNetLiteModel(config)
    state = {"stem." + name: tensor for name, tensor in _folded(published, "_conv_stem", "_bn0").items()}
    centres, spreads = [], []
    number = 0
    for index, stage in enumerate(tower.stages):
        mean = variance = torch.zeros(config.channels[index])
        for place, block in enumerate(stage):
            at = f"_blocks.{number}"
            pairs = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
            if block.expand is not None:
                pairs.insert(0, ("expand", "_expand_conv", "_bn0"))
            for ours, conv, norm in pairs:
                folded = _folded(published, f"{at}.{conv}", f"{at}.{norm}")
                state |= {f"stages.{index}.{place}.{ours}.{name}": tensor for name, tensor in folded.items()}
            # The output of a batch norm has its bias as mean and its weight as deviation; summed blocks count as
            # independent.
            mean = mean * block.skips + published[f"{at}._bn2.bias"]
            variance = variance * block.skips + published[f"{at}._bn2.weight"] ** 2
            number += 1
        if index in config.feature_stages:
            repeats = config.folds(index) ** 2
            centres.append(mean.repeat_interleave(repeats))
            spreads.append(variance.sqrt().repeat_interleave(repeats))
    state["mean"], state["scale"] = torch.cat(centres), 1 / torch.cat(spreads).clamp_min(1e-3)
    tower.load_state_dict(state)
    return tower.eval().requires_grad_(False)


def _folded(published: Mapping[str, torch.Tensor], conv: str, norm: str) -> dict[str, torch.Tensor]:
    """Weight and bias of a convolution with the following batch norm folded in."""
    gain = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + BATCH_NORM_EPS)
    weight = published[f"{conv}.weight"] * gain[:, None, None, None]
    return {"weight": weight, "bias": published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * gain}
