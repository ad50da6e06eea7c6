"""A tiny LLaVA built from nothing, batches of pages for it, and random segments: what most tests share."""

import copy
import functools
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers

if sys.platform != "linux":
    # Triton is built for Linux alone.
    collect_ignore = ["kernels/test_triton.py", "kernels/test_triton_compile.py", "kernels/test_triton_gpu.py"]
# Triton reads this when it first meets a kernel: here, before any test can have imported one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from PIL import Image
from support.builders import cross_layer_capsule, kv_capsule, random_widths, transform_capsule
from support.run_vlm import MIXED
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils.logging import warning_once

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import MlpKeys, MlpRows
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment
from kvcapsule.testbeds.pages import page
from kvcapsule.training.testbeds.pages_vlm.model import build_model, build_processor
from kvcapsule.vlm.geometry import KVGeometry

# Helper modules whose fixtures several test files share.
pytest_plugins = ["support.capsule_files", "support.lossless_methods", "support.noise_capsules", "support.suite_files"]

# One thread for each of several processes: they share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

GAIN = 2.5
"""Factor of the weight matrices: at their initial size all logits are alike and attention is uniform, and no test could
tell."""


_OF_PIPELINES = "Passing `generation_config` together with"
"""Logged by the pipelines of transformers below 5.21 of what they do themselves."""


class _Deprecations(logging.Handler):
    """Keeps what transformers logs of deprecated names."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and _OF_PIPELINES not in message:
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_deprecated_names() -> Iterator[None]:
    """transformers logs a part of its deprecations, once a process, where filterwarnings sees nothing: each test fails
    on its own."""
    warning_once.cache_clear()
    logger, heard = logging.getLogger("transformers"), _Deprecations()
    logger.addHandler(heard)
    yield
    logger.removeHandler(heard)
    assert not heard.messages, "\n".join(heard.messages)


@pytest.fixture(autouse=True, scope="session")
def version_in_reports(record_testsuite_property: Callable[[str, object], None]) -> None:
    """A JUnit file says which transformers it is of (support/range_table.py)."""
    record_testsuite_property("transformers", transformers.__version__)


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    built = build_processor()
    built.tokenizer.padding_side = "left"
    return built


@pytest.fixture(scope="session")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Four layers, 4 query and 2 KV heads of 32, 196 visual tokens an image; float32, eval mode."""
    built = build_model(processor.tokenizer, seed=1).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    return built.requires_grad_(False)


@pytest.fixture(scope="session")
def model64(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same in float64, where rounding cannot hide an error nor make one."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def vlm(
    tmp_path_factory: pytest.TempPathFactory, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> str:
    """The folder of `model` and its processor."""
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return [page("test", index).image for index in range(6)]


@pytest.fixture(scope="session")
def make_batch(processor: LlavaProcessor, images: list[Image.Image]) -> Callable[..., BatchFeature]:
    """make_batch((1, "one image"), (2, "two"), (0, "none")): a left-padded batch of prompts with that many pages
    each."""

    def build(*prompts: tuple[int, str]) -> BatchFeature:
        count = sum(n for n, _ in prompts)
        text = [f"<|user|>{'<image>' * n}{words}<|assistant|>" for n, words in prompts]
        return processor(images=images[:count] or None, text=text, padding=True, return_tensors="pt")

    return build


@pytest.fixture(scope="session")
def greedy(processor: LlavaProcessor) -> dict[str, Any]:
    """Options of generate for eight tokens that neither end early nor look like an image."""
    banned = processor.tokenizer.convert_tokens_to_ids("<image>")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "suppress_tokens": [banned], "do_sample": False}
    return {**options, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="session")
def mixed(make_batch: Callable[..., BatchFeature]) -> BatchFeature:
    """Prompts with one image, several and none."""
    return make_batch(*MIXED)


@pytest.fixture(scope="session")
def expected(model: LlavaForConditionalGeneration, mixed: BatchFeature, greedy: dict[str, Any]) -> Any:
    """The model's own greedy answer to the mixed batch."""
    return model.generate(**mixed, **greedy)


@pytest.fixture(scope="session")
def geometry(model: LlavaForConditionalGeneration) -> KVGeometry:
    return KVGeometry.from_config(model.config)


@pytest.fixture(scope="session")
def identity(geometry: KVGeometry) -> Callable[..., Capsule]:
    """identity(tile): a capsule that stores everything."""

    def build(tile: int, canonical_frame: bool = True) -> Capsule:
        return Capsule(CapsuleConfig("identity", IdentityConfig(tile, canonical_frame), geometry, "tiny"))

    return build


