"""Mutated command lines of every command: each is refused by one line and exit code 2, or goes on to its work.

    python tests/fuzz/command_lines.py --count 10000 --seed 1 --json eval/results/fuzz-commands.json

They run in this process, up to where the work begins: models are loaded once, and nothing is trained, measured,
answered, uploaded or served. What must hold of each: no exception but SystemExit, exit code 0 or 2 (1 where `store
check` finds damage), one line on stderr if it is refused, at most 5 seconds of CPU, and no file outside the working
directory, in which an option named it. tests/fuzz/test_command_lines.py runs some hundred of them.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from command_words import command_line, mutate_files, options, write_files
from support.fuzz_report import FuzzReport, HangError, peak_bytes

from kvcapsule.checkpoints import HERE
from kvcapsule.cli import COMMANDS, main
from kvcapsule.testbeds import pages
from kvcapsule.vlm import loading

LONGEST = 5.0
"""Seconds of CPU that one command line may take: other processes of a machine do not count. One that takes four times
as long by the clock is stopped."""
WORK = (
    "kvcapsule.training.fit._planned",
    "kvcapsule.training.analysis.study.Reader",
    "kvcapsule.eval.run.seen_shares",
    "kvcapsule.eval.suite.capsules._train_all",
    "kvcapsule.eval.bench.run.ceilings.measure",
    "kvcapsule.eval.capsule_page.content.chosen_rows",
    "kvcapsule.cli.generate._answer",
    "kvcapsule.capsule.push.upload",
    "kvcapsule.cli.serve.serve",
)
"""The functions that work begins with."""
LOADERS = ("training.fit", "training.analysis.study", "eval.run", "eval.capsule_page.content", "vlm.loading")
"""Modules that load a model, which is loaded once."""


class Started(BaseException):
    """Raised in place of the work, past all that a command catches."""


def start(*_: object, **__: object) -> None:
    raise Started


_writes: list[str] | None = None
"""Paths that were opened to be written, made or renamed to, while a command runs."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _writes is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _writes.append(os.fsdecode(path))
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        _writes.append(os.fsdecode(arguments[0]))
    elif event == "os.rename":
        _writes.append(os.fsdecode(arguments[1]))


@cache
def _install_audit() -> None:
    """Once, as it cannot be removed; it notes nothing while no command runs."""
    sys.addaudithook(_audit)


@contextmanager
def at_the_start_of_work() -> Iterator[None]:
    """Commands end where their work begins."""
    real, real_pages = loading.load_vlm, pages.pages
    known: dict[Any, Any] = {}

    def load_once(*arguments: Any, **named: Any) -> Any:
        key = (arguments, tuple(sorted(named.items())))
        if key not in known:
            known[key] = real(*arguments, **named)
        return known[key]

    def few_pages(split: str, size: int, *arguments: Any, **named: Any) -> Any:
        return real_pages(split, min(size, 80), *arguments, **named)

    with ExitStack() as stack:
        for target in WORK:
            stack.enter_context(patch(target, start))
        for module in LOADERS:
            stack.enter_context(patch(f"kvcapsule.{module}.load_vlm", load_once))
        stack.enter_context(patch.object(pages, "pages", few_pages))
        # Served without vLLM, up to the command line for it.
        stack.enter_context(patch("kvcapsule.serving.version.require_supported_vllm"))
        stack.enter_context(patch("torch.set_num_threads"))
        yield


