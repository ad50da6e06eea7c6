"""Random command lines: valid ones of every command, and what can go wrong with their words and the files they name."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from kvcapsule.cli import COMMANDS

SURFACE = Path(__file__).resolve().parents[1] / "golden" / "surface.json"
VALID = {
    "analyze": ["--questions 8 --plots out/plots --json out/a.json", "--data.source rows.jsonl --batch 2"],
    "train": [
        "--output out/capsule",
        "transform --output out/t --transform.steps 3 --codec.tile 49",
        "kvcapsule --output out/k --optim.lr 0.001 --codec.hidden 8 --harvests out/h",
        "recipe.yaml --output out/r --data.source rows.jsonl --held-out 1 --seed 3",
        "--recipe recipe.yaml --output out/s --compression 10 --workers 0 --batch 4",
        "compact --output out/c --compact.steps 2 --force true --words-before 3",
    ],
    "eval": [
        "--capsule pages-vlm-cross-layer --json out/e.json --data.size 4 --plot out/e.png",
        "--methods snapkv,int4 --budget 0.2 --batch 2 --timing false",
        "--suite suite.yaml --report page.md --suite-capsules out/capsules",
        "--suite policies --train false",
        "--config options.yaml --data.source rows.jsonl --data.split all --metric anls",
    ],
    "bench": [
        "--quick --json out/b.json",
        "--level operator,step --visual-tokens 64,128 --batch 1,2 --seconds 0.1",
        "--level serving --plot out/b.svg --memory-mib 64 --methods int4",
    ],
    "estimate": [
        "--model pages-vlm --visual-tokens 196",
        "--visual-tokens 64 --images 3 --text 20 --batch 8 --weight-bits 4 --memory 8 --json out/m.json",
        "--resolution 448x672 --compression 10",
    ],
    "generate": [
        "--image image.png --prompt Read --max-new-tokens 3",
        "--capsule pages-vlm-cross-layer --image image.png --prompt Read --compare --store out/store",
        "--prompt Hello --do-sample --temperature 0.5 --top-p 0.9 --top-k 5 --seed 2 --dtype float32 --device cpu",
    ],
    "list": ["", ". --json out/l.json", "folder images --wide"],
    "show": ["pages-vlm-cross-layer", "folder --json out/s.json", "folder --wide"],
    "report": [
        "pages-vlm-cross-layer --output out/r.html --examples 2",
        "folder --data.source rows.jsonl --data.split all --output out/p.html",
        "pages-vlm-cross-layer --metric anls --protocol ask-later",
    ],
    "methods": ["", "--json out/methods.json", "--json -"],
    "models": ["", "--json out/models.json", "--json -"],
    "push": ["pages-vlm-cross-layer org/name", "folder org/name --private --revision v1"],
    "serve": [
        "pages-vlm --capsule pages-vlm-blocks --dry-run",
        "pages-vlm --capsule pages-vlm-blocks --memory-bytes 1GB --pool-share 0.5 --images 2 --port 8000",
    ],
    "store": ["folder list", "images check --remove", "images prune --max-bytes 10MB --json out/s.json"],
}
"""Command lines that start their work, as words between spaces."""
NUMBERS = "0 1 -1 2 7 64 196 1000000 1_000 1e9 1e400 -1e400 nan inf -inf 0.5 .5 5. 1e-320 0x10 1+1 \u0661".split()
NUMBERS += ["\u00b2", "+3", "00", str(10**12), str(-(10**12)), "9" * 30, "9" * 400, "9" * 5000, "1." + "0" * 500]
ODD = [
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "---",
        "=",
        "true",
        "false",
        "null",
        "None",
        "~",
        "[]",
        "{}",
        "[1, 2",
        "{a: b}",
        '{"a": 1}',
    ),
    *("'", '"', "*a", "&a [*a]", "!!python/object/apply:os.getcwd []", "!!binary x", "- - -", ": :", "? ", "@x", "`x`"),
    *(
        "a" * 300,
        "a" * 5000,
        "a/" * 2500,
        "\u00e4\u00df",
        "\u4f60\u597d",
        "\U0001f600",
        "\u202ex",
        "\x1b[31m",
        "a\nb",
        "\t",
    ),
    *(
        "\ud800",
        "a\udcff",
        "%s",
        "%(prog)s",
        "{x}",
        "{0}",
        "$HOME",
        "~nobodyhere/x",
        "~/x",
        "*",
        "?",
        "a,b",
        ",",
        ",,",
        "a,",
    ),
    *(
        "cuda",
        "cuda:99",
        "meta",
        "cpu:1",
        "auto",
        "mps",
        "float8",
        "int8",
        "bfloat16",
        "numpy",
        "os:system",
        "kvcapsule:x",
    ),
    *(
        "org/name",
        "org/..",
        "http://127.0.0.1:1/x",
        "file:///etc/passwd",
        "\\\\host\\share",
        "con",
        "..",
        ".",
        "/",
        "//",
    ),
    *(
        "[" * 200 + "]" * 200,
        "[" * 3000,
        "{a: " * 100 + "}" * 100,
        "snapkv," * 1000,
        "int4",
        "pages",
        "policies",
        "full",
    ),
]
FILES = (
    "image.png rows.jsonl recipe.yaml suite.yaml options.yaml page.md empty bytes text folder images "
    "mutant.yaml mutant.json mutant.jsonl missing missing/x.json text/x.json /proc/x/y.json out "
    "out/x.json out/x.png folder/config.json folder/model.safetensors cut.png deep.json deep.yaml "
).split()
"""Files and folders of other kinds than an option expects, in the working directory."""


def options() -> dict[str, list[str]]:
    """The options of every command."""
    recorded = json.loads(SURFACE.read_text())["options"]
    return {name: list(recorded.get(name, [])) for name in COMMANDS}


def write_files(folder: Path, capsule: Path) -> None:
    """The files that command lines name; capsule: a folder whose small files are copied."""
    rows = [{"image": "image.png", "prompt": "Read?", "answer": "yes"} for _ in range(12)]
    recipe = {"family": "transform", "compression": 10.0, "codec": {"tile": 49}, "transform": {"steps": 2}}
    suite = {"options": {"data": {"size": 4}}, "entries": [{"method": "snapkv", "retention": 0.2}]}
    texts = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "recipe.yaml": yaml.safe_dump(recipe),
        "suite.yaml": yaml.safe_dump(suite),
        "options.yaml": yaml.safe_dump({"batch": 2, "data": {"size": 4}, "methods": ["int4"]}),
        "page.md": "# Page\n\n<!-- table: suite -->\n<!-- end of table -->\n",
        "text": "no folder, no image\n",
        "empty": "",
        "deep.json": "[" * 5000 + "]" * 5000,
        "deep.yaml": "a: " + "[" * 500 + "]" * 500,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "bytes").write_bytes(bytes(range(256)))
    Image.new("RGB", (112, 112), "white").save(folder / "image.png")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:60])
    (folder / "images").mkdir()
    (folder / "folder").mkdir()
    for path in capsule.iterdir():
        (folder / "folder" / path.name).write_bytes(path.read_bytes())


def mutate_files(folder: Path, draw: random.Random, names: Sequence[str]) -> None:
    """Write the files `mutant.*` anew: options, rows or JSON with something wrong in them."""
    values: Any = {draw.choice(names)[2:].replace("-", "_"): _value(draw) for _ in range(draw.choice((1, 2, 4)))}
    if draw.random() < 0.5:
        values = {draw.choice(("data", "codec", "options", "entries", "transform", "x")): values}
    if draw.random() < 0.2:
        values = draw.choice((None, [], [values], "text", 3, {1: 2}, {None: values}, {"": ""}))
    text = yaml.safe_dump(values, allow_unicode=True)
    row = {
        name: _value(draw) for name in draw.sample(("image", "prompt", "answer", "answers", "conversations", "x"), 3)
    }
    lines = [json.dumps(draw.choice((row, {"image": "image.png", "prompt": "a", "answer": "b"}))) for _ in range(9)]
    for name, content in (
        ("mutant.yaml", text),
        ("mutant.json", json.dumps([row] * 9)),
        ("mutant.jsonl", "\n".join(lines)),
    ):
        data = bytearray(content.encode("utf-8", "surrogatepass"))
        for _ in range(draw.choice((0, 0, 1, 3))):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        (folder / name).write_bytes(data)


def command_line(draw: random.Random, known: dict[str, list[str]]) -> list[str]:
    """One mutated command line; known: the options of every command."""
    name = draw.choice(list(VALID))
    words = draw.choice(VALID[name]).split()
    for _ in range(draw.choice((1, 1, 2, 3))):
        _mutate(words, draw, known[name])
    if draw.random() < 0.02:
        name = draw.choice((*ODD, name.upper(), name + "s", "-" + name, "--" + name))
    return [name, *(word.replace("\0", "") for word in words)]


ACTIONS = (
    *("value", "value", "option", "option", "option", "mutant", "mutant", "mutant", "delete", "repeat", "swap", "join"),
    *("spell", "loose"),
)
"""What may be done with a command line; what goes further towards the work is drawn more often."""
_MUTANTS = {"rows.jsonl": "mutant.jsonl", "recipe.yaml": "mutant.yaml", "suite.yaml": "mutant.yaml"}


def _mutate(words: list[str], draw: random.Random, options: list[str]) -> None:
    action = draw.choice(ACTIONS)
    places = range(len(words))
    named = [place for place in places if words[place].startswith("--") and len(words[place]) > 2]
    if action == "value" and words:
        values = [place for place in places if place not in named] or list(places)
        words[draw.choice(values)] = str(_value(draw, flat=True))
    elif action == "mutant":
        sources = ["--data.source=mutant.jsonl", "--data.source=mutant.json", "--config=mutant.yaml"]
        words[:] = [_MUTANTS.get(word, word) for word in words]
        words += draw.sample(sources, k=1) if any(option == "--config" for option in options) else []
    elif action == "option" and options:
        words += [draw.choice(options), str(_value(draw, flat=True))]
    elif action == "delete" and words:
        del words[draw.choice(places)]
    elif action == "repeat" and words:
        place = draw.choice(places)
        words[place:place] = words[place : place + draw.choice((1, 2))] * draw.choice((1, 2, 200))
    elif action == "swap" and len(words) > 1:
        one, other = draw.sample(places, 2)
        words[one], words[other] = words[other], words[one]
    elif action == "join" and named:
        place = draw.choice(named)
        words[place : place + 2] = [
            f"{words[place]}={draw.choice((*words[place + 1 : place + 2], _value(draw, True)))}"
        ]
    elif action == "spell" and named:
        place = draw.choice(named)
        word = words[place]
        words[place] = draw.choice((word[:-1], word + "x", word.upper(), word[1:], word + ".x", word.replace("-", "_")))
    elif action == "loose":
        words.insert(draw.randint(0, len(words)), str(_value(draw, flat=True)))


def _value(draw: random.Random, flat: bool = False) -> Any:
    """A value of any kind; flat: one that is a word."""
    kind = draw.choice(("number", "odd", "odd", "file") if flat else ("number", "odd", "file", "real", "nested"))
    if kind == "nested":
        return draw.choice(([], [[]], {}, {"a": {"b": 1}}, [1, "a"], [None], None, True, {"tile": -1}))
    if kind == "real":
        return draw.choice((0, 1, -1, 10**30, 0.5, float("nan"), float("inf"), 1e308, 2**63))
    return draw.choice({"number": NUMBERS, "odd": ODD, "file": FILES}[kind])
