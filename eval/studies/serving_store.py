"""vLLM asked twice about the same images, with an image store and without one:
`python -m kvcapsule.eval.studies.serving_store`, in an environment with vLLM (make test-vllm sets one up).

vLLM's prefix cache is off, and before each pass its caches of processed and encoded images are emptied. Measured are
the seconds of a pass and the CPU's (those of other programs do not count), whole and up to the first tokens, the images
that the vision tower reads, the answers that are those of the first pass, and the bytes of an entry against the KV of
the prefix that it stands for.
"""

import os
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvcapsule.checkpoints import shipped
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import NAME, Column, ReportTable, print_report
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError
from kvcapsule.testbeds.pages import pages

from .command import Study

PROG = "python -m kvcapsule.eval.studies.serving_store"
PASSES = ("first", "second")
_BLOCK, _POOL, _CACHE, _ROOM = 32, 2**26, 2**26, 10**9


@dataclass(frozen=True)
class ServingStoreConfig:
    """What is measured, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name or a folder."""
    capsule: str = "pages-vlm-blocks-20x"
    """The capsule, whose tiles are whole blocks of 32 tokens."""
    questions: int = 100
    """Images of the test split of pages, with a question about each, all asked at once."""
    max_new_tokens: int = 120
    """Most tokens of an answer."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""

    def __post_init__(self) -> None:
        for name in ("questions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: at least 1 is needed.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, and return the exit code."""
    return Study(
        PROG,
        ServingStoreConfig,
        usage="[--capsule NAME] [--questions N] [--json FILE]",
        description="Ask vLLM twice about the same images, with an image store and without one.",
        measure=run,
        show=_print,
    ).main(argv)


def run(config: ServingStoreConfig, command: str) -> dict[str, Any]:
    """Measure in a process for each engine, and return the measurements."""
    # One process for an engine and its model, so that the vision tower can be watched.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    measured = {}
    with TemporaryDirectory() as folder:
        for store in (None, folder):
            with get_context("spawn").Pool(1) as pool:
                measured[store is not None] = pool.apply(_measure, (config, store))
    reference = {store: cell["passes"][0]["answers"] for store, cell in measured.items()}
    rows = []
    for with_store, cell in measured.items():
        for name, one in zip(PASSES, cell["passes"], strict=True):
            answers = one.pop("answers")
            same = {
                f"same_as_{other}": sum(map(str.__eq__, answers, reference[of])) / len(answers)
                for other, of in (("first", with_store), ("no_store", False))
            }
            rows.append({"store": with_store, "pass": name, **one, **same})
    sizes = measured[True]["sizes"]
    return {
        "model": shown_path(config.model),
        "capsule": shown_path(config.capsule),
        "questions": config.questions,
        "versions": versions(),
        "machine": machine(),
        "dtype": "float32",
        "rows": rows,
        "entry": {
            **sizes,
            "raw_over_entry": sizes["raw_bytes_float32"] / sizes["bytes"],
            "raw_16_bits_over_entry": sizes["raw_bytes_float32"] / 2 / sizes["bytes"],
        },
        "known_over_no_store": {
            name: rows[3][name] / rows[1][name] for name in ("seconds", "cpu_seconds", "first_tokens_cpu_s")
        },
        "command": command,
    }


