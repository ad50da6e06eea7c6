"""The EfficientNet-Lite tower: TensorFlow's padding, folded batch norms, and how maps become tokens."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_smol import TOWER, published_tower
from transformers import AutoConfig, AutoModel

from kvcapsule.testbeds.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, SameConv2d, positions
from kvcapsule.training.testbeds.smol_vlm.tower import BATCH_NORM_EPS, build_tower


def test_same_convolution_pads_what_is_missing_and_the_odd_one_behind() -> None:
    """Against a convolution written as loops, at odd and even sizes."""
    for size, kernel, stride in ((5, 3, 1), (6, 3, 2), (7, 3, 2), (6, 5, 2), (9, 5, 2)):
        torch.manual_seed(size)
        conv = SameConv2d(1, 1, kernel, stride)
        x = torch.randn(size, size)
        outside = -(-size // stride)
        before = max(0, (outside - 1) * stride + kernel - size) // 2
        expected = torch.zeros(outside, outside)
        for row in range(outside):
            for column in range(outside):
                total = conv.bias.detach().clone()[0]
                for i in range(kernel):
                    for j in range(kernel):
                        y, at = row * stride + i - before, column * stride + j - before
                        if 0 <= y < size and 0 <= at < size:
                            total += x[y, at] * conv.weight.detach()[0, 0, i, j]
                expected[row, column] = total
        torch.testing.assert_close(conv(x[None, None])[0, 0].detach(), expected, atol=1e-5, rtol=1e-5)


def test_folded_weights_compute_what_the_published_ones_do() -> None:
    """Every stage's map, against convolutions and batch norms applied one by one."""
    published = published_tower()
    tower = build_tower(published, EfficientNetLiteConfig(**TOWER))
    pixels = torch.randn(2, 3, 32, 32)

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = published[f"{conv}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        x = F.conv2d(F.pad(x, (missing // 2, missing - missing // 2) * 2), weight, None, stride, groups=groups)
        statistics = (published[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, training=False, eps=BATCH_NORM_EPS)

    x = F.relu6(layer(pixels, "_conv_stem", "_bn0", 2))
    number = 0
    for stage, found in enumerate(tower.maps(pixels)):
        for repeat in range(TOWER["repeats"][stage]):
            at = f"_blocks.{number}"
            wide = x
            if TOWER["expansions"][stage] > 1:
                wide = F.relu6(layer(x, f"{at}._expand_conv", f"{at}._bn0"))
            stride = TOWER["strides"][stage] if repeat == 0 else 1
            wide = F.relu6(layer(wide, f"{at}._depthwise_conv", f"{at}._bn1", stride, wide.shape[1]))
            narrow = layer(wide, f"{at}._project_conv", f"{at}._bn2")
            x = narrow + x if stride == 1 and narrow.shape == x.shape else narrow
            number += 1
        torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_tokens_are_the_maps_standardised_by_the_batch_norms() -> None:
    """Of two summed blocks: mean b1 + b2, variance w1^2 + w2^2; a map twice as fine lies folded, channel by channel."""
    published = published_tower()
    tower = build_tower(published, EfficientNetLiteConfig(**TOWER))
    pixels = torch.randn(1, 3, 32, 32)
    maps = tower.maps(pixels)
    tokens = tower(pixels).last_hidden_state[0].view(2, 2, -1)
    fine, coarse = maps[2], maps[3]
    assert fine.shape[-1] == 4 and coarse.shape[-1] == 2
    bias, weight = (published[f"_blocks.2._bn2.{name}"] for name in ("bias", "weight"))
    second = [published[f"_blocks.3._bn2.{name}"] for name in ("bias", "weight")]
    for channel in range(fine.shape[1]):
        mean, deviation = bias[channel] + second[0][channel], (weight[channel] ** 2 + second[1][channel] ** 2).sqrt()
        for i in range(2):
            for j in range(2):
                got = tokens[1, 0, channel * 4 + i * 2 + j]
                torch.testing.assert_close(got, (fine[0, channel, 2 + i, j] - mean) / deviation, atol=1e-4, rtol=1e-4)
    assert (
        tokens.shape[-1]
        == tower.config.hidden_size
        == fine.shape[1] * 4 + sum(TOWER["channels"][3:]) + 2 * TOWER["position_waves"]
    )


def test_positions_tell_every_token_from_every_other() -> None:
    found = positions(14, 8)
    assert found.shape == (196, 16)
    distances = torch.cdist(found, found) + 10 * torch.eye(196)
    assert distances.min() > 0.1
    torch.testing.assert_close(found[14 * 3 + 5, :8], torch.cos(torch.pi * torch.arange(1, 9) * 3.5 / 14))


def test_the_auto_classes_know_the_tower(tmp_path) -> None:
    tower = build_tower(published_tower(), EfficientNetLiteConfig(**TOWER))
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, EfficientNetLiteModel) and isinstance(
        AutoConfig.from_pretrained(tmp_path), EfficientNetLiteConfig
    )
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_lite0_has_the_published_sizes() -> None:
    config = EfficientNetLiteConfig()
    assert [config.stride(stage) for stage in range(7)] == [2, 4, 8, 16, 16, 32, 32]
    assert config.feature_size == 4 * 40 + 80 + 112 + 192 + 320
    # 4,652,008 are published, with the head (1 x 1 from 320 to 1,280 channels), its norm and the classifier. A
    # published norm has a weight and a bias for each channel, a folded convolution a bias.
    named = dict(EfficientNetLiteModel(config).named_parameters())
    ours = sum(
        p.numel() * (2 if name.endswith("bias") else 1) for name, p in named.items() if name not in ("mean", "scale")
    )
    assert ours + 320 * 1280 + 2 * 1280 + 1281 * 1000 == 4_652_008


def test_what_cannot_work_is_refused() -> None:
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(**TOWER))
    with pytest.raises(ValueError, match="reads 32 x 32"):
        tower(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="one entry a stage"):
        EfficientNetLiteConfig(**(TOWER | {"repeats": (1, 2)}))
