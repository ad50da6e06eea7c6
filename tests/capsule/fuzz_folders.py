"""Mutations of capsule folders: each is refused by one CapsuleError, or loads a capsule that encodes and is read.

    python tests/capsule/fuzz_folders.py --count 10000 --seed 1 --json FILE

tests/capsule/test_fuzz_folders.py runs some hundred of them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.capsule_files import CODECS, METRICS, RECIPE, fixed_capsule, loadable
from support.fuzz_report import FuzzReport, HangError, peak_bytes

from kvcapsule import Capsule, CapsuleError
from kvcapsule.capsule import hub
from kvcapsule.capsule.write import update_metrics
from kvcapsule.checkpoints import HERE
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.kernels import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.vlm.spans import VisualSpan
from kvcapsule.yaml_files import read_yaml

SHIPPED = ("blocks", "blocks-20x", "cross-layer", "kvcapsule", "transform")
NUMBERS = (0, 1, -1, 2, 7, 8, 196, 2**31, 10**6, 10**9, 10**12, -(10**12), 10**30, 0.0, 0.5, 1.5, 1e308, 1e-320)
ODD = (None, True, "", "x", "~/x", "\ud800", [], {}, [[]], {"a": {}}, float("nan"), float("inf"), -float("inf"))
NAMES = ("~nobodyhere/x", "x" * 5000, "a\0b", "\udcff", "x/" * 3000, "", "..", "/dev/null", "/proc/1/root/x", "org/..")
FILES = ("config.json", "model.safetensors", "README.md", "recipe.yaml", "metrics.json")
LONGEST = 5.0
"""Seconds that one folder may take."""


def originals(folder: Path) -> list[Path]:
    """The shipped capsules, and small ones of every other kind."""
    places = [HERE / f"pages-vlm-{name}" for name in SHIPPED]
    codecs = dict(CODECS)
    codecs["compact"] = ("compact", CompactConfig(8, ratios=(0.5, 0.5), bank=4))
    codecs["selector"] = ("compact", CompactConfig(8, ratios=(0.5, 0.5), bank=4, selector="learned", hidden=3))
    for name, (family, codec) in codecs.items():
        capsule = loadable(fixed_capsule(family=family, codec=codec))
        for key, tensor in capsule.state_dict().items():
            if key.endswith("spread"):
                tensor.fill_(0.5)
        capsule.save_pretrained(folder / name, recipe=RECIPE, metrics=METRICS)
        places.append(folder / name)
    return places


# Mutations: functions of a copy of a capsule's folder, which they change, and of what draws the change.


def flip_bytes(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(FILES)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        if content:
            # Half of them in the first bytes, where lengths and headers are.
            at = draw.randrange(len(content) if draw.random() < 0.5 else min(len(content), 4096))
            content[at] = draw.randrange(256)
    path.write_bytes(content)


def cut(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(FILES)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)] + draw.randbytes(draw.choice((0, 0, 1, 8, 4096))))


def grow_sparse(folder: Path, draw: random.Random) -> None:
    os.truncate(folder / draw.choice(FILES), draw.choice((2**21, 8 * 2**30, 64 * 2**30)))


def replace_file(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(FILES)
    path.unlink()
    kind = draw.choice(("nothing", "folder", "loop", "endless", "fifo", "empty", "other", "deep", "bomb"))
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "other":
        shutil.copy(HERE / f"pages-vlm-{draw.choice(SHIPPED)}" / draw.choice(FILES), path)
    elif kind == "deep":
        path.write_text("[" * 1000 + "]" * 1000)
    elif kind == "bomb":
        path.write_text("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 12)))


def change_json(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(("config.json", "config.json", "config.json", "metrics.json"))
    values = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 1, 3))):
        change(values, draw)
    path.write_text(json.dumps(values))


def change_header(folder: Path, draw: random.Random) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    for _ in range(draw.choice((1, 1, 2))):
        change(table, draw)
    head = json.dumps(table).encode()
    length = len(head) if draw.random() < 0.9 else draw.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + head + content[8 + size :])


def change_numbers(folder: Path, draw: random.Random) -> None:
    """Of one tensor, so that the file stays sound."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    entries = [entry for name, entry in table.items() if name != "__metadata__" and entry["data_offsets"][1]]
    if not entries:
        return
    # Small tensors as often as large ones.
    entry = draw.choice(entries)
    first, last = (8 + size + offset for offset in entry["data_offsets"])
    kinds = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16}
    tensor = torch.frombuffer(content, dtype=kinds[entry["dtype"]], offset=first, count=-1)
    count = (last - first) // tensor.element_size()
    for _ in range(draw.choice((1, 1, 4, count))):
        at = draw.randrange(count)
        if tensor.is_floating_point():
            tensor[at] = draw.choice((0.0, -1.0, 1e-30, 1e11, 1e20, 3e38, -3e38, float("nan"), float("inf")))
        else:
            tensor[at] = draw.choice((0, 1, 3, 5, 7, 9, 195, 196, 255) + (-1, -(10**12), 2**62) * (tensor.itemsize > 1))
    path.write_bytes(content)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "bytes": flip_bytes,
    "cut": cut,
    "sparse": grow_sparse,
    "file": replace_file,
    "json": change_json,
    "header": change_header,
    "numbers": change_numbers,
}