def _engine(config: ServingStoreConfig, store: str | None) -> Any:
    """vLLM's engine with the capsule; store: folder of its image store, or None."""
    from vllm import LLM

    from kvcapsule.serving.settings import CONNECTOR, SCHEDULER

    extra: dict[str, Any] = {"capsule": config.capsule, "pool_bytes": _POOL}
    if store is not None:
        extra |= {"store": store, "store_max_bytes": _ROOM}
    options: dict[str, Any] = {} if store is None else {"scheduler_cls": SCHEDULER}
    return LLM(
        model=str(shipped(config.model) or config.model),
        model_impl="transformers",
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        block_size=_BLOCK,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=_CACHE,
        seed=0,
        worker_cls="kvcapsule.serving.worker.CapsuleWorker",
        kv_transfer_config={
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
        **options,
    )


def _measure(config: ServingStoreConfig, store: str | None) -> dict[str, Any]:
    """The two passes of one engine, and the sizes of what is stored."""
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    llm = _engine(config, store)
    core = llm.llm_engine.engine_core.engine_core
    encoded = _watched(core.model_executor.driver_worker.worker.model_runner.model)
    known, writer = core.scheduler.connector.known, get_kv_transfer_group().worker.store
    if known is not None:
        # Misses before the model's files are read would be the start-up's.
        known.files.wait()

    def ask(rows: list[dict[str, Any]], tokens: int) -> tuple[list[str], dict[str, float], int]:
        llm.reset_mm_cache()
        core.reset_encoder_cache()
        encoded.clear()
        prompts = [
            {
                "prompt": f"<|user|><image>{row['prompt']}<|assistant|>",
                "multi_modal_data": {"image": row["image"]},
            }
            for row in rows
        ]
        begin = time.perf_counter(), time.process_time()
        out = llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0), use_tqdm=False)
        seconds = {"seconds": time.perf_counter() - begin[0], "cpu_seconds": time.process_time() - begin[1]}
        if writer is not None:
            writer.flush()
        return [one.outputs[0].text for one in out], seconds, sum(encoded)

    warm, rows = list(pages("test", 4, seed=1)), list(pages("test", config.questions, seed=0))
    ask(warm, config.max_new_tokens)
    folder = Path(store) if store is not None else None
    passes: list[dict[str, Any]] = []
    for _ in PASSES:
        first_tokens = None
        if passes or folder is None:
            first_tokens = ask(rows, 1)[1]["cpu_seconds"]
        answers, seconds, images = ask(rows, config.max_new_tokens)
        passes.append({**seconds, "first_tokens_cpu_s": first_tokens, "images_encoded": images, "answers": answers})
    sizes = {}
    if known is not None:
        entries = known.store.entries()
        about = entries[0].header.about
        tokens = about["tokens"] + about["text"]
        geometry = known.capsule.config.geometry
        sizes = {
            "tokens": tokens,
            "bytes": sum(entry.header.bytes for entry in entries) / len(entries),
            "bytes_on_disk": sum(entry.bytes for entry in entries) / len(entries),
            "raw_bytes_float32": tokens * 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * 4,
        }
    return {"passes": passes, "sizes": sizes}


def _watched(model: Any) -> list[int]:
    """Gets the number of images of each call of the model's vision tower."""
    calls: list[int] = []
    encode = model.embed_multimodal

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        calls.append(len(out))
        return out

    model.embed_multimodal = watched
    return calls


def _print(result: dict[str, Any]) -> None:
    entry = result["entry"]
    titles = ("seconds", "CPU seconds to\nfirst tokens", "images\nencoded", "as first\npass", "as no\nstore")
    table = ReportTable(
        [Column("store", NAME), Column("pass", NAME), *map(Column, titles)],
        note=f"{result['questions']} images; {entry['bytes']:,.0f} bytes an entry of {entry['tokens']} tokens, 1 /"
        f" {entry['raw_over_entry']:.1f} of their KV in float32, 1 / {entry['raw_16_bits_over_entry']:.1f} in 16 bits",
    )
    for row in result["rows"]:
        first = "" if row["first_tokens_cpu_s"] is None else f"{row['first_tokens_cpu_s']:.2f}"
        shares = [f"{row[name]:.2f}" for name in ("same_as_first", "same_as_no_store")]
        table.add(str(row["store"]), row["pass"], f"{row['seconds']:.2f}", first, str(row["images_encoded"]), *shares)
    print_report(table)


if __name__ == "__main__":
    sys.exit(main())
