"""The study of phases: what it counts, writes and refuses."""

import json
from pathlib import Path

import pytest
import torch
from support.builders import prefill
from transformers import BatchFeature

from kvcapsule.eval.batches import Batch
from kvcapsule.eval.equal_bytes import Layout
from kvcapsule.eval.studies import phases
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.methods.tiles import tile_runs
from kvcapsule.policy import Full
from kvcapsule.vlm.spans import find_spans


def test_every_phase_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.size", "4", "--step", "16", "--max-new-tokens", "12", "--json", str(tmp_path / "p.json")]
    assert phases.main(words) == 0
    result = json.loads((tmp_path / "p.json").read_text())
    assert (result["align"], result["n"]) == (32, 8) and [row["before"] for row in result["rows"]] == [0, 16]
    first, later = result["rows"]
    # Without text before it, the image is where it always is.
    assert first["phase"] == first["text"] and later["phase"] != later["text"]
    assert all(row[way]["same"] >= 3 and row[way]["kl"] < 0.01 for row in result["rows"] for way in phases.WAYS)
    assert result["phase"]["same"] == sum(row["phase"]["same"] for row in result["rows"])
    assert "of 8 answers" in " ".join(capsys.readouterr().out.split())


def test_tiles_are_cut_behind_the_tokens_that_are_counted() -> None:
    """A capsule's own pass sees them, layer by layer."""
    seen: list[list[int]] = []

    class Watching(Full):
        def compress(self, prefill: LayerPrefill) -> Compressed:
            seen.append([run.start for run in tile_runs(prefill, 8, 8)])
            return super().compress(prefill)

    for tokens in (0, 1, 7):
        compression = phases._CountedOn(Watching(), tokens).begin_pass([0])
        assert [layer for layer, _ in compression.add(prefill(spans=((0, 3, 20), (1, 5, 20))))] == [0]
    assert seen == [[8, 8], [7, 7], [9, 9]]


def test_text_stands_before_the_first_image_of_each_row(model, make_batch) -> None:
    inputs = make_batch((1, "Read line 2."), (2, "Which of the two?"))
    spans = find_spans(model.config, inputs["input_ids"], inputs)
    batch = Batch([], inputs, Layout(spans, inputs["attention_mask"].bool()))
    behind = phases._behind(model, batch, torch.tensor([40, 41, 42]))
    assert isinstance(behind.inputs, BatchFeature)
    assert [(s.row, s.start - 3, s.length) for s in behind.layout.spans] == [(s.row, s.start, s.length) for s in spans]
    for row, first in enumerate((spans[0].start, spans[1].start)):
        ids, mask = behind.inputs["input_ids"][row].tolist(), behind.inputs["attention_mask"][row]
        own = inputs["input_ids"][row].tolist()
        assert ids == own[:first] + [40, 41, 42] + own[first:]
        assert int(mask.sum()) == int(inputs["attention_mask"][row].sum()) + 3 and bool(mask[first])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--step", "0"], "at least 1"),
        (["--capsule", "pages-vlm-transform"], "give --most"),
        (["--capsule", "no/such"], "no/such"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert phases.main(words) == 2
    assert says in capsys.readouterr().err