def change(values: Any, draw: random.Random) -> None:
    """Change one value somewhere in nested objects and lists."""
    where = values
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.15:
            break
        where = inner
    action = draw.choice(("number", "number", "nudge", "odd", "odd", "delete", "add", "repeat", "deep"))
    if action == "number":
        where[key] = draw.choice(NUMBERS)
    elif action == "nudge" and isinstance(inner, int | float):
        where[key] = inner + draw.choice((-1, 1, -0.5, 8, -8, inner))
    elif action == "odd":
        where[key] = draw.choice(ODD)
    elif action == "delete":
        del where[key]
    elif action == "add" and isinstance(where, dict):
        where[draw.choice(("x", "", "n" * 5000, str(key) + "s"))] = inner
    elif action == "repeat":
        where[key] = [inner] * draw.choice((2, 3, 1000))
    elif action == "deep":
        for _ in range(draw.choice((40, 900))):
            inner = [inner]
        where[key] = inner


# What is done with a folder


def use(capsule: Capsule, draw: random.Random) -> bool:
    """Encode random keys and values of an image by every layer, and let attention read them; False where they would
    take too much memory for a test."""
    config, geometry = capsule.config.codec, capsule.config.geometry
    count = config.tile + config.align + 5
    heads, query_heads, dim = geometry.kv_heads, geometry.query_heads, geometry.head_dim
    if count * max(heads, query_heads) * dim > 2**22 or count * count * query_heads > 2**25 or geometry.layers > 64:
        return False
    draws = torch.Generator().manual_seed(draw.randrange(2**31))
    angles = torch.rand(1, count, dim // 2, generator=draws).repeat(1, 1, 2)
    rotation = None if geometry.rotary == "none" or dim % 2 else (angles.cos(), angles.sin())
    if rotation is None and config.canonical_frame and geometry.rotary != "none":
        return False
    going = capsule.begin_pass(range(geometry.layers))
    done = 0
    for layer in range(geometry.layers):
        query, keys, values = (torch.randn(1, n, count, dim, generator=draws) for n in (query_heads, heads, heads))
        prefill = LayerPrefill(
            layer=layer,
            query=query,
            keys=keys,
            values=values,
            spans=[VisualSpan(0, 2, count - 3, (1, 1, count - 3))],
            valid=torch.ones(1, count, dtype=torch.bool),
            scale=dim**-0.5,
            position_embeddings=rotation,
        )
        for _, compressed in going.add(prefill):
            out = attend(query[:, :, -1:], [*compressed.visual, *compressed.text], dim**-0.5)
            assert out.shape == (1, query_heads, 1, dim)
            done += 1
    assert done == geometry.layers
    return True


def outcome(name: str | Path, draw: random.Random, sample: float) -> str:
    """ "refused", "loaded" or "ran"; any exception but CapsuleError goes on."""
    try:
        hub.read_config(name)
        capsule = Capsule.from_pretrained(name)
    except CapsuleError as error:
        if "\n" in str(error) or len(str(error)) > 3000:
            raise AssertionError(f"not one line: {error}") from error
        return "refused"
    return "ran" if draw.random() < sample and use(capsule, draw) else "loaded"


def other_readers(folder: Path) -> None:
    """What else reads files of a capsule."""
    with suppress(CapsuleError):
        update_metrics(folder, {"train": {"loss": 1.0}})
    if (folder / "recipe.yaml").is_file():
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            read_yaml(folder / "recipe.yaml")


def fuzz(count: int, seed: int, sample: float = 1.0) -> FuzzReport:
    """Draw `count` folders; sample: share of the capsules that are used after they loaded."""
    report, before = FuzzReport(), peak_bytes()

    def hang(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as place:
        bases = originals(Path(place))
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            base, folder = draw.choice(bases), Path(place) / "mutant"
            # Sparse files last: the other mutations read what they change.
            kinds = sorted(draw.choices(list(MUTATIONS), k=draw.choice((1, 1, 1, 2))), key="sparse".__eq__)
            what = f"folder {number} of seed {seed}: {base.name}, {' and '.join(kinds)}"
            shutil.copytree(base, folder)
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_REAL, 10 * LONGEST)
            try:
                if draw.random() < 0.02:
                    kinds, folder_or_name = ["name"], draw.choice(NAMES)
                else:
                    for kind in kinds:
                        if all((folder / name).is_file() for name in FILES):
                            try:
                                MUTATIONS[kind](folder, draw)
                            except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
                                # The file is no longer one that this mutation can read.
                                flip_bytes(folder, draw)
                    folder_or_name = folder
                begin = time.process_time()
                result = outcome(folder_or_name, draw, sample)
                other_readers(folder)
                report.add(kinds[-1], result)
            except (Exception, HangError) as error:
                report.failures.append(f"{what}: {type(error).__name__}: {error}"[:500])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                seconds = time.process_time() - begin
                shutil.rmtree(folder, ignore_errors=True)
            report.slowest = max(report.slowest, seconds)
            if seconds > LONGEST:
                report.failures.append(f"{what}: took {seconds:.1f} s")
    report.peak = peak_bytes() - before
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Read mutated capsule folders, and count what becomes of them.")
    parser.add_argument("--count", type=int, default=10_000, help="folders")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--json", metavar="FILE", required=True, help="file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = fuzz(options.count, options.seed)
    result = report.result("tests/capsule/fuzz_folders.py", options.count, options.seed, "slowest_s")
    Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    print(report.line())
    print("\n".join(report.failures[:20]))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
