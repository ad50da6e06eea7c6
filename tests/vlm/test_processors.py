"""Real processors before the tiny models: those that need neither a download nor torchvision (video, and Pixtral's,
do)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny_families
from support.family_models import CASES, OPTIONS, Witness, assert_same, built
from support.tiny_families import BUILDERS, CUT, END, IMAGE, PAD, START, VOCABULARY
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvcapsule.inference.attach import attach

SMALL, WIDE = (16, 40), (32, 24)
"""Heights and widths of two images."""


def tokenizer(specials: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """One token a word: "w7" is 7; special tokens have the ids that the tiny models expect."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY) if i not in specials.values()} | specials
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=f"w{PAD}",
        bos_token="w3",
        padding_side="left",
        extra_special_tokens=named or None,
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return fast


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava() -> ProcessorMixin:
    return LlavaProcessor(
        SiglipImageProcessorPil(size=square(16)),
        tokenizer({"<image>": IMAGE}),
        patch_size=4,
        vision_feature_select_strategy="full",
    )


def any_resolution() -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=square(16), image_grid_pinpoints=tiny_families.PINPOINTS
    )


# The tower has a class token, which the strategy "default" drops.
DROPS_ONE = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def llava_next() -> ProcessorMixin:
    return LlavaNextProcessor(any_resolution(), tokenizer({"<image>": IMAGE}), **DROPS_ONE)


def granite() -> ProcessorMixin:
    return Granite4VisionProcessor(any_resolution(), tokenizer({"<image>": IMAGE}), downsample_rate="1/2", **DROPS_ONE)


def idefics3() -> ProcessorMixin:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    specials = {"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": END, "<end_of_utterance>": CUT}
    specials |= {f"<row_{i + 1}_col_{j + 1}>": 40 + 6 * i + j for i in range(6) for j in range(6)}
    return Idefics3Processor(images, tokenizer(specials), image_seq_len=16)


def paligemma() -> ProcessorMixin:
    images = SiglipImageProcessorPil(size=square(16))
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer({"<image>": IMAGE}))


def gemma3() -> ProcessorMixin:
    specials = {"<soft>": IMAGE, "<boi>": START, "<eoi>": END}
    words = tokenizer(specials, image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>")
    return Gemma3Processor(Gemma3ImageProcessorPil(size=square(32)), words, image_seq_length=16)


def aya_vision() -> ProcessorMixin:
    images = GotOcr2ImageProcessorPil(size=square(32), crop_to_patches=True, min_patches=1, max_patches=4)
    specials = {
        "<image>": 89,
        "<|IMG_PATCH|>": IMAGE,
        "<|START_OF_IMG|>": START,
        "<|END_OF_IMG|>": END,
        "<|IMG_LINE_BREAK|>": CUT,
    }
    specials |= {"TILE_GLOBAL": 87} | {f"TILE_{i}": 80 + i for i in range(1, 5)}
    return AyaVisionProcessor(images, tokenizer(specials), patch_size=4, img_size=32, downsample_factor=2)


PROCESSORS: dict[str, tuple[Callable[[], ProcessorMixin], str]] = {
    "LLaVA": (llava, "<image>"),
    "LLaVA-NeXT": (llava_next, "<image>"),
    "Idefics3, SmolVLM": (idefics3, "<image>"),
    "PaliGemma": (paligemma, "<image>"),
    "Gemma 3": (gemma3, "<boi>"),
    "Aya Vision": (aya_vision, "<image>"),
    "Granite Vision": (granite, "<image>"),
}
"""By family: how its processor is made, and what stands for an image in a prompt."""
SETTINGS = {"LLaVA": {"vision_feature_select_strategy": "full"}}
"""Where the tiny model of test_families is set otherwise."""


def image(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor(name: str) -> None:
    """A batch of images of two sizes, two of them in one prompt without text between where the family allows it."""
    assert name in BUILDERS
    one = built(next(i for i, case in enumerate(CASES) if case.family.name == name))
    build, mark = PROCESSORS[name]
    beside = mark * 2 if one.case.family.span_boundary != "marks" else f"{mark} w9 {mark}"
    pictures = [[image(SMALL, 0), image(WIDE, 1)], [image(WIDE, 2)], [image(SMALL, 3)]]
    batch: Any = build()(
        images=pictures,
        text=[f"w5 {beside} w7 w8", f"w4 {mark} w5 w6", f"{mark} w4"],
        padding=True,
        return_tensors="pt",
    )
    # PaliGemma's processor adds them for training.
    batch.pop("labels", None)
    expected = one.model.generate(**batch, **OPTIONS)
    for tile in (8, 5):
        with attach(one.model, one.identity(tile)):
            assert_same(one.model.generate(**batch, **OPTIONS), expected)
    witness = Witness()
    with attach(one.model, witness):
        one.model.generate(**batch, **OPTIONS)
    spans = witness.seen[0].spans
    assert sum(span.length for span in spans) == int((batch["input_ids"] == IMAGE).sum())
    assert (len(spans) == 4) == (one.case.family.span == "image")
    assert len(spans) >= 4
