"""One cell of the bench: an engine of vLLM in a process of its own, and what was seen while it answered.

python -m kvcapsule.eval.bench.engine.cell FILE     reads a Cell as JSON from FILE, and writes what was seen to it
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WATERMARK = 0.05
"""Share of the blocks that stays free when a request is admitted: without it vLLM admits requests that it has to take
back when those before them grow."""


@dataclass(frozen=True)
class Cell:
    """An engine and the requests that it answers."""

    model: str
    """pages-vlm or random-llava."""
    side: int
    """Visual tokens of an image's side; of random-llava."""
    folder: str
    """Where random-llava is made."""
    method: str
    """full, fp8, or the folder or name of a capsule."""
    blocks: int
    block: int
    pool_bytes: int
    count: int
    """Requests."""
    answer: int
    most: int
    """Sequences that may run at once (max_num_seqs)."""
    seed: int = 0


def run(cell: Cell) -> dict[str, Any]:
    """Answer all requests, and say how many ran at once, how long it took, and what was answered."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    from kvcapsule.serving.settings import CONNECTOR

    from . import subjects

    subject = (
        subjects.pages_vlm(cell.count)
        if cell.model == subjects.PAGES
        else subjects.random_llava(cell.side, cell.count, cell.answer, Path(cell.folder))
    )
    options: dict[str, Any] = {}
    if cell.method == "fp8":
        options["kv_cache_dtype"] = "fp8"
    elif cell.method != "full":
        options["worker_cls"] = "kvcapsule.serving.worker.CapsuleWorker"
        options["kv_transfer_config"] = {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"capsule": cell.method, "pool_bytes": cell.pool_bytes},
        }
    length = subject.visual_tokens + subject.text_tokens + 300
    llm = LLM(
        model=str(subject.folder), model_impl=subject.implementation, dtype="float32", enforce_eager=True,
        max_model_len=length, max_num_batched_tokens=max(2048, length), max_num_seqs=cell.most, block_size=cell.block,
        num_gpu_blocks_override=cell.blocks, enable_prefix_caching=False, watermark=_WATERMARK,
        limit_mm_per_prompt={"image": 1}, seed=cell.seed, **options,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=subject.answer, temperature=0, ignore_eos=not subject.ends)
    llm.generate(subject.prompts[:2], sampling, use_tqdm=False)
    engine = llm.llm_engine.engine_core.engine_core
    seen = _Watch(engine.scheduler)
    began = time.perf_counter()
    outputs = llm.generate(subject.prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    pool = engine.scheduler.kv_cache_manager.block_pool
    result = seen.summary() | {
        "seconds": round(seconds, 3),
        "tokens": sum(map(len, answers)),
        "blocks_left_over": cell.blocks - 1 - pool.get_num_free_blocks(),
        "answers": answers,
    }
    if cell.method not in ("full", "fp8"):
        half = engine.scheduler.connector.scheduler
        result |= {"slots_left_over": half.slots.used, "images_left_raw": half.refused}
    return result


class _Watch:
    """Follows the scheduler's steps: how many sequences each has, and how long those take that only decode."""

    def __init__(self, scheduler: Any) -> None:
        self.running: list[int] = []
        self.decoding: list[tuple[int, float]] = []
        self.preempted = 0
        self._last: tuple[int, float] | None = None
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def watched(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self._last is not None:
                self.decoding.append((self._last[0], now - self._last[1]))
            output = schedule(*args, **kwargs)
            tokens = output.num_scheduled_tokens
            if tokens:
                self.running.append(len(tokens))
            self._last = (len(tokens), now) if tokens and set(tokens.values()) == {1} else None
            return output

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = watched, counted

    def summary(self) -> dict[str, Any]:
        tokens, seconds = (sum(x) for x in zip(*self.decoding, strict=True))
        return {
            "sequences_mean": round(sum(self.running) / len(self.running), 2),
            "sequences_most": max(self.running),
            "steps": len(self.running),
            "preempted": self.preempted,
            "tokens_per_s": round(tokens / seconds, 1),
        }


def main() -> int:
    """Run the cell in the file that the command line names, write the result there, and return the exit code."""
    file = Path(sys.argv[1])
    result = run(Cell(**json.loads(file.read_text())))
    file.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
