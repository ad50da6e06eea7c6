"""Spans given out of a cache and taken in by another: what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import identity_capsule, transform_capsule
from support.family_models import built
from support.run_vlm import ready, tiny_gemma
from support.span_prompts import LLAVA, QWEN, TILE, prompt

from kvcapsule.errors import CapsuleError, ConfigError, GeometryError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import EvenlySpaced, Full
from kvcapsule.vlm.geometry import KVGeometry


class TestRefused:
    """By a sentence."""

    @pytest.mark.parametrize("policy", [Full(), EvenlySpaced(0.5)], ids=["full", "evenly-spaced"])
    def test_policies(self, policy: Any) -> None:
        asked = prompt(LLAVA, 0)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, policy))
        with pytest.raises(ConfigError, match=f"{type(policy).__name__} is no capsule"):
            cache.stored_spans()
        with pytest.raises(ConfigError, match="is no capsule"):
            CapsuleCache(asked.of.model.config, policy).take_in([])

    def test_layers_with_a_window(self) -> None:
        gemma, batch = ready(*tiny_gemma())
        cache = CapsuleCache(gemma.config, identity_capsule(KVGeometry.from_config(gemma.config), tile=TILE))
        with attach(gemma), torch.no_grad():
            gemma(**batch, **cache_argument(cache))
        with pytest.raises(ConfigError, match=r"layers \[0, 2\] of this model have a cache of the model's own"):
            cache.stored_spans()

    def test_spans_that_are_no_beginning(self) -> None:
        asked = prompt(LLAVA, 0, 1)
        of = asked.of
        capsule, other = (transform_capsule(of.geometry, tile=tile) for tile in (TILE, TILE + 1))
        with attach(of.model):
            one, two = asked.read(CapsuleCache(of.model.config, capsule)).stored_spans()
            foreign = asked.read(CapsuleCache(of.model.config, other)).stored_spans(weights="w")
            full = asked.read(CapsuleCache(of.model.config, capsule))
        cache = CapsuleCache(of.model.config, capsule)
        for spans, message in (
            ([], "no spans"),
            ([two], "span 0 and the text before it begin at position 19 and not 0"),
            ([two, one], "position 19 and not 0"),
            ([one, one], "span 1 and the text before it begin at position 0 and not 19"),
            (foreign, "span 0 was stored with capsule"),
            ([one, two._replace(header=replace(two.header, weights="w"))], "weights 'w'"),
            ([one, two._replace(header=replace(two.header, adapter="a"))], "adapter 'a'"),
            ([one, two._replace(header=replace(two.header, dtype="float16"))], "float16"),
        ):
            with pytest.raises(CapsuleError, match=message):
                cache.take_in(spans)
            assert cache.get_seq_length() == 0 and not cache.taken_in
        with pytest.raises(ConfigError, match="holds tokens"):
            full.take_in([one])
        cache.take_in([one, two])
        assert [s.header for s in cache.stored_spans()] == [one.header, two.header]
        assert foreign[0].header.weights == "w"

    def test_a_capsule_of_another_model(self) -> None:
        asked = prompt(LLAVA, 0)
        capsule = transform_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            spans = asked.read(CapsuleCache(asked.of.model.config, capsule)).stored_spans()
        with pytest.raises(GeometryError):
            CapsuleCache(built(QWEN).model.config, capsule).take_in(spans)
