"""attach(..., store=...): images that the store knows are not read again, and answers are the same as if they were."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_vlm
from support.builders import cross_layer_capsule, identity_capsule, kv_capsule, transform_capsule
from support.family_models import CASES, EXACT, OPTIONS, Built, assert_same, built

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache
from kvcapsule.policy import Full
from kvcapsule.store.folder import SUFFIX

TILE = 5
ROOM = 10**8
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
QUESTION = [3, 8, 9]
TOWERS = ("visual", "vision_tower", "vision_model")
CODECS = {"transform": transform_capsule, "cross-layer": cross_layer_capsule, "kvcapsule": kv_capsule}


class Setting:
    """A model, its prompts, and how often its vision tower ran."""

    def __init__(self, of: Built, model: Any = None) -> None:
        self.of, self.model = of, of.model if model is None else model

    def prompt(self, *pictures: int, before: int = 5, question: list[int] = QUESTION) -> Any:
        """Some text, pictures with a token behind each, a question."""
        parts: list[Any] = [before, 6]
        for picture in pictures:
            parts += [self.of.tiny.picture(picture), 7]
        return tiny_vlm.batch(self.of.tiny, [*parts, *question])

    def plain(self, capsule: Capsule, prompt: Any, **options: Any) -> Any:
        with attach(self.model, capsule):
            return self.model.generate(**prompt, **{**OPTIONS, **options})

    def ask(self, store: ImageStore, capsule: Capsule, prompt: Any, **options: Any) -> tuple[Any, int]:
        """The answer with a store, and how many images the vision tower saw."""
        with attach(self.model, capsule, store), self.watched() as runs:
            return self.model.generate(**prompt, **{**OPTIONS, **options}), len(runs)

    @contextmanager
    def watched(self) -> Iterator[list[None]]:
        runs: list[None] = []
        tower = next(getattr(self.model.model, name) for name in TOWERS if hasattr(self.model.model, name))
        handle = tower.register_forward_hook(lambda *args: runs.append(None))
        try:
            yield runs
        finally:
            handle.remove()


def number(model_type: str) -> int:
    return next(i for i, case in enumerate(CASES) if case.model_type == model_type)


@pytest.fixture(params=["llava", "qwen2_vl", "qwen2_5_vl"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(built(number(request.param)))


@pytest.fixture
def llava() -> Setting:
    of = built(number("llava"))
    return Setting(of, copy.deepcopy(of.model))


@pytest.fixture
def capsule(llava: Setting) -> Capsule:
    return transform_capsule(llava.of.geometry, TILE)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", max_bytes=ROOM)


def assert_identical(out: Any, expected: Any) -> None:
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, out.logits, expected.logits))


def hits(store: ImageStore) -> int:
    return store.statistics.hits


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


def change_nothing(setting: Setting, prompt: Any) -> None:
    pass


def another_image(setting: Setting, prompt: Any) -> None:
    prompt["pixel_values"] = prompt["pixel_values"].clone()
    prompt["pixel_values"].view(-1)[7] += 1e-3


def another_prefix(setting: Setting, prompt: Any) -> None:
    prompt["input_ids"][0, 0] = 4


def another_dtype(setting: Setting, prompt: Any) -> None:
    setting.model.to(torch.bfloat16)
    prompt["pixel_values"] = prompt["pixel_values"].to(torch.bfloat16)


def another_weight(setting: Setting, prompt: Any) -> None:
    with torch.no_grad():
        setting.model.model.vision_tower.get_parameter(
            next(iter(dict(setting.model.model.vision_tower.named_parameters())))
        ).add_(1e-3)


def another_weight_through_data(setting: Setting, prompt: Any) -> None:
    setting.model.lm_head.weight.data += 1e-3


def another_parameter(setting: Setting, prompt: Any) -> None:
    weight = setting.model.lm_head.weight
    setting.model.lm_head.weight = torch.nn.Parameter(weight.detach() + 1e-3, requires_grad=False)


def another_setting(setting: Setting, prompt: Any) -> None:
    # The other of the tiny tower's two.
    setting.model.config.vision_feature_layer = -3 - setting.model.config.vision_feature_layer


CHANGES = [another_image, another_prefix, another_dtype, another_weight, another_weight_through_data, another_parameter]


@pytest.mark.parametrize("within", [True, False], ids=["one attach", "attached anew"])
@pytest.mark.parametrize("change", [change_nothing, *CHANGES, another_setting])
def test_whatever_differs_is_a_miss(
    change: Callable[..., None], within: bool, llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    prompt = llava.prompt(0)
    if within:
        with attach(llava.model, capsule, store):
            llava.model.generate(**prompt, **OPTIONS)
            change(llava, prompt)
            out = llava.model.generate(**prompt, **OPTIONS)
    else:
        llava.ask(store, capsule, prompt)
        change(llava, prompt)
        out, _ = llava.ask(store, capsule, prompt)
    assert hits(store) == (change is change_nothing)
    assert_identical(out, llava.ask(ImageStore(None, max_bytes=ROOM), capsule, prompt)[0])


def test_another_capsule_is_a_miss(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt, other = llava.prompt(0), copy.deepcopy(capsule)
    llava.ask(store, capsule, prompt)
    with torch.no_grad():
        other.layers[0].keys.transform.offset.add_(0.1)
    llava.ask(store, other, prompt)
    assert hits(store) == 0
    llava.ask(store, copy.deepcopy(capsule), prompt)
    assert hits(store) == 1


def test_another_attention_or_an_equal_model_is_a_hit(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt = llava.prompt(0)
    llava.ask(store, capsule, prompt)
    llava.model.set_attn_implementation("eager")
    assert llava.ask(store, capsule, prompt)[1] == 0
    again = Setting(llava.of, copy.deepcopy(llava.of.model))
    assert again.ask(ImageStore(store.path, max_bytes=ROOM), capsule, prompt)[1] == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_told_apart(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    from peft import LoraConfig, get_peft_model

    prompt, states = llava.prompt(0), []
    targets = r".*language_model.*(q_proj|k_proj|v_proj)"

    def ask(model: Any) -> None:
        before = hits(store)
        with attach(model, capsule, store):
            model.generate(**prompt, **OPTIONS)
            states.append(hits(store) - before)
            model.generate(**prompt, **OPTIONS)
        assert hits(store) - before == states[-1] + 1

    ask(llava.model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(llava.model, config, "one").eval()
    ask(model)
    model.add_adapter("two", config)
    model.eval()
    ask(model)
    model.set_adapter("two")
    ask(model)
    with model.disable_adapter():
        ask(model)
    layer = next(module for module in model.modules() if hasattr(module, "lora_alpha"))
    layer.scaling["two"] *= 2
    ask(model)
    model.merge_adapter()
    ask(model)
    assert states == [0] * 7
    ask(model)
    assert states[-1] == 1


def test_a_damaged_entry_is_read_anew(setting: Setting, store: ImageStore) -> None:
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    expected, _ = setting.ask(store, capsule, prompt)
    assert store.path is not None
    for file in store.path.glob(f"*{SUFFIX}"):
        file.write_bytes(file.read_bytes()[:-3])
    out, seen = setting.ask(store, capsule, prompt)
    assert_identical(out, expected)
    assert (seen, hits(store), store.statistics.damaged) == (2, 0, 1)
    assert setting.ask(store, capsule, prompt)[1] == 0 and store.check() == []


def test_what_is_no_span_or_of_another_place_is_a_miss(
    setting: Setting, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    expected, _ = setting.ask(store, capsule, prompt)
    second, first = (entry.header.key for entry in store.entries()[::-1] if entry.header)
    other = store.get(second)
    assert other is not None
    for wrong in (b"noise", other):
        before = store.statistics.damaged
        store.put(first, wrong)
        assert_identical(setting.ask(store, capsule, prompt)[0], expected)
        assert store.statistics.damaged == before + 1
    assert len(caplog.messages) == 1 and "an entry is not used" in caplog.messages[0]


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


def test_of_a_chain_the_last_images_go_first(llava: Setting, capsule: Capsule) -> None:
    memory = ImageStore(None, max_bytes=ROOM)
    llava.ask(memory, capsule, llava.prompt(0, 1))
    chain = [entry.header.about["text"] for entry in memory.entries() if entry.header]
    assert chain[0] == 3, "the first image, which has three tokens of text before it, is not the most recently used"


def unserved(setting: Setting) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Prompts and options that a store does not serve."""
    tiny, prompt = setting.of.tiny, setting.prompt(0)
    picture = tiny.picture(0)
    embedded = {"position_ids": torch.arange(prompt["input_ids"].shape[1])[None]}
    return {
        "rows": (tiny_vlm.batch(tiny, [5, picture, 7], [5, picture, 7]), {}),
        "padding": (padded(prompt), {}),
        "beams": (prompt, {"num_beams": 2}),
        "answers": (prompt, {"num_return_sequences": 2, "do_sample": True}),
        "lookup": (prompt, {"prompt_lookup_num_tokens": 2}),
        "static": (prompt, {"cache_implementation": "static"}),
        "hidden": (prompt, {"output_hidden_states": True}),
        "positions": ({**prompt, **embedded}, {}),
        "feature layer": (prompt, {"vision_feature_layer": -1}),
        "ends with an image": (
            tiny_vlm.batch(tiny, [5, picture.tokens[0], picture._replace(tokens=[90] * picture.spans[0])]),
            {},
        ),
        "no cache": (prompt, {"use_cache": False}),
    }


