"""`kvcapsule estimate`: the closed form by hand, its limits, and the command on configs whose bytes are known."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_families, tiny_vlm
from transformers import AutoConfig, LlamaConfig, LlavaConfig

from kvcapsule.cli import main
from kvcapsule.estimate import Cache, Weights, capsule_cache, full_cache, largest_batch, speedup_bound, speedup_limit

LLAVA_NEXT = Cache(visual=2880 * 524_288, text=128 * 524_288)
"""LLaVA-NeXT-Vicuna-7B in 16 bits: keys and values of 32 layers of 32 heads of 128."""
VICUNA = 13.2e9


def less(full: Cache, ratio: float) -> Cache:
    return capsule_cache(full, 2, ratio)


def test_by_hand() -> None:
    """W = 100, F = 20, T = 4, c = 10, B = 5: (100 + 5 * 24) / (100 + 5 * 6)."""
    full = full_cache(token=2, visual=10, text=2)
    assert (full.visual, full.text, full.total) == (20, 4, 24)
    capsule = less(full, 10)
    assert (capsule.visual, capsule.text) == (2, 4)
    assert speedup_bound(100, full, capsule, 5) == pytest.approx(220 / 130)


@pytest.mark.parametrize(
    ("ratio", "loads", "rounding"),
    [
        (2.4, {1.5: 1.33, 2: 6.0}, 0.005),
        (10, {1.5: 0.59, 2: 1.25, 3: 2.9, 5: 8.0, 7.08: 20.8}, 0.02),
        (40, {1.5: 0.52, 2: 1.05, 3: 2.2, 5: 4.6, 7.08: 7.4}, 0.02),
        (80, {1.5: 0.51, 2: 1.03, 3: 2.1, 5: 4.3, 7.08: 6.7}, 0.02),
    ],
)
def test_when_decoding_is_bound_by_the_cache(ratio: float, loads: dict[float, float], rounding: float) -> None:
    """How many times the weights a batch's visual KV must be for a speed-up: B F / W = (S - 1) / (1 - S / c), to the
    digits given."""
    for speedup, load in loads.items():
        full = Cache(load * 1e9, 0)
        assert speedup_bound(1e9, full, less(full, ratio), 1) == pytest.approx(speedup, rel=rounding), speedup
    whole = Cache(1e15, 0)
    assert speedup_bound(1e9, whole, less(whole, 2.4), 64) < 2.4


@pytest.mark.parametrize(
    ("weights", "target", "batch"), [(VICUNA, 2, 10), (3.7e9, 2, 3), (VICUNA, 7.08, 97), (3.7e9, 7.08, 27)]
)
def test_batch_that_a_speedup_needs(weights: float, target: float, batch: int) -> None:
    """LLaVA-NeXT at 40x, weights of 16 and of 4 bits."""
    capsule = less(LLAVA_NEXT, 40)
    assert (
        speedup_bound(weights, LLAVA_NEXT, capsule, batch + 1)
        > target
        > speedup_bound(weights, LLAVA_NEXT, capsule, batch - 1)
    )


def test_largest_batch() -> None:
    """In 130 GB beside 13.2 GB of weights: 74 sequences, or fifteen times as many at 40x."""
    assert largest_batch(130e9, VICUNA, LLAVA_NEXT) == 74
    assert largest_batch(130e9, VICUNA, less(LLAVA_NEXT, 40)) == pytest.approx(1113, rel=0.01)
    assert largest_batch(100, 40, Cache(15, 5)) == 3
    assert largest_batch(30, 40, Cache(15, 5)) == 0


def test_limits() -> None:
    capsule = less(LLAVA_NEXT, 20)
    assert all(speedup_bound(VICUNA, LLAVA_NEXT, less(LLAVA_NEXT, 1), batch) == 1 for batch in (1, 7, 1000))
    bounds = [speedup_bound(VICUNA, LLAVA_NEXT, capsule, batch) for batch in (1, 4, 16, 64, 10**9)]
    assert bounds == sorted(bounds) and 1 < bounds[0] < 1.11
    assert bounds[-1] == pytest.approx(speedup_limit(LLAVA_NEXT, capsule), rel=1e-4)
    assert speedup_limit(LLAVA_NEXT, capsule) == pytest.approx((2880 + 128) / (2880 / 20 + 128))


def test_a_ratio_counts_from_16_bits() -> None:
    """In float32 the same capsule is half as large a share of the cache: its bytes do not depend on what it
    replaces."""
    half, single = full_cache(2 * 64, 100, 10), full_cache(4 * 64, 100, 10)
    assert capsule_cache(half, 2, 20).visual == capsule_cache(single, 4, 20).visual == half.visual / 20
    assert capsule_cache(single, 4, 20).text == single.text


def test_weights() -> None:
    weights = Weights(read_matrices=1000, read_others=10, held_matrices=4000, held_others=100)
    assert (weights.read_bytes(2), weights.held_bytes(4)) == (2020, 16400)
    assert weights.read_bytes(2, 8) == 1020
    assert weights.read_bytes(2, 4) == 1000 * 4.25 / 8 + 20
    assert weights.held_bytes(2, 4) == 4000 * 4.25 / 8 + 200


def estimate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_pages_vlm(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(capsys, "--visual-tokens", "196", "--dtype", "float32", "--batch", "6", "--memory", "1")
    token = 4 * 2 * 2 * 32 * 4
    assert found["kv_bytes_per_token"] == token
    assert found["full"] == {"visual": 196 * token, "text": 128 * token, "total": 324 * token}
    assert found["capsule"] == {"visual": 10035, "text": 128 * token, "total": 10035 + 128 * token}
    assert (found["compression16"], found["compression"], found["weight_bits"]) == (20, 40, 32)
    assert [row["batch"] for row in found["speedup_bound"]] == [1, 4, 6, 16, 64]
    read, capsule = found["weight_bytes_read"], 196 * token / 40 + 128 * token
    for row in found["speedup_bound"]:
        assert row["bound"] == pytest.approx((read + row["batch"] * 324 * token) / (read + row["batch"] * capsule))
    assert found["memory"]["batch_full"] == (2**30 - found["weight_bytes_held"]) // (324 * token)
    assert found["memory"]["batch_capsule"] == int((2**30 - found["weight_bytes_held"]) / capsule)
    assert found["measured"] is False and "upper bound" in found["note"]


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Programs read them: a key is added or renamed on purpose."""
    found = estimate(capsys, "--visual-tokens", "196")
    assert (
        list(found)
        == (
            "model model_type dtype weight_bits images visual_tokens text_tokens batch compression16 compression layers"
            " full_attention_layers kv_bytes_per_token full capsule weight_bytes_read weight_bytes_held speedup_bound"
            " speedup_limit memory train measured note"
        ).split()
    )
    assert found["memory"] is None


