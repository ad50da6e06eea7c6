"""`kvcapsule analyze`: the JSON contract, what is printed, and what is refused."""

import copy
import json
import math
import os
import re
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from kvcapsule.cli.results import write_whole
from kvcapsule.codec import grouping
from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import InputError
from kvcapsule.training.analysis import passes
from kvcapsule.training.analysis.config import AnalyzeConfig
from kvcapsule.training.analysis.distortion import BITS
from kvcapsule.training.analysis.drift import REFERENCES
from kvcapsule.training.analysis.main import main
from kvcapsule.training.analysis.passes import one_size
from kvcapsule.training.analysis.plot import PICTURES
from kvcapsule.training.analysis.report import heading, over_steps, tables
from kvcapsule.training.analysis.study import _rounded

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "analyze.md"
QUICK = ["--device", "cpu", "--questions", "8", "--tile", "49"]
ENOUGH = [*QUICK, "--questions", "21"]
"""For axes of stacks of layers too."""


@pytest.fixture(scope="module")
def run(vlm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """A study of the tiny VLM: its JSON object, the folder of its files and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    with redirect_stdout(StringIO()) as printed:
        assert (
            main(
                [
                    "--model",
                    vlm,
                    *ENOUGH,
                    "--json",
                    str(folder / "new" / "study.json"),
                    "--plots",
                    str(folder / "plots"),
                ]
            )
            == 0
        )
    return json.loads((folder / "new" / "study.json").read_text()), folder, printed.getvalue()


SPECTRUM = {"effective_rank", "components_90", "components_99", "ranks", "energy"}
TOP = {"model", "geometry", "data", "versions", "seed", "machine", "tile", "layers", "drift", "predicted", "stacks"}
TOP |= {"questions", "tiles", "frame", "revision", "dtype", "command"}


def test_contract_keys(run) -> None:
    found, _, _ = run
    assert set(found) == TOP
    assert set(found["geometry"]) == {"model_type", "layers", "query_heads", "kv_heads", "head_dim", "rotary"}
    assert set(found["data"]) == {field.name for field in fields(SourceConfig)}
    assert set(found["versions"]) == {"python", "kvcapsule", "torch", "transformers", "datasets"}
    assert set(found["machine"]) == {"cpu", "cores", "threads", "memory_gib", "accelerator"}
    assert (found["tile"], found["questions"], found["tiles"], found["frame"]) == (49, 21, 84, "canonical")
    assert (found["seed"], found["revision"], found["dtype"], found["geometry"]["rotary"]) == (0, None, "float32", "1d")
    assert found["data"]["size"] == 21


def test_contract_layers(run) -> None:
    found, _, _ = run
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        assert set(layer) == {"layer", "similarity", "spectra", "fixed_share"}
        assert set(layer["fixed_share"]) == set(layer["similarity"]) == set(layer["spectra"]) == {"keys", "values"}
        for of in ("keys", "values"):
            assert 0 <= layer["fixed_share"][of] < 1
            similarity = layer["similarity"][of]
            assert set(similarity) == {"neighbours", "pairs", "neighbours_centred", "pairs_centred"}
            assert all(len(heads) == 2 and all(-1 <= value <= 1 for value in heads) for heads in similarity.values())
        assert set(layer["spectra"]["keys"]) == {"tokens", "channels", "channels_rotated", "channels_unrotated"}
        assert set(layer["spectra"]["values"]) == {"tokens", "channels"}
        for of, name, size in (("keys", "tokens", 49), ("keys", "channels", 32), ("values", "tokens", 49)):
            found_spectrum = layer["spectra"][of][name]
            assert set(found_spectrum) == SPECTRUM
            assert found_spectrum["ranks"][-1] == size and found_spectrum["energy"][-1] == pytest.approx(1)
            for most, nearly_all in zip(found_spectrum["components_90"], found_spectrum["components_99"], strict=True):
                assert 1 <= most <= nearly_all <= size
            assert all(1 <= rank <= size for rank in found_spectrum["effective_rank"])


def test_contract_drift(run) -> None:
    drift = run[0]["drift"]
    assert set(drift) == {"steps", "questions", "top", "kept", "layers"}
    steps = len(drift["steps"])
    assert (
        drift["steps"] == list(range(steps)) and drift["questions"][0] == 21 and len(drift["questions"]) == steps > 10
    )
    assert (drift["top"], drift["kept"]) == (0.1, [0.1, 0.25, 0.4])
    for layer in drift["layers"]:
        assert set(layer) == {"layer", "visual_mass", "overlap", "held"}
        assert set(layer["overlap"]) == {"last_prompt_token", "post_vision"}
        assert set(layer["held"]) == {"last_prompt_token", "post_vision", "best"}
        assert layer["overlap"]["last_prompt_token"][0] == 1
        curves = [
            layer["visual_mass"],
            *layer["overlap"].values(),
            *(curve for curves in layer["held"].values() for curve in curves),
        ]
        assert all(len(curve) == steps and all(0 <= value <= 1 for value in curve) for curve in curves)
        for by in REFERENCES:
            for curve, best in zip(layer["held"][by], layer["held"]["best"], strict=True):
                assert all(mine <= most + 1e-6 for mine, most in zip(curve, best, strict=True))


def test_contract_predicted(run) -> None:
    found, _, _ = run
    assert [(entry["layer"], entry["bits"]) for entry in found["predicted"]] == [
        (i, bits) for i in range(4) for bits in BITS
    ]
    for entry in found["predicted"]:
        assert set(entry) == {"layer", "bits", "compression", "keys", "values"}
        assert entry["compression"] * entry["bits"] == pytest.approx(16)
        for of in ("keys", "values"):
            assert set(entry[of]) == {"transform", "per_channel", "token_pca"}
            assert 0 < entry[of]["transform"] < min(entry[of]["per_channel"], entry[of]["token_pca"]) < 1


def test_contract_stacks(run) -> None:
    found, _, _ = run
    assert [(entry["first"], entry["last"], entry["bits"]) for entry in found["stacks"]] == [
        (0, 3, bits) for bits in BITS
    ]
    for entry in found["stacks"]:
        assert set(entry) == {"first", "last", "bits", "compression", "apart", "together", "apart_bits"}
        assert entry["compression"] * entry["bits"] == pytest.approx(16)
        assert 0 < entry["together"] < entry["apart"] < 1 and entry["apart_bits"] > entry["bits"]


def test_contract_numbers_are_short_and_json() -> None:
    assert _rounded({"a": [float("nan"), 0.123456789, 7], "b": float("inf"), "c": None}) == {
        "a": [None, 0.123457, 7],
        "b": None,
        "c": None,
    }


def test_contract_command_names_no_place(run) -> None:
    command = run[0]["command"]
    assert command.startswith("kvcapsule analyze --model ") and "/" not in command


def test_contract_the_document_names_every_key(run) -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE))

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    # Only models with layers of several kinds have it.
    assert keys(run[0]) | {"full_attention"} == named


def test_contract_files_are_whole_and_alone(run) -> None:
    _, folder, _ = run
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == sorted(["new/study.json", *(f"plots/{name}.png" for name in PICTURES)])
    assert all((folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_contract_what_is_printed(run) -> None:
    found, _, printed = run
    assert (
        heading(found) in printed and "rotary 1d" in heading(found) and "84 tiles of 49 visual tokens" in heading(found)
    )
    shown = tables(found)
    assert [str(table.title) in printed for table in shown] == [True] * 5
    assert [len(table.rows) for table in shown] == [4, 4, 4, 4 + 3, 1]
    further = [{**entry, "first": 4, "last": 4} for entry in found["stacks"]]
    assert len(tables({**found, "stacks": found["stacks"] + further})[-1].rows) == 2 + 1
    assert "RoPE: 1d" in str(shown[1].title)


def test_pages_vlm_reads_on_while_prefill_stays(tmp_path: Path) -> None:
    """The shipped model transcribes: what it reads moves on, and a small share of the tokens chosen at prefill cannot
    hold it."""
    words = [
        "--device",
        "cpu",
        "--questions",
        "8",
        "--tile",
        "28",
        "--data.split",
        "validation",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main(words) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    last = found["drift"]["layers"][-1]
    held, best = (over_steps(found["drift"], last["held"][by][0]) for by in ("post_vision", "best"))
    assert held is not None and best is not None and held < 0.75 * best
    assert sum(last["overlap"]["last_prompt_token"][1:6]) / 5 < 0.4
    for layer in found["layers"]:
        keys = layer["spectra"]["keys"]
        ranks = [sum(keys[name]["effective_rank"]) for name in ("channels_unrotated", "channels", "channels_rotated")]
        assert ranks == sorted(ranks)


def test_stacks_of_a_model_of_several(run, vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers and the one that is left; the same layers by themselves as in any other study."""
    monkeypatch.setattr(grouping, "_LAYERS", 384)
    assert main(["--model", vlm, *ENOUGH, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(entry["first"], entry["last"]) for entry in found["stacks"]] == [(0, 2)] * len(BITS) + [(3, 3)] * len(BITS)
    assert found["predicted"] == run[0]["predicted"]
    assert all(0 < entry["together"] < entry["apart"] < 1 for entry in found["stacks"])


def test_stacks_are_left_out_of_few_samples(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All else is studied, and what would do is said."""
    assert main(["--model", vlm, *QUICK, "--json", str(tmp_path / "a.json")]) == 0
    said, found = capsys.readouterr(), json.loads((tmp_path / "a.json").read_text())
    assert found["stacks"] == [] and len(found["predicted"]) == 4 * len(BITS) and len(tables(found)) == 4
    assert "1568 visual tokens in full tiles are too few" in said.err and "--questions 21 or more" in " ".join(
        said.err.split()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tile", "300"], "no image fills a tile of 300: the largest has 196 visual tokens"),
        (["--tile", "-1"], "--tile -1"),
        (["--tile", "0"], "--questions 49 or more"),
        (["--tile", "98"], "gave 16 tiles of 98 visual tokens, too few for a stable basis, which asks for 32"),
        (["--questions", "7"], "at least 8"),
        (["--data.size", "5"], "5 questions (of pages, split 'train'): a study needs at least 8"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--data.split", "dev"], "train, validation, test"),
        (["--data.colour", "red"], "data.colour"),
        (["--model", "no/such-model"], "cannot load the model"),
        (["--no_such_option", "1"], "--no-such-option"),
    ],
)
def test_refused_one_clear_line(
    vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    model = [] if "--model" in words else ["--model", vlm]
    assert main([*model, *QUICK, "--json", str(tmp_path / "a.json"), *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kvcapsule analyze: ") and says in last
    assert not (tmp_path / "a.json").exists()


def test_refused_unknown_columns(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data.json"
    source.write_text("\n".join([json.dumps({"image": "x.png", "text": "What?", "answer": "no"})] * 8))
    assert main(["--model", vlm, *QUICK, "--data.source", str(source)]) == 2
    assert "no column 'prompt'; it has image, text, answer" in capsys.readouterr().err


@pytest.mark.parametrize("tile", ["0", "49"])
def test_refused_no_visual_tokens(
    vlm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tile: str
) -> None:
    monkeypatch.setattr("kvcapsule.data.batches.images_of", lambda row, index: [])
    assert main(["--model", vlm, *QUICK, "--tile", tile]) == 2
    assert "llava: its prompts hold no visual tokens, so there is nothing to study." in capsys.readouterr().err


@pytest.mark.parametrize("tensor", ["k_proj", "v_proj"])
def test_refused_weights_that_are_no_numbers(
    model, processor, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str
) -> None:
    broken = copy.deepcopy(model)
    getattr(broken.model.language_model.layers[2].self_attn, tensor).weight[3, 5] = float("nan")
    broken.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), *QUICK]) == 2
    name = {"k_proj": "keys", "v_proj": "values"}[tensor]
    assert f"layer 2: the {name} of visual tokens hold NaN or infinity in float32" in capsys.readouterr().err


def test_refused_outputs_that_have_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("kvcapsule.training.analysis.study.run", lambda *_: pytest.fail("studied all the same"))
    (tmp_path / "file").touch()
    for words in (["--json", f"{tmp_path}/file/a.json"], ["--plots", f"{tmp_path}/file"], ["--json", str(tmp_path)]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written" in line or "is a folder" in line


def test_refused_a_failure_to_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    write_whole(target, b"old")

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"a\.json cannot be written: the disk is full"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_refused_whole_images_of_several_sizes() -> None:
    assert one_size({196}) == 196
    with pytest.raises(InputError, match=r"images of 64, 196 visual tokens.*--tile 64"):
        one_size({196, 64})


@pytest.mark.parametrize(("tile", "dim", "needed"), [(576, 128, 36), (2880, 128, 180), (14, 128, 74), (16, 16, 32)])
def test_refused_few_samples_say_how_many_would_do(tile: int, dim: int, needed: int) -> None:
    passes._require_samples(needed, tile, tile, needed, dim)
    with pytest.raises(InputError, match=f"asks for {needed} .*--questions {math.ceil(needed / 2)} or more"):
        passes._require_samples(needed - 1, tile, tile, (needed - 1) // 2, dim)


def test_batches_and_seed_change_nothing(run, vlm: str, tmp_path: Path) -> None:
    """Other batches are padded otherwise, which moves positions; the tiles' frames take that back."""
    assert main(["--model", vlm, *ENOUGH, "--batch", "3", "--seed", "1", "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    for one, other in zip(found["predicted"], run[0]["predicted"], strict=True):
        for of in ("keys", "values"):
            assert one[of] == pytest.approx(other[of], rel=1e-3)
    for one, other in zip(found["stacks"], run[0]["stacks"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    for one, other in zip(found["drift"]["layers"], run[0]["drift"]["layers"], strict=True):
        assert one["visual_mass"] == pytest.approx(other["visual_mass"], rel=1e-3)


def test_defaults() -> None:
    config = AnalyzeConfig()
    assert (config.tile, config.questions, config.data.source, config.data.split) == (0, 64, "pages", "train")


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "The frozen VLM",
        "Visual tokens of a tile",
        "Questions to harvest",
        "Name of the column with the question",
        "four pictures",
    ):
        assert words in text