def outcome(words: list[str]) -> tuple[str, str]:
    """Run a command line; "refused", "ended" or "started", and what it wrote to stderr. Exceptions go on."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with patch("sys.stdout", out), patch("sys.stderr", err), warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            code: Any = main(words)
        except SystemExit as end:
            code = end.code
        except Started:
            code = "started"
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if code == 2:
        if said.count("\n") != 1 or not said.endswith("\n"):
            raise AssertionError(f"not one line: {said[:1500]!r}")
        if len(said) > 3000:
            raise AssertionError(f"{len(said)} characters: {said[:300]!r}")
        return "refused", said
    if code in (0, None):
        return "ended", said
    if code == "started" or (code == 1 and words[0] == "store"):
        return "started" if code == "started" else "ended", said
    raise AssertionError(f"exit code {code}: {said[:500]!r}")


def strange_writes(place: Path, words: list[str]) -> list[str]:
    """Paths that a command wrote to and that no word of its line, and no file of options that it names, names; not
    those of temporary files."""
    assert _writes is not None
    work = place / "work"
    named = [part for word in words for part in (word, word.partition("=")[2]) if part and len(part) < 10_000]
    places = [Path(os.path.normpath(work / os.path.expanduser(part))) for part in named]
    # The default output of train, and of a suite's capsules; and where libraries keep what they make of data.
    places += [work / "runs", place / "home" / ".cache"]
    contents = [path.read_text(errors="replace") for path in places if os.path.isfile(path)]
    return [
        str(path)
        for path in dict.fromkeys(Path(os.path.normpath(work / name)) for name in _writes)
        if not path.is_relative_to(place / "temporary")
        and path != Path(os.devnull)
        and not any(_belongs(path, to) for to in places)
        and not any(path.name.removeprefix(".").partition(".")[0] in content for content in contents)
    ]


def _belongs(path: Path, to: Path) -> bool:
    """Whether a path is an output, lies in it or on the way to it, or beside it under a name made of its own."""
    names = (path, *path.parents)
    beside = any(other.parent == to.parent and other.name.removeprefix(".").startswith(to.name[:20]) for other in names)
    return beside or path.is_relative_to(to) or to.is_relative_to(path)


def fuzz(count: int, seed: int, progress: Callable[[str], None] = lambda line: None) -> FuzzReport:
    """Run `count` command lines; progress: called with a line now and then."""
    global _writes
    report, known = FuzzReport(), options()
    _install_audit()

    def hang(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place, home = Path(name).resolve(), Path.cwd()
        stack.callback(os.chdir, home)
        for folder in ("temporary", "work", "home"):
            (place / folder).mkdir()
        stack.enter_context(patch.dict(os.environ, {"HOME": str(place / "home"), "COLUMNS": "120"}))
        stack.enter_context(patch.object(tempfile, "tempdir", str(place / "temporary")))
        stack.enter_context(at_the_start_of_work())
        write_files(place / "work", HERE / "pages-vlm-cross-layer")
        shutil.copytree(place / "work", place / "original")
        os.chdir(place / "work")
        # Imports and the model are no part of a command line's time.
        for words in (
            ["eval", "--methods", "int4"],
            ["train"],
            ["analyze"],
            ["bench"],
            ["generate", "--prompt", "x"],
            ["report", "pages-vlm-cross-layer"],
        ):
            outcome(words)
        memory = peak_bytes()
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            words = command_line(draw, known)
            mutate_files(place / "work", draw, known.get(words[0]) or ["--x"])
            what = f"line {number} of seed {seed}: {[word if len(word) < 90 else word[:80] + '...' for word in words]}"
            begin, failed = time.process_time(), len(report.failures)
            signal.setitimer(signal.ITIMER_REAL, 4 * LONGEST)
            _writes = []
            try:
                result, _ = outcome(words)
                command = words[0] if words[0] in COMMANDS else "(none)"
                report.add(command, result)
                if strange := strange_writes(place, words):
                    report.failures.append(f"wrote to {strange[:5]} ({what})"[:1000])
            except (Exception, HangError) as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
                report.failures.append(f"{where}: {error}"[:600] + f" ({what})"[:600])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                _writes = None
            seconds = time.process_time() - begin
            report.slowest = max(report.slowest, seconds)
            if seconds > LONGEST:
                report.failures.append(f"took {seconds:.1f} s ({what})"[:1000])
            for failure in report.failures[failed:]:
                progress(failure)
            os.chdir(place)
            if sorted(os.listdir(place / "work")) != sorted(os.listdir(place / "original")) or number % 50 == 0:
                shutil.rmtree(place / "work")
                shutil.copytree(place / "original", place / "work")
            os.chdir(place / "work")
            if (number + 1) % 100 == 0:
                progress(f"{number + 1} of {count}: {len(report.failures)} failures, slowest {report.slowest:.1f} s")
        report.peak = peak_bytes() - memory
    signal.signal(signal.SIGALRM, before)
    return report


def command() -> int:
    parser = argparse.ArgumentParser(description="Run mutated command lines, and count what becomes of them.")
    parser.add_argument("--count", type=int, default=10_000, help="command lines")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--json", metavar="FILE", help="file for the counts")
    chosen = parser.parse_args()
    file = None if chosen.json is None else Path(chosen.json).resolve()
    torch.set_num_threads(1)
    report = fuzz(chosen.count, chosen.seed, partial(print, file=sys.stderr, flush=True))
    result = report.result("tests/fuzz/command_lines.py", chosen.count, chosen.seed, "slowest_cpu_s")
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(report.line())
    print("\n".join(report.failures))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(command())
