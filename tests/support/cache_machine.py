"""Random sequences of what a user may do with a cache, held against the model's own cache.

Two models of the same weights go the same way: one attached, with a CapsuleCache of a capsule that stores everything,
the other with transformers' DynamicCache. After each forward their logits are the same to the rounding of float32.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, PreTrainedModel

from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.vlm.geometry import KVGeometry
from support.builders import identity_capsule
from support.run_vlm import EXACT
from support.tiny_families import idefics3, internvl
from support.tiny_llava import llava
from support.tiny_qwen import glm4v, qwen2_vl, qwen3_vl
from support.tiny_vlm import PAD, Picture, Tiny, batch, build

FAMILIES: dict[str, tuple[Callable[[], Tiny], str]] = {
    "llava": (llava, "llava"),
    "internvl": (internvl, "internvl"),
    "idefics3": (idefics3, "idefics3"),
    "qwen2_vl": (qwen2_vl, "qwen2_vl"),
    "qwen3_vl": (qwen3_vl, "qwen3_vl"),
    "glm4v": (glm4v, "glm4v"),
}
LONGEST = 300
"""Tokens after which a conversation begins anew."""
TOKENS = st.lists(st.integers(20, 60), min_size=1, max_size=4)


class AbortedError(Exception):
    """Raised in the middle of a forward."""


class Kept(NamedTuple):
    """A state to which a user may go back."""

    cache: CapsuleCache
    reference: Any
    deltas: Any
    mask: torch.Tensor
    ids: torch.Tensor
    loose: int


class CacheMachine(RuleBasedStateMachine):
    """One conversation of some rows; see the module."""

    family: str
    attached: PreTrainedModel
    plain: PreTrainedModel
    tiny: Tiny
    conversations: ClassVar[int]
    """Of all runs so far."""
    steps: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Kept] = []
        self.started = False
        self.broken = False

    @property
    def rotary_axes(self) -> bool:
        """M-RoPE: transformers takes no mask in a direct forward behind a cache, so rows are of one length."""
        return bool(self.deltas_of(self.plain))

    @staticmethod
    def deltas_of(model: PreTrainedModel) -> list[torch.nn.Module]:
        return [module for module in model.modules() if "rope_deltas" in vars(module)]

    @initialize(tile=st.sampled_from([1, 4, 5, 16, 64]), frames=st.booleans())
    def begin(self, tile: int, frames: bool) -> None:
        type(self).conversations += 1
        geometry = KVGeometry.from_config(self.attached.config)
        self.capsule = identity_capsule(geometry, tile, canonical_frame=frames)

    def fresh(self) -> None:
        self.cache = CapsuleCache(self.attached.config, self.capsule)
        self.reference: Any = DynamicCache(config=self.plain.config)
        self.kept, self.broken, self.started = [], False, True

    @rule(
        shapes=st.lists(
            st.lists(st.sampled_from(["text", "picture 0", "picture 1"]), max_size=4), min_size=1, max_size=3
        ),
        words=st.lists(TOKENS, min_size=12, max_size=12),
    )
    def prefill(self, shapes: list[list[str]], words: list[list[int]]) -> None:
        """A conversation begins."""
        if self.rotary_axes:
            shapes = [shapes[0]] * len(shapes)
        rows = []
        for number, shape in enumerate(shapes):
            row: list[int | Picture] = []
            for place, what in enumerate([*shape, "text"]):
                lengths = [len(w) for w in words]
                word = words[(number * 4 + place) % 12]
                if self.rotary_axes:
                    word = (word * 4)[: lengths[place]]
                row += word if what == "text" else [self.tiny.picture(int(what[-1]))]
            rows.append(row)
        inputs = batch(self.tiny, *rows)
        for module in self.deltas_of(self.plain):
            module.rope_deltas = None
        self.fresh()
        self.ids, self.mask, self.loose = inputs["input_ids"], inputs["attention_mask"], 0
        logits = [self.forward(m, c, **inputs) for m, c in self.sides()]
        self.compare(*logits)

    def sides(self) -> list[tuple[PreTrainedModel, Any]]:
        return [(self.attached, self.cache), (self.plain, self.reference)]

    @staticmethod
    def forward(model: PreTrainedModel, cache: Any, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, **cache_argument(cache)).logits
        return logits

    def compare(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        seen = self.mask[:, -ours.shape[1] :].bool()
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=EXACT)

    def positions(self, new: int) -> dict[str, torch.Tensor]:
        """Mask and positions of the last `new` tokens, where a model takes them."""
        if self.rotary_axes:
            return {}
        return {
            "attention_mask": self.mask,
            "position_ids": (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -new:],
        }

    def ready(self) -> bool:
        return self.started and not self.broken and self.ids.shape[1] < LONGEST

    def extend(self, tokens: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)

    @precondition(ready)
    @rule(words=TOKENS)
    def turn(self, words: list[int]) -> None:
        """Text behind what is cached."""
        tokens = torch.tensor([[(w + row - 20) % 41 + 20 for w in words] for row in range(len(self.ids))])
        self.extend(tokens)
        self.loose += tokens.shape[1]
        given = {"input_ids": tokens, **self.positions(tokens.shape[1])}
        self.compare(*(self.forward(m, c, **given) for m, c in self.sides()))

    @precondition(ready)
    @rule(pictures=st.lists(st.integers(0, 1), min_size=1, max_size=2), words=TOKENS)
    def new_image(self, pictures: list[int], words: list[int]) -> None:
        """Images behind what is cached."""
        row: list[int | Picture] = []
        for number in pictures:
            row += [*words, self.tiny.picture(number)]
        inputs = batch(self.tiny, *[[*row, *words]] * len(self.ids))
        tokens = inputs["input_ids"]
        self.extend(tokens)
        self.loose = 0
        given = {**inputs, **self.positions(tokens.shape[1])}
        if self.rotary_axes:
            del given["attention_mask"]
        self.compare(*(self.forward(m, c, **given) for m, c in self.sides()))

    @precondition(ready)
    @rule(count=st.integers(0, 8))
    def crop(self, count: int) -> None:
        """Take tokens back; more than are raw is refused and changes nothing."""
        if count > self.loose:
            try:
                self.cache.crop(-count)
            except ConfigError:
                return
            raise AssertionError(f"{count} tokens were taken back, of {self.loose} that are raw")
        self.cache.crop(-count)
        if count:
            self.reference.crop(-count)
            self.ids, self.mask = self.ids[:, :-count], self.mask[:, :-count]
            self.loose -= count

    @precondition(ready)
    @rule(rows=st.lists(st.integers(0, 5), min_size=1, max_size=4), how=st.sampled_from(["select", "reorder"]))
    def choose_rows(self, rows: list[int], how: str) -> None:
        chosen = torch.tensor([row % len(self.ids) for row in rows])
        for cache in (self.cache, self.reference):
            if how == "select":
                cache.batch_select_indices(chosen)
            else:
                cache.reorder_cache(chosen)
        self.of_rows(chosen)

    @precondition(ready)
    @rule(times=st.integers(1, 2))
    def repeat_rows(self, times: int) -> None:
        if len(self.ids) * times <= 4:
            for cache in (self.cache, self.reference):
                cache.batch_repeat_interleave(times)
            self.of_rows(torch.arange(len(self.ids)).repeat_interleave(times))

    def of_rows(self, chosen: torch.Tensor) -> None:
        # transformers leaves the deltas on the model as they were.
        for module in self.deltas_of(self.plain):
            if module.rope_deltas is not None:
                module.rope_deltas = module.rope_deltas[chosen]
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]

    @precondition(ready)
    @rule()
    def keep(self) -> None:
        """Copy both caches; what comes later leaves the copies as they are."""
        deltas = [copy.deepcopy(module.rope_deltas) for module in self.deltas_of(self.plain)]
        held = Kept(copy.deepcopy(self.cache), copy.deepcopy(self.reference), deltas, self.mask, self.ids, self.loose)
        self.kept = [*self.kept[-2:], held]

    @precondition(lambda self: self.kept)
    @rule(number=st.integers(0, 2))
    def go_back(self, number: int) -> None:
        held = self.kept[number % len(self.kept)]
        self.cache, self.reference = copy.deepcopy(held.cache), copy.deepcopy(held.reference)
        for module, deltas in zip(self.deltas_of(self.plain), held.deltas, strict=True):
            module.rope_deltas = copy.deepcopy(deltas)
        self.mask, self.ids, self.loose, self.broken = held.mask, held.ids, held.loose, False

    @precondition(ready)
    @rule(again=st.booleans())
    def offload(self, again: bool) -> None:
        for index in range(len(self.cache.layers)):
            self.cache.offload(index)
        if again:
            for index in range(len(self.cache.layers)):
                self.cache.layers[index].prefetch()

    @precondition(lambda self: self.started)
    @rule(pictures=st.lists(st.integers(0, 1), max_size=1), words=TOKENS)
    def another_conversation(self, pictures: list[int], words: list[int]) -> None:
        """Another prompt is read by the attached model, into a cache of its own."""
        inputs = batch(self.tiny, [*words, *map(self.tiny.picture, pictures), *words])
        self.forward(self.attached, CapsuleCache(self.attached.config, self.capsule), **inputs)

    @precondition(ready)
    @rule(layer=st.integers(0, 1), words=TOKENS)
    def abort(self, layer: int, words: list[int]) -> None:
        """An exception in a layer of a turn: before the first layer nothing happened; later the cache is refused."""
        tokens = torch.tensor([words] * len(self.ids))
        mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = {} if self.rotary_axes else {"attention_mask": mask}

        def fail(*args: Any) -> None:
            raise AbortedError

        handle = self.attached.get_decoder().layers[layer].register_forward_pre_hook(fail)
        try:
            self.forward(self.attached, self.cache, input_ids=tokens, **positions)
        except AbortedError:
            pass
        finally:
            handle.remove()
        self.broken = layer > 0
        if self.broken:
            try:
                self.forward(self.attached, self.cache, input_ids=tokens, **positions)
            except ConfigError as error:
                note(str(error))
                return
            raise AssertionError("a cache of unlike layers was read")

    @precondition(lambda self: self.ready() and not self.rotary_axes)
    @rule(new=st.integers(2, 4))
    def generate(self, new: int) -> None:
        """generate, given the whole conversation and one token more."""
        more = torch.full((len(self.ids), 1), 25)
        self.extend(more)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
        given = {"input_ids": self.ids, "attention_mask": self.mask}
        outs = []
        for model, cache in self.sides():
            outs.append(model.generate(**given, **cache_argument(cache), **options))  # type: ignore[operator]
        assert torch.equal(*outs)
        self.extend(outs[0][:, self.ids.shape[1] : -1])
        self.loose += new

    @invariant()
    def lengths_are_the_same(self) -> None:
        type(self).steps += 1
        if self.started and not self.broken:
            assert self.cache.get_seq_length() == self.reference.get_seq_length() == self.ids.shape[1]


def machine(family: str) -> type[CacheMachine]:
    """The machine of one family's tiny model."""
    builder, model_type = FAMILIES[family]
    tiny = builder()
    parts = {"family": family, "tiny": tiny, "conversations": 0, "steps": 0}
    parts |= {"attached": build(model_type, tiny), "plain": build(model_type, tiny)}
    return type(f"CacheMachine_{family}", (CacheMachine,), parts)


def attached(kind: type[CacheMachine]) -> Any:
    """The machine's model is attached while the block lasts; caches are made by hand."""
    return attach(kind.attached)
