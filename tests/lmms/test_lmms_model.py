"""The model inside lmms-eval, whose own code asks, scores and writes."""

import json
import sys
from pathlib import Path
from runpy import run_module
from typing import Any

import pytest
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from lmms_eval.tasks import TaskManager

from kvcapsule.errors import InputError
from kvcapsule.eval.lmms.model import CapsuleModel
from kvcapsule.eval.lmms.questions import TASKS
from kvcapsule.eval.studies import lmms as study

FULL = "pretrained=pages-vlm,dtype=float32,device=cpu"
ROUNDS = """
task: rounds
dataset_path: json
dataset_kwargs:
  data_files:
    test: rounds.jsonl
test_split: test
process_docs: !function kvcapsule.eval.lmms.questions.draw
output_type: generate_until_multi_round
doc_to_visual: !function kvcapsule.eval.lmms.questions.images
doc_to_text: !function rounds.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 24
process_results: !function rounds.results
metric_list:
  - metric: rounds
    aggregation: mean
    higher_is_better: true
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
ROUNDS_CODE = """
from kvcapsule.eval.lmms.questions import images


def text(doc, lmms_eval_specific_kwargs=None, round_idx=0, previous_output=None, previous_round_info=None):
    if not round_idx:
        return "Read line 2."
    # Pages with an even first digit have a third round.
    ended = round_idx == (3 if int(previous_output[0].split()[1][0]) % 2 == 0 else 2)
    word = previous_output[0].split()[0]
    return images(doc), f"What stands beside {word}?", ended, previous_output, round_idx


def results(doc, answers):
    first, second, *rest = answers[0]
    same = all(answer.split()[-1] == first.split()[1] for answer in (second, *rest))
    return {"rounds": len(answers[0]), "right": float(same)}
"""


def evaluated(arguments: str, task: str, folder: Path = TASKS, **options: Any) -> dict[str, Any]:
    """lmms-eval's result, samples included."""
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="kvcapsule")
    return simple_evaluate(
        "kvcapsule", arguments, tasks=[task], task_manager=manager, **{"limit": 8, "batch_size": 4, **options}
    )


def answers(result: dict[str, Any], task: str) -> list[str]:
    return [sample["filtered_resps"][0] for sample in result["samples"][task]]


def test_the_entry_point_names_the_model() -> None:
    assert get_model("kvcapsule") is CapsuleModel


def test_a_batch_answers_as_one_by_one_and_bytes_are_reported() -> None:
    batched = evaluated(f"{FULL},policy=int4", "kvcapsule_pages")
    single = evaluated(f"{FULL},policy=int4", "kvcapsule_pages", batch_size=1)
    assert answers(batched, "kvcapsule_pages") == answers(single, "kvcapsule_pages")
    assert batched["results"]["kvcapsule_pages"]["accuracy,none"] > 0.9
    throughput = batched["throughput"]
    assert throughput["avg_full_visual_kv_bytes"] == 401_408 and throughput["avg_visual_tokens"] == 196
    assert 50_000 < throughput["avg_visual_kv_bytes"] < 60_000 < throughput["avg_kv_bytes"]
    assert throughput["avg_prefill_seconds"] > 0 and throughput["avg_decode_seconds"] > 0
    (counts,) = single["samples"]["kvcapsule_pages"][0]["token_counts"]
    assert (
        counts["visual_tokens"] == 196 and 50_000 < counts["visual_kv_bytes"] < 60_000 and counts["output_tokens"] > 1
    )


def test_several_images_a_question() -> None:
    result = evaluated(f"{FULL},capsule=pages-vlm-cross-layer", "kvcapsule_page_pairs", limit=3)
    assert [s["token_counts"][0]["visual_tokens"] for s in result["samples"]["kvcapsule_page_pairs"]] == [392] * 3
    assert result["throughput"]["avg_visual_kv_bytes"] == 2 * 10_035
    assert 0 <= result["results"]["kvcapsule_page_pairs"]["accuracy,none"] <= 1


def test_rounds_go_on_until_the_task_ends(tmp_path: Path) -> None:
    (tmp_path / "rounds.yaml").write_text(ROUNDS)
    (tmp_path / "rounds.py").write_text(ROUNDS_CODE)
    (tmp_path / "rounds.jsonl").write_text((TASKS / "pages.jsonl").read_text())
    result = evaluated(FULL, "rounds", tmp_path, limit=6)
    rounds = [sample["rounds"] for sample in result["samples"]["rounds"]]
    assert set(rounds) == {2, 3} and result["results"]["rounds"]["right,none"] > 0.8
    assert get_logged_metrics_history()[-1]["total_requests"] == sum(rounds)


