"""Models that something is wrapped around: PEFT adapters, and accelerate's hooks for weights that lie elsewhere."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from support.run_vlm import EXACT, Model, assert_same, longer, prefill, ready, run, step, tiny_qwen
from transformers import BatchFeature, DynamicCache

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.inference.attach import attach
from kvcapsule.inference.attention_interface import IMPLEMENTATION
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import output_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import EvenlySpaced, Full
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan

Batch = Callable[..., BatchFeature]
LORA = {"r": 4, "target_modules": r".*language_model.*(q_proj|k_proj|v_proj)", "init_lora_weights": False}
"""On the language part, not zero as it begins."""


@pytest.fixture(scope="module")
def batch(make_batch: Batch) -> BatchFeature:
    return make_batch((1, "Read line 2."), (2, "Transcribe the page."))


@pytest.fixture
def own_model(model: Model) -> Model:
    """A copy: adapters and hooks change the model in place."""
    return copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
class TestPeft:
    @pytest.fixture(params=["PeftModel", "add_adapter", "load_adapter"])
    def adapted(self, request: pytest.FixtureRequest, own_model: Model, tmp_path: Path) -> Any:
        torch.manual_seed(0)
        if request.param == "PeftModel":
            return get_peft_model(own_model, LoraConfig(**LORA)).eval()
        if request.param == "add_adapter":
            try:
                own_model.add_adapter(LoraConfig(**LORA))
            except ValueError as error:
                if "version of PEFT" not in str(error):
                    raise
                pytest.skip("add_adapter of this transformers needs a newer PEFT than the installed one")
            return own_model.eval()
        get_peft_model(copy.deepcopy(own_model), LoraConfig(**LORA)).save_pretrained(tmp_path)
        own_model.load_adapter(str(tmp_path))
        return own_model.eval()

    def test_generate(
        self, adapted: Any, model: Model, batch: BatchFeature, greedy: dict[str, Any], identity: Callable[..., Capsule]
    ) -> None:
        expected = adapted.generate(**batch, **greedy)
        assert not torch.equal(expected.sequences, model.generate(**batch, **greedy).sequences)
        out = run(adapted, identity(50), batch, **greedy)
        assert_same(out, expected)
        assert isinstance(output_cache(out), CapsuleCache)
        assert output_cache(out).bytes().visual > 0
        assert type(output_cache(adapted.generate(**batch, **greedy))) is DynamicCache

    @pytest.mark.parametrize("past_hooks", [False, True], ids=["called", "forward alone"])
    def test_direct_forward(
        self, past_hooks: bool, adapted: Any, batch: BatchFeature, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Older versions of PEFT ran a wrapped model's forward past its hooks: the cache is told of the images all the
        same."""
        if past_hooks:
            monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
            if isinstance(adapted, PeftModel):
                monkeypatch.setattr(
                    type(adapted), "forward", lambda self, *args, **kwargs: self.base_model.forward(*args, **kwargs)
                )
        own, mask, token = (
            DynamicCache(config=adapted.config),
            longer(batch["attention_mask"], 1),
            torch.tensor([[40], [41]]),
        )
        prefill(adapted, batch, own)
        expected = step(adapted, own, token, mask)
        with attach(adapted):
            cache = CapsuleCache(adapted.config, Full())
            prefill(adapted, batch, cache)
            torch.testing.assert_close(step(adapted, cache, token, mask), expected, rtol=0, atol=EXACT)
        assert cache.bytes().visual == 3 * 196 * 4 * 2 * 2 * 32 * 4 + 4 * 2 * 8

    def test_leaves_nothing_behind(self, adapted: Any) -> None:
        def traces() -> Any:
            hooks = [
                list(getattr(m, kind)) for m in adapted.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")
            ]
            return hooks, [sorted(vars(m)) for m in adapted.modules()], adapted.config.text_config._attn_implementation

        before = traces()
        with attach(adapted, Full()) as inside:
            assert inside is adapted
            assert adapted.config.text_config._attn_implementation == IMPLEMENTATION
            with pytest.raises(RuntimeError, match="attached already"), attach(adapted, Full()):
                pass
        assert traces() == before

    def test_adapters_before_the_prompt_are_refused(self, own_model: Model) -> None:
        prefixed = get_peft_model(own_model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with (
            pytest.raises(ValueError, match=r"PREFIX_TUNING puts tokens of its own before .* such as LoRA"),
            attach(prefixed, Full()),
        ):
            pass


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="not Linear"), attach(torch.nn.Linear(1, 1), Full()):
        pass