def test_json_in_a_file_stands_beside_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--visual_tokens", "196", "--json", str(tmp_path / "new" / "e.json")]) == 0
    assert "a sequence's cache" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "e.json").read_text())
    assert written == estimate(capsys, "--visual-tokens", "196")
    assert "is a folder" in refused(capsys, "--visual-tokens", "196", "--json", str(tmp_path))


def test_resolution(capsys: pytest.CaptureFixture[str]) -> None:
    """The processor of pages-vlm gives every image its 196 tokens."""
    assert estimate(capsys, "--resolution", "100x300", "--images", "3")["visual_tokens"] == 3 * 196
    assert estimate(capsys, "--visual-tokens", "50", "--images", "3")["visual_tokens"] == 150


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "internvl", "llava"])
def test_weights_are_those_of_the_model(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held: every parameter once. Read: the language model and its head, an embedding that is not the head too left
    out."""
    model = tiny_vlm.build(model_type, getattr(tiny_families, model_type)())
    model.config.save_pretrained(tmp_path)
    found = estimate(capsys, "--model", str(tmp_path), "--visual-tokens", "64")
    assert found["model_type"] == model_type
    assert found["weight_bytes_held"] == 2 * sum(p.numel() for p in model.parameters())
    layers = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "language_model.layers." in name or "language_model.norm." in name
    )
    assert found["weight_bytes_read"] == 2 * (layers + tiny_vlm.VOCABULARY * tiny_vlm.WIDTH)


def test_a_model_of_true_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults of LLaVA's config are LLaVA-1.5-7B: 13.2 GB a step, 3.7 at 4 bits, 302 MB of visual KV an image."""
    LlavaConfig().save_pretrained(tmp_path)
    image = ("--model", str(tmp_path), "--visual-tokens", "576", "--compression", "40")
    found = estimate(capsys, *image, "--batch", "61")
    assert found["weight_bytes_read"] == pytest.approx(13.2e9, rel=0.002)
    assert found["full"] == {"visual": 301_989_888, "text": 67_108_864, "total": 369_098_752}
    bounds = {
        row["batch"]: row["bound"]
        for row in found["speedup_bound"] + estimate(capsys, *image, "--batch", "60")["speedup_bound"]
    }
    assert 1.01 < bounds[1] < 1.11
    assert bounds[60] < 2 < bounds[61]
    quantised = estimate(capsys, *image, "--weight-bits", "4", "--batch", "17")
    assert quantised["weight_bytes_read"] == pytest.approx(3.7e9, rel=0.002)
    assert next(row["bound"] for row in quantised["speedup_bound"] if row["batch"] == 17) == pytest.approx(2, abs=0.02)


def test_experts_of_one_token_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of four, so that the bound stays one; all are held."""
    model = tiny_vlm.build("qwen3_vl_moe", tiny_families.qwen3_vl_moe())
    model.config.save_pretrained(tmp_path)
    found = estimate(capsys, "--model", str(tmp_path), "--visual-tokens", "64")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    layers = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "language_model.layers." in name or "language_model.norm." in name
    )
    assert experts > 0
    assert found["weight_bytes_read"] == 2 * (layers - experts / 2 + tiny_vlm.VOCABULARY * tiny_vlm.WIDTH)
    assert found["weight_bytes_held"] == 2 * sum(p.numel() for p in model.parameters())


def test_layers_without_full_attention_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("qwen3_5", **tiny_families.qwen3_5().settings).save_pretrained(tmp_path)
    found = estimate(capsys, "--model", str(tmp_path), "--visual-tokens", "64")
    assert (found["full_attention_layers"], found["layers"]) == (2, 4)
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--visual-tokens", "196", "--batch", "6", "--memory", "1", "--dtype", "float32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "20x less than at 16 bits, 40x less than in float32",
        "An upper bound from bytes alone; nothing is measured.",
        "At batch 1 the bound is near 1",
        "4 of 4 layers have full attention",
        "largest batch in 1 GiB",
    ):
        assert said in out
    assert all(f" {batch} 1." in out for batch in (1, 4, 6))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "0"], "'0' is not a whole number of at least 1"),
        (["--batch", "0"], "'0' is not a whole number of at least 1"),
        (["--text", "-1"], "'-1' is not a whole number of at least 0"),
        (["--compression", "0.5"], "'0.5' is not a number of at least 1"),
        (["--compression", "nan"], "'nan' is not a number of at least 1"),
        (["--ratio", "20"], "--ratio is --compression now"),
        (["--ratio=20"], "--ratio is --compression now"),
        (["--json"], "--json needs a FILE, or - to print the JSON to standard output"),
        (["--json", "--batch", "2"], "--json needs a FILE"),
        (["--memory", "none"], "'none' is not a number above 0"),
        (["--weight-bits", "3"], "--weight-bits"),
        (["--resolution", "4x4"], "not allowed with argument --visual-tokens"),
    ],
)
def test_options_that_cannot_be_used(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "--visual-tokens", "196", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvcapsule estimate: ") and said in line


def test_the_size_of_an_image_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([], "--visual-tokens --resolution is required"),
        (["--resolution", "0x4"], "'0x4' is not HEIGHTxWIDTH"),
    ):
        with pytest.raises(SystemExit):
            main(["estimate", *arguments])
        assert said in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["estimate", *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith("kvcapsule estimate: ")
    return str(line)


def test_models_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ("--visual-tokens", "64")
    assert "cannot read a config of 'no-such-model'" in refused(capsys, "--model", "no-such-model", *tokens)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "no image-text-to-text model" in refused(capsys, "--model", str(tmp_path / "llama"), *tokens)
    AutoConfig.for_model("florence2").save_pretrained(tmp_path / "florence")
    assert "no decoder-only model" in refused(capsys, "--model", str(tmp_path / "florence"), *tokens)
    AutoConfig.for_model("qwen2_5_vl", **tiny_families.qwen2_5_vl().settings).save_pretrained(tmp_path / "qwen")
    assert "Give --visual-tokens instead" in refused(capsys, "--model", str(tmp_path / "qwen"), "--resolution", "64x64")


def test_training_is_counted_without_starting_it(capsys: pytest.CaptureFixture[str]) -> None:
    """pages-vlm: 4 layers of 2 KV heads of 32 channels, so one source of 512 channels."""
    words = ["estimate", "--model", "pages-vlm", "--visual-tokens", "196", "--tile", "49", "--train", "--json", "-"]
    assert main(words) == 0
    train = json.loads(capsys.readouterr().out)["train"]
    assert (train["tile"], train["visual_tokens"], train["batch"]) == (49, 196, 16)
    assert [stage["batches"] for stage in train["stages"]] == [40, 2, 0, 12, 0, 4] and train["batches"] == 58
    sums = 8 * (512**2 + 2 * 4 * (49 * 64 + 49**2))
    tiles = 40 * 16 * 196 * 2 * 4 * 64 * 2
    bases = next(stage for stage in train["stages"] if stage["title"] == "bases")
    assert bases["bytes"] == sums + tiles + 2 * 2 * 4 * 512**2
    assert train["peak_bytes"] == max(stage["bytes"] for stage in train["stages"])
    # Of 100 questions a fifth is held out: 80 are five batches.
    assert main([*words, "--questions", "100"]) == 0
    few = json.loads(capsys.readouterr().out)["train"]
    assert [stage["batches"] for stage in few["stages"]] == [5, 2, 0, 5, 0, 2]
    assert main([*words[:-2], "--family", "transform"]) == 0
    assert "what each layer costs" in capsys.readouterr().out
    assert main([*words[:-2], "--tile", "500"]) == 2
    assert "fill no tile" in capsys.readouterr().err