@pytest.fixture(scope="session")
def random_capsule(geometry: KVGeometry) -> Callable[..., Capsule]:
    """random_capsule(key_ratio, value_ratio, tile): see builders.kv_capsule."""

    def build(key_ratio: float = 0.25, value_ratio: float = 0.25, tile: int = 49, **options: Any) -> Capsule:
        return kv_capsule(geometry, key_ratio, value_ratio, tile, **options)

    return build


@pytest.fixture(scope="session")
def random_transform(geometry: KVGeometry) -> Callable[..., Capsule]:
    """random_transform(tile, keys, values): a transform code drawn at random, its widths too; sizes as (rows,
    channels)."""
    return functools.partial(transform_capsule, geometry)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is merely allocated holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def random_cross_layer(geometry: KVGeometry) -> Callable[..., Capsule]:
    """random_cross_layer(tile, rows, channels): a cross-layer transform code drawn at random."""
    return functools.partial(cross_layer_capsule, geometry)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Threads of the compiled kernels, which share even the least work."""
    monkeypatch.setattr("kvcapsule.kernels.cpu.threads._LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    return int(request.param)


SEGMENTS = "raw score_map value_map maps channels bias mask frame quantized mlp coded joint stack everything".split()


@pytest.fixture(params=SEGMENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def random_segment() -> Callable[..., Segment]:
    """random_segment(kind, owner, seed): a segment with the parts that `kind` (one of SEGMENTS) names; 2 KV heads of
    8."""

    def build(kind: str, owner: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Segment:
        heads, dim, tokens, stored = 2, 8, 7, 3
        entries = len(owner)
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def coded(sets: int, groups: int) -> CodedRows:
            widths = random_widths((sets, groups, channels), generator)
            step = 4 * rand(sets, groups, channels).abs() / 2.0**widths
            coding = Coding(widths, step, rand(sets, 8 * groups, channels), heads // sets)
            return CodedRows.encode(rand(entries, sets, 8 * groups, channels), coding)

        whole = kind == "everything"
        score_map = rand(heads, tokens, stored) if kind in ("score_map", "maps") or whole else None
        value_map = rand(heads, tokens, stored + 1) if kind in ("value_map", "maps") or whole else None
        channels = dim // 2 if kind == "channels" or whole else dim
        angle = 3 * rand(entries, dim // 2)
        there = torch.arange(tokens) < torch.randint(0, tokens + 1, (entries, 1), generator=generator)
        keys: Any = rand(entries, heads, tokens if score_map is None else stored, channels)
        values: Any = rand(entries, heads, tokens if value_map is None else stored + 1, channels)
        if kind == "quantized":
            keys, values = QuantizedRows.pack(keys, 2), QuantizedRows.pack(values, 8)
        if kind == "mlp":
            codec = MlpKeys(heads, tokens, stored, hidden=5)
            for parameter in codec.parameters():
                parameter.data.copy_(rand(*parameter.shape))
            keys = MlpRows(rand(entries, heads, stored, dim), codec)
        in_cells = kind in ("coded", "joint", "stack")
        if in_cells:
            sets, channels = (heads if kind == "coded" else 1), 3
            score_map, value_map = rand(sets, tokens, 8), rand(sets, tokens, 16)
            keys, values = coded(sets, 1), coded(sets, 2)
        if kind == "stack":
            # One code is read as keys and as values.
            score_map = value_map
            keys = values
        return Segment(
            keys,
            values,
            torch.tensor(owner, dtype=torch.int64),
            score_map=score_map,
            value_map=value_map,
            value_mean=rand(heads, channels) if kind == "value_map" or whole else None,
            q_map=rand(heads, dim, channels) if kind == "channels" or in_cells or whole else None,
            out_map=rand(heads, channels, dim) if kind == "channels" or in_cells or whole else None,
            bias=rand(entries, heads, tokens) if kind == "bias" or whole else None,
            mask=there if kind == "mask" or whole else None,
            frame=Frame(angle.cos(), angle.sin()) if kind == "frame" or whole else None,
        )

    return build


@pytest.fixture(scope="module")
def quick_streams() -> Iterator[None]:
    """`datasets` sleeps for five seconds behind each stream, for the threads of disks that are far away."""
    import datasets

    before, datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN, 0
    yield
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, and far slower where other processes want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
