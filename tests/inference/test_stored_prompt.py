"""attach(..., store=...): images that the store knows are not read again, and answers are the same as if they were."""

import pytest
import torch
from support import tiny_vlm
from support.builders import cross_layer_capsule, kv_capsule, transform_capsule
from support.family_models import CASES, EXACT, OPTIONS, assert_same, built
from support.stored_prompts import QUESTION, ROOM, TILE, Setting, assert_identical, hits, number

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache

SERVED = {
    *("llava", "llava_next", "llava_onevision", "llava_next_video", "vipllava"),
    *(
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "glm4v",
        "glm4v_moe",
        "glm46v",
        "got_ocr2",
        "granite4_vision",
    ),
}
"""Model types whose prompts with images are cut into pieces; the others run without the store."""
CODECS = {"transform": transform_capsule, "cross-layer": cross_layer_capsule, "kvcapsule": kv_capsule}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c.family.name} {c.model_type}" for c in CASES])
def test_a_lossless_capsule_answers_as_the_full_cache(index: int) -> None:
    """Positions, pieces and everything else are those of the undivided prompt, hit or miss; all families."""
    setting = Setting(built(index))
    prompt, memory = setting.prompt(0, 1), ImageStore(None, max_bytes=ROOM)
    if "token_type_ids" in prompt:
        prompt.pop("attention_mask")
    expected = setting.model.generate(**prompt, **OPTIONS)
    for _ in range(2):
        out, _ = setting.ask(memory, setting.of.identity(TILE), prompt)
        assert_same(out, expected, EXACT)
    counted = memory.statistics
    if setting.of.case.model_type in SERVED and setting.of.case.family.name != "Pixtral":
        assert (counted.hits, counted.puts, counted.skipped) == (2, 2, 0)
    else:
        assert (counted.hits, counted.puts, counted.skipped) == (0, 0, 2)


@pytest.mark.parametrize("codec", CODECS)
def test_a_hit_answers_as_the_miss_did(setting: Setting, codec: str, store: ImageStore) -> None:
    capsule, prompt = CODECS[codec](setting.of.geometry, tile=TILE), setting.prompt(0, 1)
    missed, seen = setting.ask(store, capsule, prompt)
    assert seen == 2 and store.statistics.puts == 2
    known, seen = setting.ask(store, capsule, prompt)
    assert seen == 0 and hits(store) == 2
    assert_identical(known, missed)
    other = setting.prompt(0, 1, question=[4, 10, 11, 12, 13])
    answered, seen = setting.ask(store, capsule, other)
    assert seen == 0 and answered.sequences.shape[1] == other["input_ids"].shape[1] + OPTIONS["max_new_tokens"]
    assert_identical(answered, setting.ask(ImageStore(None, max_bytes=0), capsule, other)[0])


def test_tiles_that_begin_at_blocks(setting: Setting, store: ImageStore) -> None:
    """The same image at another place of a block is another prompt, with tiles of its own."""
    capsule = transform_capsule(setting.of.geometry, 8, align=4)
    for before in (5, 6):
        prompt = setting.prompt(0, 1, before=before)
        missed, seen = setting.ask(store, capsule, prompt)
        known, again = setting.ask(store, capsule, prompt)
        assert (seen, again) == (2, 0)
        assert_identical(known, missed)


def test_the_answer_is_that_of_a_question_asked_later(setting: Setting, store: ImageStore) -> None:
    """Against a run without the store, the question reads the capsule: the very cache of a turn of its own."""
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0)
    out, _ = setting.ask(store, capsule, prompt)
    end = prompt["input_ids"].shape[1] - len(QUESTION) - 2
    model, cache = setting.model, CapsuleCache(setting.model.config, capsule)
    beginning = {name: x[:, :end] if x.shape[-1] == prompt["input_ids"].shape[1] else x for name, x in prompt.items()}
    beginning.pop("attention_mask")
    with attach(model, capsule), torch.no_grad():
        model(**beginning, **cache_argument(cache))
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        text = {name: prompt[name] for name in names if name in prompt}
        later = model.generate(**text, **OPTIONS, **cache_argument(cache))
    assert_same(out, later)
    assert not torch.equal(out.logits[0], setting.plain(capsule, prompt).logits[0])


