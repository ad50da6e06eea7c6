"""The arguments of `lmms-eval --model kvcapsule --model_args ...`: the model, the method, and how it is run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import yaml

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import ConfigError
from kvcapsule.methods.method import Method
from kvcapsule.policy import REGISTRY

from ..entries import FIXED, FULL, build

_AUTO = "auto"


@dataclass(frozen=True)
class ModelArguments:
    """What `--model_args` may name; with a policy, its settings too (`kvcapsule methods` lists them)."""

    pretrained: str = ""
    """The VLM: a shipped name, a folder or an id on the Hub. Needed."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    capsule: str | None = None
    """A capsule: a folder, a shipped name or an id on the Hub. Without a capsule and a policy: the full cache."""
    policy: str | None = None
    """A policy of `kvcapsule methods`, or int8 to int2, kivi4, kivi2, turboquant4 to turboquant2, full."""
    budget: float | None = None
    """Share of the tokens that the policy keeps, in (0, 1]: of the visual tokens for a policy whose setting is
    retention, of all tokens for one whose setting is budget."""
    dtype: str = _AUTO
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1. Default: CUDA if present. `lmms-eval --device` is the same."""
    device_map: str | None = None
    """auto: split the model over all devices."""
    attn_implementation: str | None = None
    """Attention of the prefill, such as sdpa, eager or flash_attention_2. Default: the model's choice."""
    batch_size: int = 1
    """Questions that are answered together. `lmms-eval --batch_size` is the same."""
    max_new_tokens: int = 1024
    """Most tokens of an answer, for tasks that do not say."""
    num_frames: int | None = None
    """Frames of a video. Default: the processor's choice."""
    fps: float | None = None
    """Frames of a video for each of its seconds, in place of num_frames."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the policy, by name."""

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise ConfigError("model_args name no model: add pretrained=MODEL, a name, a folder or a Hub id.")
        if self.capsule is not None and self.policy is not None:
            raise ConfigError("capsule= and policy= are two methods: name one of them, or neither for the full cache.")
        if self.device_map not in (None, _AUTO):
            raise ConfigError(f"device_map={self.device_map}: only {_AUTO} is known; one device is named by device=.")
        if self.device_map is not None and self.device is not None:
            raise ConfigError("device_map=auto splits the model over all devices: leave out the device, or device_map.")
        if self.num_frames is not None and self.fps is not None:
            raise ConfigError("num_frames= and fps= both say how many frames of a video are read: name one of them.")
        for name in ("batch_size", "max_new_tokens", "num_frames"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value}: a whole number of at least 1 is needed.")
        if self.fps is not None and not (isinstance(self.fps, int | float) and self.fps > 0):
            raise ConfigError(f"fps={self.fps}: a number above 0 is needed.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ModelArguments":
        """From values by name, those of a policy's settings among them.

        Raises:
            ConfigError: for an unknown name, or a value that it cannot have.
        """
        known = {f.name: f for f in fields(cls) if f.name != "settings"}
        policy = values.get("policy")
        settings = _settings_of(str(policy)) if policy is not None else []
        for name in values:
            if name not in known and name not in settings:
                near = get_close_matches(name, [*known, *settings], n=1)
                of_policy = f", and of {policy} {', '.join(settings)}" if settings else ""
                raise ConfigError(
                    f"model_args have no argument {name!r}; {f'did you mean {near[0]!r}? T' if near else 't'}here are"
                    f" {', '.join(known)}{of_policy}."
                )
        # lmms-eval reads a name of digits as a number.
        texts = [name for name, f in known.items() if f.type in (str, str | None)]
        arguments: dict[str, Any] = {
            name: str(value) if name in texts else value for name, value in values.items() if name in known
        }
        return cls(**arguments, settings={n: _parsed(value) for n, value in values.items() if n not in known})

    def method(self) -> Method | None:
        """The capsule, on the CPU, or the policy; None: the full cache.

        Raises:
            CapsuleError: if the capsule cannot be loaded.
            ConfigError, InputError: for a policy that there is not, or a setting that it cannot have.
        """
        if self.capsule is not None:
            self._refuse_budget("a capsule")
            return Capsule.from_pretrained(self.capsule)
        if self.policy in (None, FULL):
            self._refuse_budget("the full cache")
            return None
        return _policy(str(self.policy), self.budget, self.settings)

    def _refuse_budget(self, what: str) -> None:
        if self.budget is not None:
            raise ConfigError(f"budget={self.budget}: {what} has no budget; leave it out, or name a policy.")


def _policy(name: str, budget: float | None, settings: Mapping[str, Any]) -> Method:
    base, fixed = FIXED.get(name, (name, {}))
    field_name = REGISTRY.find(base).budget_field
    if field_name is None and budget is not None:
        raise ConfigError(f"policy={name} has no budget, as it keeps every token: leave out budget={budget}.")
    share = budget
    rest = {**fixed, **settings}
    if field_name in rest:
        if budget is not None and field_name != "budget":
            raise ConfigError(f"budget= and {field_name}= are the same setting of {name}: name one of them.")
        share = rest.pop(field_name)
    if field_name is not None and share is None:
        raise ConfigError(f"policy={name} needs budget=SHARE: the share of the tokens that it keeps, in (0, 1].")
    return build(base, rest, share)


def _settings_of(policy: str) -> list[str]:
    """Names of a policy's settings but "budget", which is an argument for all policies."""
    if policy == FULL:
        return []
    base, fixed = FIXED.get(policy, (policy, {}))
    return [f.name for f in fields(REGISTRY.find(base)) if f.name not in ("budget", *fixed)]  # type: ignore[arg-type]


def _parsed(value: Any) -> Any:
    """A list in brackets as a list; lmms-eval has parsed numbers and truth values."""
    return yaml.safe_load(value) if isinstance(value, str) and value.startswith("[") else value
