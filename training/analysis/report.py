"""Tables of a study for people: one table per question, one row per layer."""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from kvcapsule.cli.tables import NAME, Column, ReportTable

_OF = ("keys", "values")
_STEPS = (1, 4, 16, 64)
"""Decode steps that the table shows; the JSON object has all."""
_SETTINGS = 4
"""Numbers of bits that the tables show without --wide, the fewest first."""
_LEAST_SHARE = 0.1
"""Tables and pictures show a step if at least this share of the answers has it."""


def heading(result: Mapping[str, Any]) -> str:
    """Model, data and sizes of the study."""
    geometry, data = result["geometry"], result["data"]
    return (
        f"{result['model']} ({geometry['model_type']}, {geometry['layers']} layers, {geometry['kv_heads']} KV heads of "
        f"{geometry['head_dim']}, rotary {geometry['rotary']}) on {data['source']}, split {data['split']}:\n"
        f"{result['questions']} questions, {result['tiles']} tiles of {result['tile']} visual tokens"
    )


def tables(result: Mapping[str, Any]) -> list[ReportTable]:
    """The tables that `kvcapsule analyze` prints of its result."""
    return [
        _similarity(result),
        _spectra(result),
        _drift(result),
        _predicted(result),
        *([_layer_groups(result)] if result["stacks"] else []),
    ]


def followed(drift: Mapping[str, Any]) -> int:
    """Number of steps, including step 0, that enough of the answers have."""
    return sum(count >= _LEAST_SHARE * drift["questions"][0] for count in drift["questions"])


def over_steps(drift: Mapping[str, Any], curve: Sequence[float]) -> float | None:
    """Mean of a curve over the decode steps of all questions, without step 0 (the prompt's last token)."""
    weights = drift["questions"][1:]
    return sum(w * x for w, x in zip(weights, curve[1:], strict=True)) / sum(weights) if weights else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean over heads or layers, without None."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _similarity(result: Mapping[str, Any]) -> ReportTable:
    names = {
        "neighbours": "beside",
        "pairs": "any two",
        "neighbours_centred": "beside,\ncentred",
        "pairs_centred": "any two,\ncentred",
    }
    columns = [f"{of}\n{title}" for of in _OF for title in names.values()]
    table = _table("How alike are the visual tokens of an image? Mean cosine", columns)
    for layer in result["layers"]:
        cells = [mean(layer["similarity"][of][name]) for of in _OF for name in names]
        table.add(str(layer["layer"]), *(_cell(cell, ".2f") for cell in cells))
    table.note = (
        "beside: with the next in its row of the token grid; centred: the head's mean token taken off. Mean over KV"
        " heads."
    )
    return table


def _spectra(result: Mapping[str, Any]) -> ReportTable:
    keys = result["layers"][0]["spectra"]["keys"]
    sizes = {axis: keys[axis]["ranks"][-1] for axis in ("tokens", "channels")}
    columns = [f"{of},\n{size} {axis}:\nrank (90, 99 %)" for of in _OF for axis, size in sizes.items()]
    of_rotation = ["key channels,\nrotated:\nrank", "key channels,\nunrotated:\nrank"]
    table = _table(
        f"How many components hold the energy? RoPE: {result['geometry']['rotary']}",
        [*columns, *of_rotation],
        wide=of_rotation,
    )
    for layer in result["layers"]:
        spectra = layer["spectra"]
        cells = [_components(spectra[of][axis]) for of in _OF for axis in sizes]
        others = (spectra["keys"]["channels_rotated"], spectra["keys"]["channels_unrotated"])
        cells += ["–" if other is None else _cell(mean(other["effective_rank"]), ".1f") for other in others]
        table.add(str(layer["layer"]), *cells)
    table.note = (
        "Effective rank, and components for 90 and 99 % of the energy; mean over KV heads. Keys are in their tile's"
        " frame. Of their channels --wide shows two more: rotated as the model rotated them, and unrotated, each token"
        " turned back by its own position; from unrotated to rotated is what RoPE costs."
    )
    return table


def _components(spectrum: Mapping[str, Any]) -> str:
    rank, most, all_but_one = (mean(spectrum[name]) for name in ("effective_rank", "components_90", "components_99"))
    return f"{_cell(rank, '.1f')} ({_cell(most, '.0f')}, {_cell(all_but_one, '.0f')})"