def padded(prompt: Any) -> Any:
    mask = prompt["attention_mask"].clone()
    mask[0, 0] = 0
    return {**prompt, "attention_mask": mask}


@pytest.mark.parametrize("name", list(unserved(Setting(built(number("llava"))))))
def test_what_cannot_be_served_runs_without_the_store(
    name: str, llava: Setting, capsule: Capsule, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, options = unserved(llava)[name]
    torch.manual_seed(0)
    expected = llava.plain(capsule, prompt, **options)
    for count in (1, 2):
        torch.manual_seed(0)
        out, seen = llava.ask(store, capsule, prompt, **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert seen > 0 and store.statistics.skipped == (0 if name == "no cache" else count)
    assert store.statistics.puts == store.statistics.misses == 0
    assert len([m for m in caplog.messages if "image store" in m]) == (name != "no cache")


def test_rotations_by_the_prompts_length_run_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    text = llava.model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    llava.ask(store, capsule, llava.prompt(0))
    assert store.statistics.skipped == 1 and store.statistics.puts == 0


def test_a_model_in_training_or_under_autocast_runs_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    with torch.autocast("cpu"):
        llava.ask(store, capsule, llava.prompt(0))
    llava.model.train()
    llava.ask(store, capsule, llava.prompt(0))
    assert store.statistics.skipped == 2 and store.statistics.puts == 0


def test_weights_that_are_not_in_memory_run_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    from accelerate import cpu_offload

    prompt = llava.prompt(0)
    cpu_offload(llava.model, execution_device=torch.device("cpu"))
    with attach(llava.model, capsule, store):
        try:
            llava.model.generate(**prompt, **OPTIONS)
        except AttributeError as error:
            # transformers 5.23's own, with any cache.
            assert "pooler_output" in str(error)
    assert store.statistics.skipped == 1 and store.statistics.puts == 0


def test_text_alone_is_no_matter_of_the_store(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt = tiny_vlm.batch(llava.of.tiny, [5, 6, 7])
    out, _ = llava.ask(store, capsule, prompt)
    assert_identical(out, llava.plain(capsule, prompt))
    assert store.statistics.skipped == store.statistics.misses == 0


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


def test_only_a_capsule_has_a_store(llava: Setting, store: ImageStore) -> None:
    for method in (Full(), None):
        with pytest.raises(ConfigError, match="attach a Capsule"), attach(llava.model, method, store):
            pass
    assert llava.model.config.get_text_config()._attn_implementation != "kvcapsule"


def test_identity_capsule_of_other_tiles_is_told_apart(llava: Setting, store: ImageStore) -> None:
    for tile in (4, 8):
        llava.ask(store, identity_capsule(llava.of.geometry, tile), llava.prompt(0))
    assert hits(store) == 0 and store.statistics.puts == 2