def test_images_behind_known_ones_are_read_alone(setting: Setting, store: ImageStore) -> None:
    capsule, both = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    assert setting.ask(store, capsule, setting.prompt(0))[1] == 1
    out, seen = setting.ask(store, capsule, both)
    assert seen == 1 and (hits(store), store.statistics.puts) == (1, 2)
    assert_identical(out, setting.ask(ImageStore(None, max_bytes=ROOM), capsule, both)[0])
    assert setting.ask(store, capsule, setting.prompt(1, 0))[1] == 2, "an image is known behind its own prefix alone"
    assert setting.ask(store, capsule, setting.prompt(0, 1, 0))[1] == 1


def test_only_the_question_is_prefilled(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt, lengths = llava.prompt(0, 1), []
    layer = llava.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    llava.ask(store, capsule, prompt)
    assert sum(lengths[:3]) == prompt["input_ids"].shape[1]
    lengths.clear()
    llava.ask(store, capsule, prompt)
    assert lengths[:2] == [len(QUESTION) + 2, 1]


def test_images_side_by_side(setting: Setting, store: ImageStore) -> None:
    of, capsule = setting.of, setting.of.identity(TILE)
    prompt = tiny_vlm.batch(of.tiny, [5, of.tiny.picture(0), of.tiny.picture(1), 8])
    expected = setting.model.generate(**prompt, **OPTIONS)
    for _ in range(2):
        assert_same(setting.ask(store, capsule, prompt)[0], expected)
    assert hits(store) == 2


def test_models_share_a_folder(store: ImageStore) -> None:
    settings = [Setting(built(number(name))) for name in ("llava", "qwen2_vl")]
    answers = []
    for setting in [*settings, *settings]:
        capsule = transform_capsule(setting.of.geometry, TILE)
        answers.append(setting.ask(store, capsule, setting.prompt(0))[0])
    assert hits(store) == 2
    assert_identical(answers[2], answers[0])
    assert_identical(answers[3], answers[1])


def test_a_store_without_room_changes_no_token(setting: Setting, store: ImageStore) -> None:
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    expected, _ = setting.ask(store, capsule, prompt)
    tight = ImageStore(None, max_bytes=0)
    for _ in range(2):
        out, seen = setting.ask(tight, capsule, prompt)
        assert_identical(out, expected)
        assert seen == 2
    assert tight.statistics.refused == 4


def test_a_chat_goes_on_from_the_cache(setting: Setting, store: ImageStore) -> None:
    """The second turn, behind a hit as behind a miss, and as with the full cache."""
    capsule, prompt = setting.of.identity(TILE), setting.prompt(0)
    turns = []
    for kind in ("full", "miss", "hit"):
        if kind == "full":
            out = setting.model.generate(**prompt, **OPTIONS)
        else:
            out, _ = setting.ask(store, capsule, prompt)
        ids = torch.cat([out.sequences, torch.tensor([[9, 4, 4]])], dim=1)
        further = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **cache_argument(output_cache(out))}
        if kind == "full":
            turns.append(setting.model.generate(**further, **OPTIONS))
        else:
            with attach(setting.model, capsule, store):
                turns.append(setting.model.generate(**further, **OPTIONS))
    assert_same(turns[1], turns[0])
    assert_identical(turns[2], turns[1])


def test_input_ids_by_position_and_sampling(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt = dict(llava.prompt(0))
    ids = prompt.pop("input_ids")
    options = {**OPTIONS, "do_sample": True, "temperature": 2.0}
    answers = []
    with attach(llava.model, capsule, store):
        for _ in range(2):
            torch.manual_seed(3)
            answers.append(llava.model.generate(ids, **prompt, **options))
    assert_identical(answers[1], answers[0])
    assert hits(store) == 1
