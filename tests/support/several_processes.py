"""Trains a capsule of each kind in one process or in several of torchrun, and writes the codecs before their numbers
are rounded to a file's 16 bits.

    torchrun --nproc-per-node 2 tests/support/several_processes.py FOLDER SOURCE CASE,CASE
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny_vlm
from support.tiny_llava import llava
from support.tiny_training import HELD_OUT, TILE, TinyProcessor, data_words

_CODES = ["--compression", "2", "--transform.logit_batches", "2", "--transform.query_bank", "8"]
_MASKS = ["--compression", "2", "--optim.soft_steps", "2", "--optim.hard_steps", "2"]
_LEARNED = ["--optim.train_values", "true", "--optim.output_weight", "1", "--optim.kl_weight", "1"]
_BANK = ["--compression", "2", "--compact.bank", "16"]
CASES: dict[str, list[str]] = {
    "transform": ["transform", *_CODES],
    "transform, descent": ["transform", *_CODES, "--transform.steps", "3"],
    "cross-layer": ["cross-layer", *_CODES],
    "cross-layer, descent": ["cross-layer", *_CODES, "--transform.steps", "3"],
    "compact": ["compact", *_BANK],
    "compact, learned selector": ["compact", *_BANK, "--compact.selector", "learned", "--compact.steps", "3"],
    "coded-compact": ["coded-compact", "--compression", "4", "--coded.bank", "16"],
    "kvcapsule": ["kvcapsule-paper", *_MASKS, *_LEARNED],
    "kvcapsule, mlp": ["kvcapsule-mlp", *_MASKS],
    "transform, streamed": ["transform", *_CODES, "--transform.steps", "3", "--data.streaming", "true"],
    "transform, model shared out": ["transform", *_CODES, "--transform.steps", "3"],
    "coded-compact, model shared out": ["coded-compact", "--compression", "4", "--coded.bank", "16"],
}
"""Recipe and options of what is trained."""
_THINGS = "cat dog owl hen fox bee ant cow".split()


class Trained:
    """What one process saw of a run."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        """Of the codecs."""
        self.gradients = 0
        """Bytes that data-parallel training gave to the other processes."""
        self.sums = 0
        """Bytes that everything else gave, as the run counted them."""
        self.line = ""
        """What the run says of both."""
        self.share = 1.0
        """Of the model's weights that the process holds in the end."""


def questions(folder: Path, count: int = 40) -> str:
    """Write questions about one or two pictures, all with equally many tokens: without padding, a row's keys do not
    depend on the batch that it is in, but rows fill tiles unevenly. Returns the file's path."""
    lines, of_picture = [], len(llava().picture(0).tokens)
    for index in range(count):
        path = folder / f"{index}.png"
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
        two = index % 3 == 0
        begin = "<image> and <image>" if two else " ".join(["<image> and", *["fox"] * of_picture])
        prompt, answer = f"{begin} what is {_THINGS[index % 8]}", f"it is a {_THINGS[index * 3 % 7]}"
        lines.append({"image": [str(path)] * (1 + two), "prompt": prompt, "answer": answer})
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def words(case: str, source: str, output: Path, processes: int) -> list[str]:
    shared = ["--codec.tile", str(TILE), "--held_out", str(HELD_OUT), "--moment_batches", "6", "--device", "cpu"]
    more = ["--trainer.devices", str(processes), "--output", str(output)]
    if case.endswith("shared out") and processes > 1:
        more += ["--trainer.strategy", "fsdp"]
    return [*CASES[case], *data_words(source), *shared, *more]


def train(case: str, source: str, output: Path, processes: int = 1) -> Trained:
    """Train a case for a tiny LLaVA. In double precision: in fp32 a batch of another size has other rounding errors,
    which bases of nearly equal weight follow."""
    from unittest import mock

    from torch.distributed.tensor import DTensor

    from kvcapsule.training import capsule_fit, fit, lightning_run
    from kvcapsule.training.options import parse
    from kvcapsule.training.processes import EXCHANGED

    result = Trained()
    model = tiny_vlm.build("llava", llava()).double()
    lines: list[str] = []

    def exchanged_line(of: Any) -> str:
        lines.append(lightning_run.exchanged_line(of))
        return lines[-1]

    with (
        mock.patch.object(fit, "load_vlm", lambda *_: (model, TinyProcessor(llava()))),
        mock.patch.object(fit, "exchanged_line", exchanged_line),
        mock.patch.object(capsule_fit, "round_as_written", lambda codec: None),
        mock.patch("torch.nn.parallel.DistributedDataParallel.__init__", _counting(result)),
    ):
        capsule = fit.train(parse(words(case, source, output, processes), lambda line: None))
    (result.line,) = lines
    result.tensors, result.sums = dict(capsule.state_dict()), EXCHANGED.bytes
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    result.share = sum(map(torch.Tensor.numel, held)) / sum(p.numel() for p in model.parameters())
    return result


def _counting(result: Trained) -> Any:
    from torch.distributed import GradBucket
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    init = torch.nn.parallel.DistributedDataParallel.__init__

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        result.gradients += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(state, bucket)

    def built(self: Any, *args: Any, **options: Any) -> None:
        assert options["broadcast_buffers"] is False
        init(self, *args, **options)
        self.register_comm_hook(None, hook)

    return built


def main() -> None:
    folder, source, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split("; ")
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in cases:
        result = train(case, source, folder / case / "capsule", world)
        torch.save(vars(result), folder / case / f"{rank}.pt")


if __name__ == "__main__":
    main()