class TestDeviceMap:
    """accelerate puts hooks around every module's forward; the weights come from where they lie as each is run."""

    @pytest.fixture(params=["dispatched", "weights in the host's memory", "weights on disk"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
        def placed(model: Any) -> Any:
            if request.param == "weights in the host's memory":
                return cpu_offload(model, execution_device="cpu")
            if request.param == "weights on disk":
                return disk_offload(model, tmp_path, execution_device="cpu")
            language = "model.language_model"
            device_map = {f"model.{name}": "cpu" for name, _ in model.model.named_children()} | {"lm_head": "cpu"}
            device_map |= {
                f"{language}.{name}": "cpu"
                for name, _ in model.model.language_model.named_children()
                if name != "layers"
            }
            layers = range(len(model.model.language_model.layers))
            device_map |= {f"{language}.layers.{i}": "disk" if i else "cpu" for i in layers}
            del device_map[language]
            return dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

        return placed

    def test_generate(self, place: Callable[[Any], Any]) -> None:
        """Qwen2.5-VL: what accelerate's hooks leave of the images that generate has encoded is too little for LLaVA,
        with any cache."""
        built, batch = ready(*tiny_qwen())
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "pad_token_id": 0,
        }
        identity = Capsule(CapsuleConfig("identity", IdentityConfig(6), KVGeometry.from_config(built.config), "tiny"))
        expected, lossy = built.generate(**batch, **options), run(built, EvenlySpaced(0.05), batch, **options)
        placed = place(built)
        assert any(parameter.is_meta for parameter in placed.model.language_model.layers.parameters())
        assert_same(placed.generate(**batch, **options), expected, atol=0)
        assert_same(run(placed, identity, batch, **options), expected)
        out = run(placed, EvenlySpaced(0.05), batch, **options)
        assert_same(out, lossy)
        assert not any(
            t.is_meta
            for layer in output_cache(out).layers
            for s in (*layer.visual, *layer.text)
            for t in s.entry_tensors()
        )

    def test_direct_forward(
        self, place: Callable[[Any], Any], own_model: Model, model: Model, batch: BatchFeature
    ) -> None:
        mask, token = longer(batch["attention_mask"], 1), torch.tensor([[40], [41]])
        placed, logits = place(own_model), []
        for one in (model, placed):
            with attach(one):
                cache = CapsuleCache(one.config, EvenlySpaced(0.1))
                prefill(one, batch, cache)
                logits.append(step(one, cache, token, mask))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=EXACT)

    def test_layers_on_several_devices(self) -> None:
        """Mask and rotation lie on the device of the inputs, a layer's keys on its own: a method gets all of it there.

        The second device is "meta", which every machine has; what is computed on it is shapes alone.
        """
        seen: list[LayerPrefill] = []

        class Witness(Method):
            def compress(self, prefill: LayerPrefill) -> Compressed:
                seen.append(prefill)
                return Compressed([], [])

        shared: dict[Any, Any] = {}
        rotation = (torch.zeros(1, 6, 8), torch.zeros(1, 6, 8))
        for index, device in enumerate(("cpu", "meta")):
            layer = CapsuleLayer(index, Witness())
            spans, valid = [VisualSpan(0, 1, 3, (1, 1, 3))], torch.ones(1, 6, dtype=torch.bool)
            layer.context = layer.context._replace(
                spans=spans, valid=valid, position_embeddings=rotation, shared=shared
            )
            tensor = torch.zeros(1, 2, 6, 8, device=device)
            layer.lazy_initialization(tensor, tensor)
            layer._new_tokens = (tensor, tensor)
            layer.commit(torch.zeros(1, 4, 6, 8, device=device), 1.0)
        for one, device in zip(seen, ("cpu", "meta"), strict=True):
            assert one.position_embeddings is not None
            assert {t.device.type for t in (one.keys, one.valid, *one.position_embeddings)} == {device}
