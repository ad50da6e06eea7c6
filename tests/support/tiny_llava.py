"""Tiny models of the LLaVA families."""

from collections.abc import Callable

import torch

from .tiny_vlm import END, IMAGE, START, VIDEO, Picture, Tiny, around, clip, fixed, llama, noise, qwen2, siglip


def llava() -> Tiny:
    settings = {"text_config": llama(), "vision_config": clip(), "image_token_index": IMAGE, "vision_feature_layer": -1}
    return Tiny(settings, fixed(16, 3, 16, 16))


def vipllava() -> Tiny:
    settings = {
        "text_config": llama(),
        "vision_config": clip(),
        "image_token_index": IMAGE,
        "vision_feature_layers": [-1, -2],
    }
    return Tiny(settings, fixed(16, 3, 16, 16))


PINPOINTS = [[16, 32], [32, 16]]


def any_resolution(side: int = 4) -> Callable[[int], Picture]:
    """A thumbnail and two patches of side x side tokens, beside or below each other, with a newline token for each of
    their rows."""

    def picture(index: int) -> Picture:
        height, width = PINPOINTS[index % 2]
        count = 3 * side**2 + side * height // 16
        inputs = {"pixel_values": noise(index, 1, 3, 3, 16, 16), "image_sizes": torch.tensor([[height, width]])}
        return Picture(around(count), inputs, [count])

    return picture


def llava_next() -> Tiny:
    settings = {"text_config": llama(), "vision_config": clip(), "image_token_index": IMAGE, "vision_feature_layer": -1}
    return Tiny({**settings, "image_grid_pinpoints": PINPOINTS}, any_resolution())


def llava_next_video() -> Tiny:
    def video(index: int) -> Picture:
        return Picture([START, *[VIDEO] * 12, END], {"pixel_values_videos": noise(index, 1, 3, 3, 16, 16)}, [12])

    base = llava_next()
    settings = {**base.settings, "video_token_index": VIDEO, "spatial_pool_stride": 2}
    return Tiny(settings, base.picture, video)


def llava_onevision() -> Tiny:
    def video(index: int) -> Picture:
        return Picture([START, *[VIDEO] * 13, END], {"pixel_values_videos": noise(index, 1, 3, 3, 16, 16)}, [13])

    settings = {
        "text_config": qwen2(),
        "vision_config": siglip(),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
    }
    settings |= {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"}
    return Tiny(settings, any_resolution(), video)
