"""The `kvcapsule` command. A command is registered here, by its target and its line of help."""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from .._version import __version__
from .endings import run_to_end
from .errors import WRONG_INPUT, complain
from .streams import prepare, require_text

COMMANDS = {
    "analyze": "kvcapsule.training.analysis.main:main",
    "train": "kvcapsule.training.main:main",
    "eval": "kvcapsule.eval.main:main",
    "bench": "kvcapsule.eval.bench.main:main",
    "estimate": "kvcapsule.cli.estimate:main",
    "generate": "kvcapsule.cli.generate:main",
    "list": "kvcapsule.cli.capsule_list:main",
    "methods": "kvcapsule.cli.methods:main",
    "models": "kvcapsule.cli.models:main",
    "push": "kvcapsule.cli.push:main",
    "report": "kvcapsule.eval.capsule_page.main:main",
    "serve": "kvcapsule.cli.serve:main",
    "show": "kvcapsule.cli.show:main",
    "store": "kvcapsule.cli.store:main",
}
"""Name to "module:function" of `main(argv: list[str] | None) -> int`: strings, so that a command is imported only when
it is chosen."""
HELP = {
    "analyze": "study a VLM's visual keys and values on some data before training",
    "train": "train a capsule on the KV activations of a frozen VLM",
    "eval": "compare capsules and policies with the full cache: answers, bytes, time",
    "bench": "time attention over segments, decode steps and serving against the full cache",
    "estimate": "predict the cache's bytes and an upper bound of the decode speed-up from a model's config",
    "generate": "answer a prompt about images, and print the bytes of the cache",
    "list": "list the capsules of this machine",
    "methods": "list the codec families and policies, with their papers and settings",
    "models": "list the model families that work, and those that are refused",
    "push": "upload a capsule to the Hub",
    "report": "write an HTML page about a capsule, with examples side by side",
    "serve": "serve a model with capsules through vLLM's OpenAI server",
    "show": "show what a capsule is, and what was measured of it",
    "store": "list, check or prune a folder of compressed images (ImageStore)",
}
EXTRAS = {
    "train": ("datasets", "lightning", "matplotlib", "sklearn", "tensorboard"),
    "eval": ("datasets", "matplotlib", "rapidfuzz", "sklearn"),
}
"""The modules that each of pyproject's extras brings beside what every installation has."""
EXTRA_OF = {"analyze": "train", "train": "train", "eval": "eval", "bench": "eval", "report": "eval"}
"""The extra that a command needs; the others need none."""
_OPTIONS = {"-h, --help": "show this message and exit", "--version": "show the version and exit"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; None takes those of the process.

    Returns:
        The exit code: that of the command, 2 for input that cannot be used or an extra that is not installed, 130 for
        an interrupt, 141 where the reader of a pipe is gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = f"kvcapsule {words[0]}" if words and words[0] in COMMANDS else "kvcapsule"
    return run_to_end(prog, lambda: _run(words))


def _run(words: list[str]) -> int:
    """Raises InputError for streams and arguments that cannot be used, and whatever the command raises."""
    prepare()
    require_text(words)
    if not words:
        print(usage(), file=sys.stderr)
        return WRONG_INPUT
    name, *arguments = words
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"kvcapsule {__version__}")
        return 0
    if name not in COMMANDS:
        return complain("kvcapsule", _unknown(name))
    try:
        return _load(COMMANDS[name])(arguments)
    except ModuleNotFoundError as error:
        module, extra = str(error.name).partition(".")[0], EXTRA_OF.get(name, "")
        if module not in EXTRAS.get(extra, ()):
            raise
        return complain(f"kvcapsule {name}", f"{module} is not installed: run `pip install 'kvcapsule[{extra}]'`.")


def usage() -> str:
    """The text of `kvcapsule --help`."""
    width = max(map(len, [*COMMANDS, *_OPTIONS]))

    def rows(entries: dict[str, str]) -> str:
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in entries.items())

    return (
        "usage: kvcapsule COMMAND [OPTIONS]\n\n"
        "The KV cache of vision-language models, compressed into capsules that attention reads as they are.\n\n"
        f"commands:\n{rows(HELP)}\n\n"
        f"options:\n{rows(_OPTIONS)}\n\n"
        "`kvcapsule COMMAND --help` shows the options of a command."
    )


def _unknown(name: str) -> str:
    kind = "option" if name.startswith("-") else "command"
    near = get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}."
    return f"there is no {kind} {name!r}; {advice}"


def _load(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    loaded: Callable[[list[str]], int] = getattr(import_module(module), function)
    return loaded
