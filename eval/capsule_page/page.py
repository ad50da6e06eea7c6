"""The page about a capsule as HTML: one file, without scripts and without anything from the network."""

import json
import shlex
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import PurePath
from statistics import mean
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from kvcapsule.capsule.overview import Overview
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.show import facts, figures, number
from kvcapsule.methods.shown_names import shown_name

from ..protocol_names import ASK_LATER
from .content import PageContent
from .pictures import accuracy_uri, curves_uri, image_uri, loss_uri

_TEMPLATE = "page.html"
_ASKED = {
    True: "Each question was asked after the image had been compressed, as in the second turn of a chat.",
    False: "Each question was read with the image; what follows its first token reads the compressed cache.",
}


class Card(NamedTuple):
    """A figure at the head of the page."""

    figure: str
    meaning: str


class Line(NamedTuple):
    """A method's line in a table."""

    cells: list[str]
    is_strong: bool


def html(content: PageContent) -> str:
    """The text of the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["shown_name"] = shown_name
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(**_values(content))


def _values(content: PageContent) -> dict[str, Any]:
    capsule, evaluation = content.capsule, content.evaluation
    # The page may be uploaded: no path of this machine is in it.
    name, rows = shlex.quote(shown_path(capsule.name)), capsule.rows
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("accuracy") or {}))
    return {
        "title": PurePath(capsule.name).name,
        "model": capsule.config.base_model,
        "family": shown_name(capsule.config.family),
        "cards": list(_cards(capsule)),
        "facts": list(facts(capsule)),
        "heads": ["method", "compression", "same answers", "KL", "accuracy", "prefill time", "tokens/s"],
        "methods": [Line(figures(row), capsule.is_of_this(row)) for row in rows],
        "task_heads": ["method", *tasks],
        "tasks": [
            Line(
                [shown_name(row["method"]), *(number((row.get("accuracy") or {}).get(t), ".3f") for t in tasks)],
                capsule.is_of_this(row),
            )
            for row in rows
        ],
        "measured": _measured(evaluation),
        "judged": f", judged by {evaluation['metric']}" if evaluation.get("metric") else "",
        "plot": accuracy_uri(rows, "") if rows else None,
        "measure": f"kvcapsule eval --capsule {name} --save-metrics true",
        "asked": _ASKED[content.protocol == ASK_LATER],
        "trained_on": f"The capsule was trained on {content.trained_on:.0%} of them." if content.trained_on else "",
        "examples": [
            {**example._asdict(), "images": [image_uri(image) for image in example.images]}
            for example in content.examples
        ],
        "losses": [{"image": image_uri(example.images[0]), "map": loss_uri(loss)} for example, loss in content.losses],
        "curves": curves_uri(content.curves) if content.curves else None,
        "training": [(key, number(value, ".4g")) for key, value in capsule.training.items() if "/" not in key],
        "code": _code(capsule),
        "generate": f'kvcapsule generate --capsule {name} --image image.png --prompt "What does the image show?"',
        "versions": content.versions,
    }


def _cards(capsule: Overview) -> Iterator[Card]:
    if capsule.compression is not None:
        yield Card(f"{capsule.compression:.1f}x", "fewer bytes of visual tokens than a 16-bit cache")
    row = next((row for row in capsule.rows if capsule.is_of_this(row)), None)
    if row is not None:
        yield Card(f"{row['agreement']:.1%}", f"of {row['n']} answers are the full cache's")
        scores = [score for score in (row.get("accuracy") or {}).values() if score is not None]
        full = [score for score in (capsule.rows[0].get("accuracy") or {}).values() if score is not None]
        if scores and full:
            yield Card(f"{mean(scores):.3f}", f"accuracy; {mean(full):.3f} with the full cache")
    if (error := capsule.training.get("output_error")) is not None:
        yield Card(f"{error:.4f}", "relative error of attention's output, after training")


def _measured(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    data = evaluation.get("data") or {}
    count = evaluation["rows"][0].get("n") if evaluation.get("rows") else None
    command = f", by {evaluation['command']}" if evaluation.get("command") else ""
    return f"Measured on {data.get('source')}, split {data.get('split')}, {count} questions{command}."


def _code(capsule: Overview) -> str:
    """Python that uses the capsule."""
    model, name = (json.dumps(text) for text in (capsule.config.base_model, shown_path(capsule.name)))
    return f"""from PIL import Image

from kvcapsule import Capsule, attach, conversation, encode, load_vlm

model, processor = load_vlm({model})
capsule = Capsule.from_pretrained({name}, device=model.device)
question = conversation([Image.open("image.png")], "What does the image show?")
inputs = encode(processor, [question], model.dtype).to(model.device)
with attach(model, capsule):
    output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0], skip_special_tokens=True))
"""
