"""Every family of VLMs that works at inference can be trained: `kvcapsule train` on a tiny model of each row of
kvcapsule.vlm.families, and the capsule attached to it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import tiny_vlm
from support.family_models import CASES, NEW, OPTIONS, Built, built
from support.tiny_training import FAMILY_OPTIONS, HELD_OUT, ROWS, TILE, TinyProcessor, data_words, questions, trained

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data.source import load
from kvcapsule.data.source_config import SourceConfig
from kvcapsule.eval.main import main as evaluate
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import Full
from kvcapsule.training.analysis.main import main as analyze
from kvcapsule.training.datamodule import Questions
from kvcapsule.training.harvest import Recorder
from kvcapsule.training.losses import full_output, output_error
from kvcapsule.vlm.families import FAMILIES
from kvcapsule.vlm.geometry import full_attention_layers

HYBRID = [index for index, case in enumerate(CASES) if "the model's own" in case.family.note]
NAMES = [f"{case.family.name}:{case.model_type}" for case in CASES]
RUNS = [("transform", index) for index in range(len(CASES))]
RUNS += [(recipe, index) for recipe in FAMILY_OPTIONS if recipe != "transform" for index in HYBRID]


def test_the_table_says_so() -> None:
    assert {case.family.name for case in CASES} == {family.name for family in FAMILIES if family.trained}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return questions(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture
def one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Built:
    """A tiny model, which every command loads, whatever the name that it is given."""
    one = built(request.param)
    loaded = one.model, TinyProcessor(one.tiny)
    for module in ("training.fit", "training.analysis.study", "eval.run"):
        monkeypatch.setattr(f"kvcapsule.{module}.load_vlm", lambda *_: loaded)
    return one


class Answer(NamedTuple):
    cache: CapsuleCache
    logits: torch.Tensor
    """[NEW, B, vocabulary]."""


def answer(one: Built, method: Method, prompts: list[list[Any]]) -> Answer:
    cache = CapsuleCache(one.model.config, method)
    with attach(one.model, method):
        out = one.model.generate(**tiny_vlm.batch(one.tiny, *prompts), **cache_argument(cache), **OPTIONS)
    return Answer(cache, torch.stack(out.logits))


class Witness(Recorder):
    """Keeps the prefills beside what training makes of them."""

    def __init__(self) -> None:
        super().__init__(TILE)
        self.seen: list[LayerPrefill] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.seen.append(prefill)
        return super().compress(prefill)


@torch.no_grad()
def output_errors(one: Built, capsule: Capsule, source: str) -> list[float]:
    """Of attention in each layer with a codec, on the questions that training measured on."""
    rows = load(SourceConfig(source=source, split="all"))
    held_out = Questions(rows, rows.select(range(ROWS - HELD_OUT, ROWS)), TinyProcessor(one.tiny), batch=HELD_OUT)
    (batch,), witness = held_out.val_dataloader(), Witness()
    with attach(one.model):
        one.model(**batch.inputs, **cache_argument(CapsuleCache(one.model.config, witness)))
    compression = capsule.begin_pass([prefill.layer for prefill in witness.seen])
    done = dict(pair for prefill in witness.seen for pair in compression.add(prefill))
    segments = [done[prefill.layer].visual[0] for prefill in witness.seen]
    return [
        float(output_error(layer, segment, full_output(layer)))
        for layer, segment in zip(witness.layers, segments, strict=True)
    ]


def raw_share(cache: CapsuleCache) -> float:
    """Share of the visual tokens that fill no tile."""
    lengths = [span.length for forward in cache._spans.forwards for span in forward.spans]
    return sum(length % TILE for length in lengths) / sum(lengths)


@pytest.mark.parametrize(
    ("recipe", "one"), RUNS, ids=[f"{recipe}-{NAMES[index]}" for recipe, index in RUNS], indirect=["one"]
)
def test_trained_saved_attached(recipe: str, one: Built, source: str, tmp_path: Path) -> None:
    metrics = trained(source, recipe, tmp_path / "capsule")
    capsule = Capsule.from_pretrained(tmp_path / "capsule")
    full, ours = answer(one, Full(), one.prompts), answer(one, capsule, one.prompts)

    # The config names the layers that have codecs, and the metrics speak of these.
    layers = full_attention_layers(one.model.config)
    assert list(capsule.config.geometry.capsule_layers) == layers
    named = json.loads((tmp_path / "capsule" / "config.json").read_text())["geometry"].get("full_attention")
    assert named == (layers if len(layers) < len(full.cache.layers) else None)
    assert {name.split("/")[0] for name in metrics if "/" in name} == {f"layer{layer}" for layer in layers}

    # Bytes: as many as asked for, in those layers alone.
    compressed, whole = ours.cache.bytes(), full.cache.bytes()
    assert (compressed.text, compressed.other) == (whole.text, whole.other)
    assert [layer.index for layer in ours.cache.layers if isinstance(layer, CapsuleLayer) and layer.visual] == layers
    asked = float(FAMILY_OPTIONS[recipe][1])
    raw = raw_share(ours.cache)
    expected = whole.visual * ((1 - raw) / asked / 2 + raw)
    stored = expected if recipe in ("transform", "cross-layer") else compressed.visual
    assert 0.9 * stored <= compressed.visual <= 1.01 * stored
    assert compressed.visual < 0.75 * whole.visual

    # The saved capsule, in the model, makes each layer's error that training measured.
    for layer, error in zip(layers, output_errors(one, capsule, source), strict=True):
        assert error == pytest.approx(metrics[f"layer{layer}/output_error"], rel=0.01, abs=1e-6)

    # The first token is the full cache's, the next are read from the capsule; rows without an image are exact.
    assert torch.equal(ours.logits[0], full.logits[0])
    assert not torch.allclose(ours.logits[1, :2], full.logits[1, :2], atol=1e-4)
    torch.testing.assert_close(ours.logits[:, 2], full.logits[:, 2], rtol=0, atol=1e-4)
    assert ours.logits.isfinite().all() and len(ours.logits) == NEW


@pytest.mark.parametrize("one", HYBRID, ids=[NAMES[index] for index in HYBRID], indirect=True)
def test_hybrid_models_are_measured(one: Built, source: str, tmp_path: Path) -> None:
    """`eval` and `analyze` speak of the layers with full attention."""
    trained(source, "cross-layer", tmp_path / "capsule")
    words = ["--capsule", str(tmp_path / "capsule"), "--max-new-tokens", "3", "--timing", "false", "--device", "cpu"]
    unseen = questions(tmp_path, 8, first=ROWS)
    assert (
        evaluate(
            [*data_words(unseen), *words, "--methods", "cross-layer,snapkv", "--json", str(tmp_path / "eval.json")]
        )
        == 0
    )
    rows = {row["method"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    of_capsule = rows["cross-layer"]
    assert of_capsule["compression16"] > 1.9
    assert rows["snapkv"]["kv_bytes"] == pytest.approx(of_capsule["kv_bytes"], rel=0.1)

    words = ["--tile", str(TILE), "--json", str(tmp_path / "analysis.json"), "--device", "cpu"]
    assert analyze([*data_words(source), *words]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == full_attention_layers(one.model.config)
