"""Table of transformers' VLM families: which work, their position encoding, and what a visual span is in each.

`kvcapsule models` prints the table. tests/vlm/test_families.py builds a tiny model of every row and
tests/training/test_every_model.py trains a capsule for it, so every row is tested. A family that is not listed may
work: `attach` checks the KV geometry and refuses a model that does not read the cache. It was not tried.
"""

from dataclasses import dataclass

TRANSFORMERS = ">=5.16,<5.25"
"""The versions of transformers that the table was tested with: those that pyproject.toml allows."""

WORKS, REFUSED = "works", "refused"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: a model family. The fields are the keys of `kvcapsule models --json`."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` in the models' config.json."""
    classes: tuple[str, ...]
    """transformers' model classes, one per model type, as AutoModelForImageTextToText builds them."""
    status: str
    """"works": an identity capsule gives the logits of the full cache. "refused": `attach` raises GeometryError."""
    trained: bool = True
    """Whether `kvcapsule train` makes capsules for it; tests/training/test_every_model.py does."""
    positions: str = ""
    """Rotary scheme of the keys, as in KVGeometry.rotary: "none", "1d", "mrope" (sections) or "mrope-interleaved"."""
    span: str = ""
    """What one visual span covers: "image", "crop" (an image is cut into several) or "row" (a separator token follows
    each row of patches)."""
    video: str = ""
    """What one visual span of a video covers: "video" or "frame" (time stamps between frames); "" without video."""
    span_boundary: str = ""
    """How adjacent images are told apart when no text separates them: "marks" (separator tokens), "grids"
    (image_grid_thw and video_grid_thw), "pixel_values" or "image_sizes" (the number of images, if all have one size).
    Inside `generate` the lengths of the image features take the place of all of these but "marks"."""
    note: str = ""
    """Refused family: words of the error message. Others: layers that keep the model's own cache."""


_PIXELS = "pixel_values"
_SIZES = "image_sizes"
_GRIDS = "grids"
_MARKS = "marks"
_CROSS = "its visual tokens live in cross-attention"
_WINDOWS = "windows stay the model's own"
_LINEAR = "linear attention stays the model's own"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="LLaVA",
        model_types=("llava",),
        classes=("LlavaForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_PIXELS,
    ),
    Family(
        name="LLaVA-NeXT",
        model_types=("llava_next",),
        classes=("LlavaNextForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_SIZES,
    ),
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        classes=("LlavaOnevisionForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        video="video",
        span_boundary=_SIZES,
    ),
    Family(
        name="LLaVA-NeXT-Video",
        model_types=("llava_next_video",),
        classes=("LlavaNextVideoForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        video="video",
        span_boundary=_SIZES,
    ),
    Family(
        name="VipLlava",
        model_types=("vipllava",),
        classes=("VipLlavaForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_PIXELS,
    ),
    Family(
        name="Qwen2-VL",
        model_types=("qwen2_vl",),
        classes=("Qwen2VLForConditionalGeneration",),
        status=WORKS,
        positions="mrope",
        span="image",
        video="video",
        span_boundary=_GRIDS,
    ),
    Family(
        name="Qwen2.5-VL",
        model_types=("qwen2_5_vl",),
        classes=("Qwen2_5_VLForConditionalGeneration",),
        status=WORKS,
        positions="mrope",
        span="image",
        video="video",
        span_boundary=_GRIDS,
    ),
    Family(
        name="Qwen3-VL",
        model_types=("qwen3_vl", "qwen3_vl_moe"),
        classes=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        status=WORKS,
        positions="mrope-interleaved",
        span="image",
        video="frame",
        span_boundary=_GRIDS,
    ),
    Family(
        name="Qwen3.5",
        model_types=("qwen3_5", "qwen3_5_moe"),
        classes=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        status=WORKS,
        positions="mrope-interleaved",
        span="image",
        video="frame",
        span_boundary=_GRIDS,
        note=_LINEAR,
    ),
    Family(
        name="InternVL",
        model_types=("internvl",),
        classes=("InternVLForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="crop",
        span_boundary=_PIXELS,
    ),
    Family(
        name="Idefics3, SmolVLM",
        model_types=("idefics3", "smolvlm"),
        classes=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        status=WORKS,
        positions="1d",
        span="crop",
        span_boundary=_MARKS,
    ),
    Family(
        name="PaliGemma",
        model_types=("paligemma",),
        classes=("PaliGemmaForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_PIXELS,
    ),
    Family(
        name="Gemma 3",
        model_types=("gemma3",),
        classes=("Gemma3ForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_PIXELS,
        note=_WINDOWS,
    ),
    Family(
        name="Gemma 4",
        model_types=("gemma4",),
        classes=("Gemma4ForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        video="frame",
        span_boundary=_MARKS,
        note=_WINDOWS,
    ),
    Family(
        name="Mistral 3",
        model_types=("mistral3",),
        classes=("Mistral3ForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="row",
        span_boundary=_MARKS,
    ),
    Family(
        name="Pixtral",
        model_types=("llava",),
        classes=("LlavaForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="row",
        span_boundary=_MARKS,
        note="with Pixtral's tower",
    ),
    Family(
        name="Aya Vision",
        model_types=("aya_vision", "cohere2_vision"),
        classes=("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration"),
        status=WORKS,
        positions="none",
        span="crop",
        span_boundary=_MARKS,
        note=_WINDOWS,
    ),
    Family(
        name="GLM-4V",
        model_types=("glm4v", "glm4v_moe", "glm46v"),
        classes=("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Glm46VForConditionalGeneration"),
        status=WORKS,
        positions="mrope",
        span="image",
        video="frame",
        span_boundary=_GRIDS,
    ),
    Family(
        name="GOT-OCR2",
        model_types=("got_ocr2",),
        classes=("GotOcr2ForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_PIXELS,
    ),
    Family(
        name="Granite Vision",
        model_types=("granite4_vision",),
        classes=("Granite4VisionForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_SIZES,
    ),
    Family(
        name="LFM2-VL",
        model_types=("lfm2_vl",),
        classes=("Lfm2VlForConditionalGeneration",),
        status=WORKS,
        positions="1d",
        span="image",
        span_boundary=_MARKS,
        note="convolutions stay the model's own",
    ),
    Family(
        name="Florence-2",
        model_types=("florence2",),
        classes=("Florence2ForConditionalGeneration",),
        status=REFUSED,
        trained=False,
        note=_CROSS,
    ),
    Family(
        name="vision-encoder-decoder",
        model_types=("vision-encoder-decoder",),
        classes=("VisionEncoderDecoderModel",),
        status=REFUSED,
        trained=False,
        note=_CROSS,
    ),
    Family(
        name="Llama 3.2 Vision",
        model_types=("mllama",),
        classes=("MllamaForConditionalGeneration",),
        status=REFUSED,
        trained=False,
        note=_CROSS,
    ),
    Family(
        name="Gemma with shared KV",
        model_types=("gemma3n", "gemma4"),
        classes=("Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration"),
        status=REFUSED,
        trained=False,
        note="read keys and values of earlier ones",
    ),
)
