"""The model families of transformers: which work, what their positions are, and what a visual span is in them.

One table: `kvcapsule models` prints it and tests/vlm/test_families.py builds a tiny model of every row, so that a row
says nothing untested. A family that is not here may well work (attach checks its KV geometry, and a model that does not
read the cache is refused); nobody looked.
"""

from dataclasses import dataclass

TRANSFORMERS = ">=5.22,<5.24"
"""The versions of transformers that the table was tested with: those that pyproject.toml allows."""

WORKS, REFUSED = "works", "refused"


@dataclass(frozen=True)
class Family:
    """What is known of a family. Its fields are the keys of the JSON."""

    name: str
    model_types: tuple[str, ...]
    """As in the models' config.json."""
    classes: tuple[str, ...]
    """transformers' classes, one for each model type: those that AutoModelForImageTextToText builds."""
    status: str
    """"works": an identity capsule gives the full cache's logits. "refused": what is needed is missing, and a message
    says so."""
    positions: str = ""
    """Of the keys in capsules, as in KVGeometry.rotary: "none", "1d", "mrope" (sections) or "mrope-interleaved"."""
    span: str = ""
    """What one visual span is: "image", "crop" (an image is cut into several) or "row" (a separator stands behind each
    row of patches)."""
    video: str = ""
    """What one visual span of a video is: "video" or "frame" (time stamps stand between them); empty without video."""
    apart: str = ""
    """What tells spans apart that follow each other: "marks" (tokens that always stand between them), "grids"
    (image_grid_thw and video_grid_thw), "pixel_values" or "image_sizes" (their count, where all images are of one
    size). Inside generate all of them but "marks" are the images' features, which say the length of each."""
    note: str = ""
    """Of a refused family: words of the message. Of others: what is not in capsules."""


_PIXELS = "pixel_values"
_SIZES = "image_sizes"
_GRIDS = "grids"
_MARKS = "marks"
_CROSS = "its visual tokens live in cross-attention"
_WINDOWS = "windows stay the model's own"
_LINEAR = "linear attention stays the model's own"

FAMILIES: tuple[Family, ...] = (
    Family("LLaVA", ("llava",), ("LlavaForConditionalGeneration",), WORKS, "1d", "image", "", _PIXELS),
    Family("LLaVA-NeXT", ("llava_next",), ("LlavaNextForConditionalGeneration",), WORKS, "1d", "image", "", _SIZES),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        ("LlavaOnevisionForConditionalGeneration",),
        WORKS,
        "1d",
        "image",
        "video",
        _SIZES,
    ),
    Family(
        "LLaVA-NeXT-Video",
        ("llava_next_video",),
        ("LlavaNextVideoForConditionalGeneration",),
        WORKS,
        "1d",
        "image",
        "video",
        _SIZES,
    ),
    Family("VipLlava", ("vipllava",), ("VipLlavaForConditionalGeneration",), WORKS, "1d", "image", "", _PIXELS),
    Family("Qwen2-VL", ("qwen2_vl",), ("Qwen2VLForConditionalGeneration",), WORKS, "mrope", "image", "video", _GRIDS),
    Family(
        "Qwen2.5-VL", ("qwen2_5_vl",), ("Qwen2_5_VLForConditionalGeneration",), WORKS, "mrope", "image", "video", _GRIDS
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl", "qwen3_vl_moe"),
        ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        WORKS,
        "mrope-interleaved",
        "image",
        "frame",
        _GRIDS,
    ),
    Family(
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_moe"),
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        WORKS,
        "mrope-interleaved",
        "image",
        "frame",
        _GRIDS,
        _LINEAR,
    ),
    Family("InternVL", ("internvl",), ("InternVLForConditionalGeneration",), WORKS, "1d", "crop", "", _PIXELS),
    Family(
        "Idefics3, SmolVLM",
        ("idefics3", "smolvlm"),
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        WORKS,
        "1d",
        "crop",
        "",
        _MARKS,
    ),
    Family("PaliGemma", ("paligemma",), ("PaliGemmaForConditionalGeneration",), WORKS, "1d", "image", "", _PIXELS),
    Family("Gemma 3", ("gemma3",), ("Gemma3ForConditionalGeneration",), WORKS, "1d", "image", "", _PIXELS, _WINDOWS),
    Family(
        "Gemma 4", ("gemma4",), ("Gemma4ForConditionalGeneration",), WORKS, "1d", "image", "frame", _MARKS, _WINDOWS
    ),
    Family("Mistral 3", ("mistral3",), ("Mistral3ForConditionalGeneration",), WORKS, "1d", "row", "", _MARKS),
    Family(
        "Pixtral",
        ("llava",),
        ("LlavaForConditionalGeneration",),
        WORKS,
        "1d",
        "row",
        "",
        _MARKS,
        "with Pixtral's tower",
    ),
    Family(
        "Aya Vision",
        ("aya_vision", "cohere2_vision"),
        ("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration"),
        WORKS,
        "none",
        "crop",
        "",
        _MARKS,
        _WINDOWS,
    ),
    Family(
        "GLM-4V",
        ("glm4v", "glm4v_moe", "glm46v"),
        ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Glm46VForConditionalGeneration"),
        WORKS,
        "mrope",
        "image",
        "frame",
        _GRIDS,
    ),
    Family("GOT-OCR2", ("got_ocr2",), ("GotOcr2ForConditionalGeneration",), WORKS, "1d", "image", "", _PIXELS),
    Family(
        "Granite Vision",
        ("granite4_vision",),
        ("Granite4VisionForConditionalGeneration",),
        WORKS,
        "1d",
        "image",
        "",
        _SIZES,
    ),
    Family(
        "LFM2-VL",
        ("lfm2_vl",),
        ("Lfm2VlForConditionalGeneration",),
        WORKS,
        "1d",
        "image",
        "",
        _MARKS,
        "convolutions stay the model's own",
    ),
    Family("Florence-2", ("florence2",), ("Florence2ForConditionalGeneration",), REFUSED, note=_CROSS),
    Family("vision-encoder-decoder", ("vision-encoder-decoder",), ("VisionEncoderDecoderModel",), REFUSED, note=_CROSS),
    Family("Llama 3.2 Vision", ("mllama",), ("MllamaForConditionalGeneration",), REFUSED, note=_CROSS),
    Family(
        "Gemma with shared KV",
        ("gemma3n", "gemma4"),
        ("Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration"),
        REFUSED,
        note="read keys and values of earlier ones",
    ),
)
