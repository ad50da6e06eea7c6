"""`kvcapsule generate`: the answer on stdout, the bytes on stderr, and one line for each kind of wrong input."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig

from kvcapsule.capsule.base_model import record_of
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.cli import main
from kvcapsule.codec import FAMILIES
from kvcapsule.data.prompts import conversation, encode
from kvcapsule.vlm.geometry import KVGeometry

PROMPT = "Transcribe the page."
VISUAL = 196
NEW = 20
TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
"""Keys and values of one token of the tiny VLM: 4 layers, 2 KV heads of 32, float32."""


class Plain(NamedTuple):
    """What the model answers by itself."""

    prompt: int
    """Tokens of the prompt."""
    tokens: list[int]
    text: str

    @property
    def cached(self) -> int:
        """Tokens in the cache at the end: the last one written is not read."""
        return self.prompt + len(self.tokens) - 1


class Saved(NamedTuple):
    """Files of the tiny VLM and of capsules for it."""

    folder: Path
    """Holds model, page.png and the capsules identity, lossy and other-geometry."""
    plain: Plain
    """The greedy answer about page.png."""
    imageless: Plain
    """The greedy answer without an image."""

    def arguments(self, *more: str, images: bool = True) -> list[str]:
        image = ["--image", self.path("page.png")] if images else []
        return [
            "generate",
            "--model",
            self.path("model"),
            *image,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            str(NEW),
            *more,
        ]

    def path(self, name: str) -> str:
        return str(self.folder / name)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: list[Image.Image],
) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    images[0].save(folder / "page.png")
    geometry = KVGeometry.from_config(model.config)
    halves = {"key_ratios": (0.5,) * 4, "value_ratios": (0.5,) * 4}
    for name, family, codec, fits in (
        # 13 does not divide the span: the last token stays raw.
        ("identity", "identity", {"tile": 13}, geometry),
        ("lossy", "kvcapsule", {"tile": 14, **halves}, geometry),
        ("other-geometry", "identity", {"tile": 14}, replace(geometry, kv_heads=4)),
    ):
        Capsule(CapsuleConfig(family, FAMILIES[family].config.from_dict(codec), fits, "pages-vlm")).save_pretrained(
            folder / name
        )
    saved = Saved(folder, answer(model, processor, images[:1]), answer(model, processor, []))
    assert len(set(saved.plain.tokens)) >= NEW / 4, "a model that repeats itself answers alike with any cache"
    return saved


def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: list[Image.Image]) -> Plain:
    inputs = encode(processor, [conversation(images, PROMPT)])
    prompt = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, prompt:].tolist()
    return Plain(prompt, tokens, processor.tokenizer.decode(tokens, skip_special_tokens=True))


def figures(err: str) -> dict[str, float]:
    """The rows of the report by name."""
    found = re.findall(r"^(\w+(?: \w+)?)  +([\d,.]+)(?:  .*)?$", err, flags=re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in found}


def test_identity_capsule_answers_as_the_model(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments("--capsule", saved.path("identity"))) == 0
    out, err = capsys.readouterr()
    assert out == saved.plain.text + "\n"
    held = figures(err)
    text = saved.plain.prompt - VISUAL
    # Beside the keys and values a segment holds its owner and, with tiles, their rotations: a few bytes a tile.
    assert VISUAL * TOKEN_BYTES < held["visual"] < VISUAL * TOKEN_BYTES * 1.02
    assert text * TOKEN_BYTES < held["text"] < text * TOKEN_BYTES + 100
    assert held["tail"] >= (len(saved.plain.tokens) - 1) * TOKEN_BYTES
    assert held["total"] == held["visual"] + held["text"] + held["tail"]
    assert held["full cache"] == saved.plain.cached * TOKEN_BYTES
    assert held["total compression"] == pytest.approx(held["full cache"] / held["total"], abs=0.005)
    assert f"computed, {saved.plain.cached} tokens" in err


def test_compare_with_an_identity_capsule(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments("--capsule", saved.path("identity"), "--compare")) == 0
    out, err = capsys.readouterr()
    assert out == saved.plain.text + "\n"
    assert f"answer with the full cache (identical):\n{saved.plain.text}\n" in err
    assert figures(err)["full cache"] == saved.plain.cached * TOKEN_BYTES
    assert "measured" in err and "computed" not in err


def test_an_image_is_kept_in_a_store(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--capsule", saved.path("identity"), "--store", str(tmp_path / "images"), "--store-max-bytes", "5MB"]
    for line in ("0 of 1 images known, 1 stored", "1 of 1 images known, 0 stored"):
        assert main(saved.arguments(*words)) == 0
        out, err = capsys.readouterr()
        assert out == saved.plain.text + "\n"
        assert f"image store: {line};" in err and str(tmp_path / "images") in err
    assert main(["store", str(tmp_path / "images"), "list", "--wide"]) == 0
    assert "1x14x14" in capsys.readouterr().out


def test_compare_with_a_lossy_capsule(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained codec: keys are rebuilt as zeros, so the answer is another one and the verdict says so."""
    assert main(saved.arguments("--capsule", saved.path("lossy"), "--compare")) == 0
    out, err = capsys.readouterr()
    assert out != saved.plain.text + "\n"
    assert re.search(
        r"answer with the full cache \(different from token \d+ on\):\n" + re.escape(saved.plain.text) + "\n", err
    )
    held = figures(err)
    assert held["codec maps"] == sum(
        t.numel() * 4
        for t in Capsule.from_pretrained(saved.folder / "lossy").state_dict().values()
        if t.is_floating_point()
    )
    assert 0.5 * VISUAL * TOKEN_BYTES < held["visual"] < 0.52 * VISUAL * TOKEN_BYTES
    assert held["total compression"] == pytest.approx(held["full cache"] / held["total"], abs=0.005)
    # Half of the rows are stored, beside the owner and the rotation of each tile; text and tail do not count.
    assert held["visual compression"] == pytest.approx(VISUAL * TOKEN_BYTES / held["visual"], abs=0.005)
    assert 1.9 < held["visual compression"] <= 2 and held["total compression"] < 1.9


