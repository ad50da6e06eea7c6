"""generate's ways of decoding with a CapsuleCache: streaming, and a chat of several turns."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from support.decoding import REPEATING, Batch
from support.run_vlm import Model, assert_same, ready, run, tiny_qwen
from transformers import (
    BatchFeature,
    DynamicCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache
from kvcapsule.policy import EvenlySpaced, Full
from kvcapsule.vlm.geometry import KVGeometry


@pytest.fixture(scope="module")
def batch(make_batch: Batch) -> BatchFeature:
    return make_batch((1, REPEATING))


class TestStreaming:
    def test_text_streamer(
        self,
        model: Model,
        batch: BatchFeature,
        greedy: dict[str, Any],
        processor: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        expected = model.generate(**batch, **greedy).sequences
        out = run(model, Full(), batch, streamer=TextStreamer(processor.tokenizer, skip_prompt=True), **greedy)
        assert torch.equal(out.sequences, expected)
        assert (
            capsys.readouterr().out.strip()
            == processor.tokenizer.decode(expected[0, batch["input_ids"].shape[1] :]).strip()
            != ""
        )

    def test_threads(
        self, model: Model, make_batch: Batch, greedy: dict[str, Any], processor: Any, identity: Callable[..., Capsule]
    ) -> None:
        """Three answers at once, each streamed to its own reader: a capsule's frames are of its own thread's
        positions."""
        batches = [make_batch((1, "Read line 2.")), make_batch((0, "What is the number beside the owl?"))]
        batches += [make_batch((2, "Transcribe the page."))]
        plain = [model.generate(**one, **greedy).sequences[0, one["input_ids"].shape[1] :] for one in batches]
        streams, threads = [], []
        with attach(model, identity(49)):
            for one in batches:
                streams.append(TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60))
                threads.append(Thread(target=model.generate, kwargs={**one, **greedy, "streamer": streams[-1]}))
            for thread in threads:
                thread.start()
            texts = ["".join(stream) for stream in streams]
            for thread in threads:
                thread.join()
        assert texts == [processor.tokenizer.decode(tokens) for tokens in plain]
        assert len(set(texts)) == 3


FIVE = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module", params=["llava", "qwen"])
def chat(
    request: pytest.FixtureRequest, model: Model, make_batch: Batch, greedy: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A model; what each turn adds: its token ids and the inputs of its new images; options of generate."""
    if request.param == "llava":
        batches = [make_batch((1, "Read line 2.")), make_batch((2, "And here?")), make_batch((0, "Sum them up."))]
        two = batches[1]["input_ids"]
        image = model.config.image_token_id
        second = torch.cat(
            [two[:, : int((two == image).nonzero()[0, 1])], two[:, int((two == image).nonzero()[0, 1]) + 196 :]], dim=1
        )
        turns = [
            (batches[0]["input_ids"], {"pixel_values": batches[0]["pixel_values"]}),
            (second, {"pixel_values": batches[1]["pixel_values"][1:]}),
            (batches[2]["input_ids"], {}),
        ]
        return model, turns, {**FIVE, "suppress_tokens": greedy["suppress_tokens"]}
    built, inputs = ready(*tiny_qwen())
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    grids = inputs["image_grid_thw"]
    turns = [
        (ids[:, :28], {"pixel_values": pixels[:96], "image_grid_thw": grids[:1]}),
        (ids[:, 28:], {"pixel_values": pixels[96:], "image_grid_thw": grids[1:]}),
        (torch.tensor([[7, 6, 5, 9]]), {}),
    ]
    return built, turns, {**FIVE, "suppress_tokens": [90, 91, 92, 93, 94], "pad_token_id": 0}


class TestChat:
    """Three turns, a new image in the second. Each turn brings the images that are new; LLaVA takes the whole
    conversation's token ids, Qwen2.5-VL, whose position ids are made from all images, those that are not cached.
    """

    @staticmethod
    def hold(model: Any, turns: Any, cache: Any, options: dict[str, Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """Each turn's output, and the position ids of every forward."""
        positions: list[torch.Tensor] = []

        def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            positions.append(kwargs["position_ids"].clone())

        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        ids, outs, lengths, qwen = (
            torch.zeros(1, 0, dtype=torch.int64),
            [],
            [],
            hasattr(model.config, "vision_start_token_id"),
        )
        try:
            for new, images in turns:
                ids = torch.cat([ids, new], dim=1)
                given = ids[:, cache.get_seq_length() :] if qwen else ids
                types = {"mm_token_type_ids": (given == model.config.image_token_id).int()} if qwen else {}
                inputs = {"input_ids": given, "attention_mask": torch.ones_like(ids), **images, **types}
                outs.append(model.generate(**inputs, **cache_argument(cache), **options))
                ids = torch.cat([ids, outs[-1].sequences[:, given.shape[1] :]], dim=1)
                lengths.append(cache.get_seq_length() - ids.shape[1])
        finally:
            handle.remove()
        # The last token written is not read yet.
        assert lengths == [-1] * 3
        return outs, positions

    @pytest.mark.parametrize("tile", [None, 6, 50])
    def test_three_turns(self, tile: int | None, chat: tuple[Any, Any, dict[str, Any]]) -> None:
        model, turns, options = chat
        expected, ids = self.hold(model, turns, DynamicCache(config=model.config.get_text_config()), options)
        method: Any = Full()
        if tile is not None:
            method = Capsule(
                CapsuleConfig("identity", IdentityConfig(tile), KVGeometry.from_config(model.config), "tiny")
            )
        with attach(model):
            outs, ours = self.hold(model, turns, CapsuleCache(model.config, method), options)
        for out, other in zip(outs, expected, strict=True):
            assert_same(out, other)
        assert len(ours) == len(ids) == 15
        for here, there in zip(ours, ids, strict=True):
            assert torch.equal(here, there)

    def test_positions_where_much_is_dropped(self, chat: tuple[Any, Any, dict[str, Any]]) -> None:
        """Position ids are those of the full cache at every step, though the tokens differ."""
        model, turns, options = chat
        _, ids = self.hold(model, turns, DynamicCache(config=model.config.get_text_config()), options)
        with attach(model):
            outs, ours = self.hold(model, turns, CapsuleCache(model.config, EvenlySpaced(0.05)), options)
        assert all(torch.equal(here, there) for here, there in zip(ours, ids, strict=True))
        assert [len(layer.visual) for layer in output_cache(outs[-1]).layers] == [2] * len(output_cache(outs[-1]))

    def test_pipeline(self, model: Model, processor: Any, images: Any) -> None:
        """The pipeline keeps no cache: it feeds every turn whole, both images in the second and third."""
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

        def hold() -> list[str]:
            talk: list[Any] = []
            for image, words in ((images[0], "Read line 2."), (images[1], "And here?"), (None, "Sum them up.")):
                content = [{"type": "text", "text": words}]
                talk.append(
                    {"role": "user", "content": ([{"type": "image", "image": image}] if image else []) + content}
                )
                talk = pipe(text=talk, generate_kwargs=options)[0]["generated_text"]
            return [turn["content"] for turn in talk if turn["role"] == "assistant"]

        expected = hold()
        with attach(model, Full()):
            assert hold() == expected
        assert len(expected) == len(set(expected)) == 3