def _drift(result: Mapping[str, Any]) -> ReportTable:
    drift = result["drift"]
    steps = [step for step in _STEPS if step < followed(drift)]
    kept = " / ".join(f"{share:.0%}" for share in drift["kept"])
    columns = [
        f"overlap at step\n{' / '.join(map(str, steps)) or '–'}",
        f"held by the\nprefill's\n{kept}",
        f"by the last\nprompt token's\n{kept}",
        f"by the\nstep's own\n{kept}",
        "attention\non the\nimage",
    ]
    table = _table("Does the answer read what the prompt attended to?", columns, wide=(columns[2], columns[4]))
    for layer in drift["layers"]:
        overlap = [layer["overlap"]["last_prompt_token"][step] for step in steps]
        held = [
            [over_steps(drift, curve) for curve in layer["held"][by]]
            for by in ("post_vision", "last_prompt_token", "best")
        ]
        cells = [" / ".join(_cell(value, ".2f") for value in values) or "–" for values in (overlap, *held)]
        table.add(str(layer["layer"]), *cells, _cell(over_steps(drift, layer["visual_mass"]), ".2f"))
    table.note = (
        f"overlap: Jaccard of the {drift['top']:.0%} of visual tokens with most attention, at the step and under the"
        f" last prompt token (chance {drift['top'] / (2 - drift['top']):.2f}). held: share of a step's attention to the"
        " image that lies on the tokens ranked first by the prompt behind the image (prefill), by its last token"
        " (with --wide), or by the step itself; mean over decode steps."
    )
    return table


def _predicted(result: Mapping[str, Any]) -> ReportTable:
    entries = result["predicted"]
    settings = sorted({(entry["bits"], entry["compression"]) for entry in entries})
    by = {(entry["layer"], entry["bits"]): entry for entry in entries}
    layers, names = [layer["layer"] for layer in result["layers"]], _named(settings)
    table = _table(
        "What is lost at given bits for each element? Predicted unexplained variance, transform code",
        [f"{of}\n{title}" for of in _OF for title in ("fixed", *names)],
        wide=[f"{of}\n{title}" for of in _OF for title in ("fixed", *names[_SETTINGS:])],
    )
    for layer in result["layers"]:
        cells = [
            [layer["fixed_share"][of], *(by[layer["layer"], bits][of]["transform"] for bits, _ in settings)]
            for of in _OF
        ]
        table.add(str(layer["layer"]), *(_cell(cell, ".3f") for cell in chain(*cells)))
    table.end_section()
    for method, title in (("transform", "mean"), ("per_channel", "per channel"), ("token_pca", "token PCA")):
        means = [
            [None, *(fmean(by[layer, bits][of][method] for layer in layers) for bits, _ in settings)] for of in _OF
        ]
        table.add(title, *("" if cell is None else _cell(cell, ".3f") for cell in chain(*means)))
    table.note = (
        "Rate-distortion bounds; scales and maps are not counted. fixed (with --wide): share of the variance that"
        " is the same in every tile, and costs no bits. Last rows: means over layers of the transform code, of"
        " plain per-channel quantisation at the same bits, and of 16-bit rows by PCA along the tokens alone."
    )
    return table


def _layer_groups(result: Mapping[str, Any]) -> ReportTable:
    entries = result["stacks"]
    settings = sorted({(entry["bits"], entry["compression"]) for entry in entries})
    by = {(entry["first"], entry["last"], entry["bits"]): entry for entry in entries}
    groups = sorted({(entry["first"], entry["last"]) for entry in entries})
    both, apart = ([f"{title}\n{name}" for name in _named(settings)] for title in ("apart,\ntogether", "bits\napart"))
    table = _table(
        "Does one code for a layer group pay? Predicted unexplained variance, keys and values of each layer apart,"
        " all together",
        [*both, *apart],
        wide=[*both[_SETTINGS:], *apart],
        of="layers",
    )

    def add(name: str, means: Mapping[tuple[float, str], float | None]) -> None:
        errors = [", ".join(_cell(means[bits, of], ".4f") for of in ("apart", "together")) for bits, _ in settings]
        table.add(name, *errors, *(_cell(means[bits, "apart_bits"], ".2f") for bits, _ in settings))

    names = ("apart", "together", "apart_bits")
    for group in groups:
        add(
            " to ".join(map(str, sorted(set(group)))),
            {(bits, name): by[*group, bits][name] for bits, _ in settings for name in names},
        )
    if len(groups) > 1:
        table.end_section()
        add(
            "mean",
            {
                (bits, name): mean([by[*group, bits][name] for group in groups])
                for bits, _ in settings
                for name in names
            },
        )
    table.note = (
        "Layer groups are those of `kvcapsule train cross-layer`. Every layer's keys, and its values, count alike: what"
        " their errors cost the answer is not measured here, and training weighs it. bits apart (with --wide): bits"
        " for each element with which codes apart come to the error of the code together; the rest is saved. In memory,"
        " that is: each layer reads the code of its full group."
    )
    return table


def _table(title: str, columns: Sequence[str], wide: Sequence[str] = (), of: str = "layer") -> ReportTable:
    """An empty table. wide: those of its columns that are shown with --wide alone."""
    return ReportTable([Column(of, NAME), *(Column(column, wide=column in wide) for column in columns)], title)


def _named(settings: Sequence[tuple[float, float]]) -> list[str]:
    """Heads of columns: bits of an element, and how many times fewer than 16 they are."""
    return [f"{bits:g}\n({compression:.0f}x)" for bits, compression in settings]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
