"""A task's generation settings as options of transformers' generate."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig

from ..watched_generate import GREEDY

BLANK_LINE = "\n\n"
"""What lmms-eval puts in as `until` where a task names none. It is not used, as in lmms-eval's own Qwen models: answers
that think first would be cut at their first paragraph."""
_FIXED = {"cache_implementation", "num_return_sequences", "return_dict_in_generate", "use_cache"}
"""Settings of generate that a task cannot change: there is one answer to a question, and always the cache that is
measured."""


class Generation(NamedTuple):
    """How the questions of a batch are answered."""

    options: dict[str, Any]
    """Of generate."""
    stops: list[str]
    """An answer ends before the first of these strings."""
    unused: list[str]
    """Names of the task's settings that are not options, such as those of one model family."""

    def cut(self, answer: str) -> str:
        """The answer up to the first stop string."""
        ends = [end for stop in self.stops if (end := answer.find(stop)) >= 0]
        return answer[: min(ends)] if ends else answer


def generation(settings: Mapping[str, Any], max_new_tokens: int) -> Generation:
    """Read a task's `generation_kwargs`.

    An answer is sampled where `do_sample` says so, or else where there is a temperature above 0; a temperature of 0 is
    always greedy.

    Args:
        settings: by name, as lmms-eval hands them on.
        max_new_tokens: for a task that does not say.
    """
    values = {name: value for name, value in settings.items() if value is not None}
    until = values.pop("until", [])
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != BLANK_LINE]
    temperature = values.pop("temperature", None)
    sampled = bool(values.pop("do_sample", (temperature or 0) > 0)) and temperature != 0
    top_p, top_k = values.pop("top_p", None), values.pop("top_k", None)
    known = GenerationConfig().to_dict().keys() - _FIXED
    options: dict[str, Any] = {
        **GREEDY,
        "max_new_tokens": max_new_tokens,
        **{name: value for name, value in values.items() if name in known},
    }
    if sampled:
        # Some tasks write 0 where they mean that there is no limit.
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p or None, "top_k": top_k or None}
        options = {name: value for name, value in options.items() if value is not None}
    return Generation(options, stops, [name for name in values if name not in known])