def test_without_a_capsule_the_full_cache_answers(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments()) == 0
    out, err = capsys.readouterr()
    assert out == saved.plain.text + "\n"
    assert figures(err) == {"full cache": saved.plain.cached * TOKEN_BYTES}


def test_without_an_image(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments("--capsule", saved.path("lossy"), images=False)) == 0
    out, err = capsys.readouterr()
    assert out == saved.imageless.text + "\n"
    held = figures(err)
    assert held["visual"] == 0 and "visual compression" not in held and "total compression" in held
    assert held["text"] >= saved.imageless.prompt * TOKEN_BYTES


def test_several_images(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments("--image", saved.path("page.png"), "--capsule", saved.path("identity"))) == 0
    assert 2 * VISUAL * TOKEN_BYTES < figures(capsys.readouterr().err)["visual"] < 2.04 * VISUAL * TOKEN_BYTES


def test_the_answer_is_streamed(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout is written to before the last forward; with nothing, where a word is not whole yet."""
    events: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            events.append("text")
            return super().write(text)

    forward = LlavaForConditionalGeneration.forward

    @wraps(forward)  # generate reads its signature
    def counted(*args: object, **kwargs: object) -> object:
        events.append("forward")
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", counted)
    monkeypatch.setattr(sys, "stdout", Out())
    assert main(saved.arguments("--capsule", saved.path("identity"))) == 0
    assert events.count("forward") == len(saved.plain.tokens)
    assert "forward" in events[events.index("text") :]


def test_sampling_follows_the_seed(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert main(saved.arguments("--do-sample", "--temperature", "3", "--seed", seed)) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_capsule_brings_its_model(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --model the one that the capsule was trained with, which here lies where the capsule's name leads."""
    words = ["generate", "--image", saved.path("page.png"), "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    capsule = Capsule.from_pretrained(saved.folder / "identity")
    capsule.config = replace(capsule.config, base_model="model", metadata={"model": {"local": True}})
    capsule.save_pretrained(tmp_path / "of-model")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--capsule", "of-model"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the model in 'model' of the machine that trained it, which is not here" in err
    monkeypatch.chdir(saved.folder)
    assert main([*words, "--capsule", str(tmp_path / "of-model")]) == 0
    assert capsys.readouterr().out == saved.plain.text + "\n"


def test_another_model_is_warned_of_in_one_line(
    saved: Saved, model: LlavaForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsule = Capsule.from_pretrained(saved.folder / "identity")
    record = record_of("org/vlm", model)
    for name, weights in (("same", record.weights), ("other", dict.fromkeys(record.weights, "0"))):
        known = replace(record, weights=weights).to_dict()
        capsule.config = replace(capsule.config, base_model="org/vlm", metadata={"model": known})
        capsule.save_pretrained(tmp_path / name)
    for words in ([], ["--compare"]):
        assert main(saved.arguments("--capsule", str(tmp_path / "other"), *words)) == 0
        out, err = capsys.readouterr()
        assert out == saved.plain.text + "\n"
        assert [line for line in err.splitlines() if "Warning" in line or "warning" in line] == [err.splitlines()[0]]
        assert err.startswith(f"warning: {tmp_path}/other: the capsule was trained on 'org/vlm', and the weights of")
    for strict in (["--strict"], ["--strict", "true"]):
        assert main(saved.arguments("--capsule", str(tmp_path / "other"), *strict)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("kvcapsule generate: the capsule was trained on 'org/vlm'")
    assert main(saved.arguments("--capsule", str(tmp_path / "same"), "--strict", "true")) == 0
    assert "warning" not in capsys.readouterr().err


def test_compare_draws_alike(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(saved.arguments("--do-sample", "--temperature", "3", "--capsule", saved.path("identity"), "--compare"))
        == 0
    )
    out, err = capsys.readouterr()
    assert f"(identical):\n{out}" in err
    assert out != saved.plain.text + "\n"


@pytest.mark.parametrize(("name", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_dtype(name: str, itemsize: int, saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(saved.arguments("--dtype", name, "--max-new-tokens", "1")) == 0
    assert figures(capsys.readouterr().err)["full cache"] == saved.plain.prompt * TOKEN_BYTES // 4 * itemsize


def test_as_a_process(saved: Saved) -> None:
    """In a shell: stdout is the answer alone, and stderr holds no warning or progress bar beside the report."""
    command = [sys.executable, "-m", "kvcapsule", *saved.arguments("--capsule", saved.path("identity"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    # As bytes: an untrained model writes carriage returns, which text mode would turn into line feeds.
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == saved.plain.text + "\n"
    lines = [line for line in done.stderr.decode().splitlines() if line.strip()]
    head, rule, *lines = lines
    assert head.startswith("cache  ") and set(rule) == {"─"}
    assert [line.split("  ")[0] for line in lines] == [
        "visual",
        "text",
        "tail",
        "total",
        "full cache",
        "visual compression",
        "total compression",
    ]


def broken_image(folder: Path) -> list[str]:
    (folder / "broken.png").write_text("no image")
    return ["--image", str(folder / "broken.png")]


def without_chat_template(folder: Path) -> list[str]:
    shutil.copytree(folder / "model", folder / "untemplated")
    (folder / "untemplated" / "chat_template.jinja").unlink()
    return ["--model", str(folder / "untemplated")]


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such image": (lambda folder: ["--image", str(folder / "nothing.png")], r"there is no image .*nothing\.png"),
    "unreadable image": (broken_image, r"broken\.png cannot be read as an image"),
    "no such model": (lambda folder: ["--model", str(folder / "nothing")], r"cannot load the model '.*nothing'"),
    "no such capsule": (lambda folder: ["--capsule", str(folder / "nothing")], r"no capsule '.*nothing'"),
    "a model as capsule": (lambda folder: ["--capsule", str(folder / "model")], r"not the config of a capsule"),
    "capsule of another geometry": (
        lambda folder: ["--capsule", str(folder / "other-geometry")],
        r"kv_heads: 4 != 2.*'kv_heads': 4.*'kv_heads': 2",
    ),
    "no chat template": (without_chat_template, r"no chat template"),
    "unknown dtype": (lambda folder: ["--dtype", "float8"], r"unknown dtype 'float8': choose auto"),
    "unknown device": (lambda folder: ["--device", "abacus"], r"--device abacus cannot be used here"),
    "store without capsule": (lambda folder: ["--store", f"{folder}/images"], r"give a --capsule too"),
    "strict without capsule": (lambda folder: ["--strict"], r"give a --capsule too"),
    "room without store": (lambda folder: ["--store-max-bytes", "1GB"], r"only with --store"),
    "compare without capsule": (lambda folder: ["--compare"], r"give a --capsule too"),
    "temperature without sampling": (
        lambda folder: ["--temperature", "0.5"],
        r"--temperature has an effect only with --do-sample",
    ),
    "temperature of zero": (lambda folder: ["--do-sample", "--temperature", "0"], r"must be above 0"),
    "top-p of two": (lambda folder: ["--do-sample", "--top-p", "2"], r"outside \(0, 1\]"),
    "no tokens": (
        lambda folder: ["--max-new-tokens", "0"],
        r"--max-new-tokens: '0' is not a whole number of at least 1",
    ),
    "mistyped option": (lambda folder: ["--max-new-token", "1"], r"did you mean --max-new-tokens\? \(`kvcapsule gen"),
    "unknown option": (lambda folder: ["--ratio", "10"], r"there is no option --ratio 10"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = WRONG[name]
    try:
        code = main(saved.arguments(*make(saved.folder)))
    except SystemExit as ended:  # raised by argparse
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("kvcapsule generate: ")
    assert re.search(message, line)
    assert not out


def test_encoder_decoder_is_refused(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SimpleNamespace(config=PreTrainedConfig(is_encoder_decoder=True))
    monkeypatch.setattr("kvcapsule.vlm.loading.load_vlm", lambda *_, **__: (model, None))
    assert main(saved.arguments()) == 2
    assert "Use a decoder-only VLM" in capsys.readouterr().err


def test_the_prompt_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("kvcapsule generate: the following arguments are required: --prompt")


def test_help_does_not_wait_for_the_libraries() -> None:
    code = """if True:
        import sys
        from kvcapsule.cli import main
        try:
            main(["generate", "--help"])
        except SystemExit:
            print(*sys.modules, file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "--capsule" in done.stdout
    assert not {"torch", "transformers", "datasets"} & set(done.stderr.split())
