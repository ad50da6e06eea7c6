"""pages-vlm: how it is trained, and that what is shipped reads pages, whole and as a capsule."""

import copy

import numpy as np
import pytest
import torch

from kvcapsule import Capsule, CapsuleCache, attach
from kvcapsule.checkpoints import shipped
from kvcapsule.data.prompts import conversation, encode
from kvcapsule.errors import ModelError
from kvcapsule.eval.scores.demo import demo_score
from kvcapsule.eval.scores.target import Target
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.testbeds.pages import WORDS, page, pages, questions
from kvcapsule.training.testbeds.pages_vlm.data import IGNORE, PatchCollator, TurnCollator
from kvcapsule.training.testbeds.pages_vlm.run import DemoVlmConfig
from kvcapsule.training.testbeds.pages_vlm.run import main as train
from kvcapsule.training.testbeds.pages_vlm.stages import PatchStage, ReaderStage
from kvcapsule.vlm.loading import load_vlm

MODEL_BYTES = 12 * 2**20


def test_words_and_digits_are_single_tokens_wherever_they_stand(processor) -> None:
    tokenizer = processor.tokenizer
    for word in WORDS:
        (alone,) = tokenizer.encode(word)
        assert alone in tokenizer.encode(f"Find {word}?") and alone in tokenizer.encode(f"12\n{word} 3")
    assert [tokenizer.decode([t]) for t in tokenizer.encode("482")] == ["4", "8", "2"]
    odd = "Grüße, 北京!\n\t~"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_packed_turns_see_what_they_would_see_alone(model, processor) -> None:
    """A question packed behind others has the logits that it has by itself."""
    collate = TurnCollator(processor)
    index = next(i for i in range(50) if np.random.default_rng([i, 7]).random() >= 0.25)
    batch = collate([index])
    with torch.no_grad():
        packed = model(
            **{k: getattr(batch, k) for k in ("pixel_values", "input_ids", "attention_mask", "position_ids")}
        ).logits[0]
    turn_starts = [i for i in range(198, batch.input_ids.shape[1]) if batch.position_ids[0, i] == 197]
    start = turn_starts[1]
    end = turn_starts[2]
    alone_ids = torch.cat([batch.input_ids[:, :197], batch.input_ids[:, start:end]], dim=1)
    with torch.no_grad():
        alone = model(pixel_values=batch.pixel_values, input_ids=alone_ids).logits[0]
    torch.testing.assert_close(packed[start:end], alone[197:], atol=2e-4, rtol=1e-3)
    asked = batch.labels[0, start:end]
    assert (asked != IGNORE).sum() > 1 and (batch.weights[0, start:end][asked == IGNORE] == 0).all()


@pytest.mark.parametrize(("stage", "collate"), [(PatchStage, PatchCollator), (ReaderStage, TurnCollator)])
def test_each_stage_learns_a_batch(model, processor, stage, collate) -> None:
    fit = stage(copy.deepcopy(model).train(), 10)
    fit.log = lambda *args, **kwargs: None  # Without a trainer.
    batch = collate(processor)([0, 1])
    optimizer = fit.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    losses = []
    for _ in range(15):
        loss = fit.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def shipped_vlm():
    return load_vlm("pages-vlm", device="cpu")


def test_the_shipped_model_is_what_was_promised(shipped_vlm) -> None:
    model, processor = shipped_vlm
    folder = shipped("pages-vlm")
    assert folder is not None and sum(f.stat().st_size for f in folder.iterdir()) <= MODEL_BYTES
    assert type(model).__name__ == "LlavaForConditionalGeneration" and processor.tokenizer.is_fast
    text = model.config.text_config
    assert (
        text.num_hidden_layers >= 4 and text.num_attention_heads > text.num_key_value_heads >= 2 and text.head_dim >= 32
    )
    inputs = encode(processor, [conversation([page("test", 0).image], "Read line 1.")])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() >= 196


def test_crop_size_changes_no_pixel(shipped_vlm) -> None:
    """vLLM counts an image's tokens by it; images are resized to the same size, and nothing is left to crop."""
    _, processor = shipped_vlm
    images = [page("test", index).image for index in range(6)]
    images += [images[0].resize((90, 200)), images[1].resize((300, 140))]
    plain = copy.deepcopy(processor.image_processor)
    assert plain.crop_size is not None
    plain.crop_size = None
    found, before = (each(images, return_tensors="pt")["pixel_values"] for each in (processor.image_processor, plain))
    assert torch.equal(found, before)


@pytest.mark.parametrize(
    ("name", "smaller", "agreeing"),
    [
        ("pages-vlm-kvcapsule", 2.4, 17),
        ("pages-vlm-transform", 40, 22),
        ("pages-vlm-cross-layer", 40, 23),
        ("pages-vlm-blocks", 3.7, 23),
    ],
)
def test_the_shipped_model_and_capsules_read(shipped_vlm, name: str, smaller: float, agreeing: int) -> None:
    """On 24 held-out questions: most are right, and the capsule, at so many times fewer bytes (of float32), mostly
    agrees."""
    model, processor = shipped_vlm
    rows = pages("test", 24, seed=3, tasks=("line", "lookup", "count"))
    inputs = encode(processor, [conversation([r["image"]], r["prompt"]) for r in rows])
    width = inputs["input_ids"].shape[1]

    def texts(tokens: torch.Tensor) -> list[str]:
        return processor.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)

    full = texts(model.generate(**inputs, max_new_tokens=48, do_sample=False))
    capsule = Capsule.from_pretrained(name)
    cache = CapsuleCache(model.config, capsule)
    with attach(model, capsule):
        small = texts(model.generate(**inputs, max_new_tokens=48, do_sample=False, **cache_argument(cache)))
    targets = [Target((row["answer"],), task=row["task"]) for row in rows]
    assert sum(map(demo_score, full, targets)) >= 18
    assert sum(mine == theirs for mine, theirs in zip(small, full, strict=True)) >= agreeing
    assert 24 * 196 * 2 * 2 * 32 * 4 * 4 / cache.bytes().visual >= smaller


def test_a_language_model_is_no_vlm(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"vision-language model"):
        load_vlm(str(tmp_path))
    with pytest.raises(ModelError, match="unknown dtype"):
        load_vlm("pages-vlm", dtype="int3")


def test_the_answer_depends_on_the_image(shipped_vlm) -> None:
    model, processor = shipped_vlm
    asked = [questions(page("test", i), np.random.default_rng(0), ("line",))[0] for i in range(2)]
    inputs = encode(processor, [conversation([page("test", i).image], q.prompt) for i, q in enumerate(asked)])
    answers = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert not torch.equal(answers[0], answers[1])


def test_training_goes_on_from_a_trained_model(tmp_path) -> None:
    """One step on full pages; stage 1 is left out, and what is saved reads as a model."""
    before = {name: p.clone() for name, p in load_vlm("pages-vlm", device="cpu")[0].named_parameters()}
    config = DemoVlmConfig(
        str(tmp_path / "out"), str(tmp_path / "work"), str(shipped("pages-vlm")), reader_steps=1, batch=1, threads=1
    )
    train(config)
    assert not (tmp_path / "work" / "patches").exists()
    after = dict(load_vlm(str(tmp_path / "out"), device="cpu")[0].named_parameters())
    moved = [float((after[name] - p).abs().max()) for name, p in before.items()]
    assert 0 < max(moved) < 1e-3