def test_settings_of_the_command_line_reach_generate() -> None:
    result = evaluated(FULL, "kvcapsule_pages", limit=2, gen_kwargs="max_new_tokens=3")
    assert [s["token_counts"][0]["output_tokens"] for s in result["samples"]["kvcapsule_pages"]] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("pretrained=pages-vlm,batchsize=4", {}, "did you mean 'batch_size'?"),
        ("pages-vlm", {}, "name=value,name=value is needed"),
        ("pretrained=pages-vlm,capsule=nowhere/at-all/x", {}, "no capsule 'nowhere/at-all/x'"),
        (FULL, {"device": "cuda:7"}, "device is cpu in model_args and cuda:7"),
        (f"{FULL},batch_size=4", {"batch_size": "8"}, "batch_size is 4 in model_args and 8"),
        (f"{FULL},attn_implementation=flash_attention_9", {}, "attn_implementation=flash_attention_9: "),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: str, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluated(arguments, "kvcapsule_pages", **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lmms-eval --model kvcapsule:")]
    assert ended.value.code == 2 and message in line


def test_options_stand_beside_arguments() -> None:
    model = CapsuleModel.create_from_arg_string(f"{FULL},batch_size=4", {"batch_size": 1, "device": None})
    assert model.arguments.batch_size == 4
    assert CapsuleModel.create_from_arg_string(FULL, {"batch_size": "8"}).arguments.batch_size == 8


def test_log_likelihood_is_refused_by_name() -> None:
    model = CapsuleModel(pretrained="pages-vlm", device="cpu")
    request = Instance("loglikelihood", ("a", "b"), 0, {"task": "some_choice", "doc_id": 0, "repeats": 1})
    request.task_name = "some_choice"
    with pytest.raises(InputError, match="some_choice: scored by log-likelihood"):
        model.loglikelihood([request])


def test_the_command_writes_bytes_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of docs/benchmarks.md."""
    run_module("kvcapsule.eval.lmms", run_name="__main__")
    folder = capsys.readouterr().out.strip()
    words = ["--model", "kvcapsule", "--model_args", f"{FULL},policy=snapkv,budget=0.1", "--tasks", "kvcapsule_pages"]
    words += ["--include_path", folder, "--batch_size", "4", "--limit", "4", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words, "--log_samples"])
    cli_evaluate()
    (results,) = tmp_path.rglob("*_results.json")
    written = json.loads(results.read_text())
    assert written["throughput"]["avg_visual_kv_bytes"] < 0.11 * written["throughput"]["avg_full_visual_kv_bytes"]
    (samples,) = tmp_path.rglob("*_samples_kvcapsule_pages.jsonl")
    counts = [json.loads(line)["token_counts"][0] for line in samples.read_text().splitlines()]
    assert len(counts) == 4 and all(count["visual_kv_bytes"] < 45_000 for count in counts)


def test_the_study_compares_answer_by_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, words = study._theirs, ["--limit", "6", "--methods", "full", "--json", str(tmp_path / "r.json")]
    said: list[study.Answers] = []

    def row() -> dict[str, Any]:
        assert study.main(words) == 0
        (only,) = json.loads((tmp_path / "r.json").read_text())["rows"]
        return dict(only)

    def remembered(*arguments: Any) -> study.Answers:
        said.append(theirs(*arguments))
        return said[0]

    monkeypatch.setattr(study, "_theirs", remembered)
    same = row()
    assert (same["same_answers"], same["same_scores"], same["n"]) == (6, 6, 6)
    assert same["accuracy"]["eval"] == same["accuracy"]["lmms"] and same["visual_kv_bytes"]["lmms"] == 401_408
    altered = said[0]._replace(texts=["x", *said[0].texts[1:]], scores=[-1.0, *said[0].scores[1:]])
    monkeypatch.setattr(study, "_theirs", lambda *arguments: altered)
    other = row()
    assert (other["same_answers"], other["same_scores"]) == (5, 5)
    assert other["accuracy"]["eval"] != other["accuracy"]["lmms"]
    assert study.main(["--methods", "policy=int4"]) == 2 and "the first is full" in capsys.readouterr().err
