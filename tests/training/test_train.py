"""Training: closed forms against their definitions, the harvest against the real cache, and one whole run with its
files."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data.prompts import conversation, encode
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.segments.segment import Segment
from kvcapsule.testbeds import pages
from kvcapsule.training.families.kvcapsule_options import KVCapsuleRecipe as Recipe
from kvcapsule.training.families.kvcapsule_options import KVCapsuleShape
from kvcapsule.training.families.soft_mask import SoftLinear
from kvcapsule.training.harvest import harvest
from kvcapsule.training.losses import full_output, output_error, unexplained
from kvcapsule.training.main import main as command
from kvcapsule.training.options import parse, shipped_recipes
from kvcapsule.training.second_moments import TokenMoments, greedy_subset, principal_basis, ridge_reconstruction

QUICK = ["--data.size", "40", "--held_out", "8", "--batch", "4", "--moment_batches", "2", "--device", "cpu"]


def main(words: list[str]) -> int:
    """The command with the recipe that these tests are about."""
    return command(words if words == ["--help"] else ["kvcapsule", *words])


@pytest.fixture(scope="module")
def batch(processor):
    rows = pages.pages("train", 3)
    return encode(processor, [conversation([r["image"]], r["prompt"], r["answer"]) for r in rows])


def test_harvest_is_what_the_full_cache_holds(model, batch) -> None:
    layers = harvest(model, batch, tile=49)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**batch, **cache_argument(cache))
    for layer, own in zip(layers, cache.layers, strict=True):
        assert layer.keys.shape == (3 * 4, 2, 49, 32)
        keys = layer.frame.rotate(layer.keys)
        for row in range(3):
            start = int((batch["input_ids"][row] == model.config.image_token_id).nonzero()[0])
            mine = layer.owner == row
            mine_keys = keys[mine].transpose(0, 1).flatten(1, 2)
            torch.testing.assert_close(mine_keys, own.keys[row, :, start : start + 196], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                layer.values[mine].transpose(0, 1).flatten(1, 2), own.values[row, :, start : start + 196]
            )


def test_harvested_queries_read_what_the_model_reads(model, batch) -> None:
    """Attention's output rebuilt from the harvest equals the model's own, taken in front of o_proj."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for layer in model.model.language_model.layers
    ]
    layers = harvest(model, batch, tile=50)
    for hook in hooks:
        hook.remove()
    for layer, out in zip(layers, seen, strict=True):
        rebuilt = full_output(layer).transpose(1, 2).flatten(2)
        queries = rebuilt.shape[1]
        torch.testing.assert_close(rebuilt[layer.reads], out[:, -queries:][layer.reads], atol=2e-5, rtol=1e-4)


def test_errors_vanish_for_the_truth_alone(model, batch) -> None:
    layer = harvest(model, batch, tile=49)[1]
    truth = full_output(layer)
    exact = Segment(layer.keys, layer.values, layer.owner, frame=layer.frame)
    worse = Segment(layer.keys, layer.values * 0.5, layer.owner, frame=layer.frame)
    assert output_error(layer, exact, truth) < 1e-10
    assert output_error(layer, worse, truth) > 1e-3
    assert unexplained(layer.keys, layer.keys) == 0
    mean = layer.keys.mean(dim=(0, 2), keepdim=True).expand_as(layer.keys)
    assert unexplained(mean, layer.keys) == pytest.approx(1.0, abs=1e-4)


def test_moments_agree_with_the_stacked_data(model, batch) -> None:
    layer = harvest(model, batch, tile=28)[0]
    moments = TokenMoments(2, 28, 32)
    moments.add(layer)
    values = layer.values.double()
    mean = values.mean(dim=(0, 2))
    torch.testing.assert_close(moments.value_mean(), mean)
    centred = values - mean[None, :, None]
    torch.testing.assert_close(
        moments.centred_value_gram(), torch.einsum("ehtd,ehsd->hts", centred, centred), atol=1e-8, rtol=1e-8
    )
    # Token Gram matrices do not care for the frame that the keys are in.
    turned = layer.frame.rotate(layer.keys.double())
    torch.testing.assert_close(moments.key_gram, torch.einsum("ehtd,ehsd->hts", turned, turned), atol=1e-4, rtol=1e-5)


def test_principal_basis_is_the_best_of_its_rank() -> None:
    x = torch.randn(1, 6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = principal_basis(x @ x.transpose(-1, -2), 2)
    torch.testing.assert_close(basis @ basis.transpose(-1, -2), torch.eye(2, dtype=torch.float64)[None])
    lost = (x - basis.transpose(-1, -2) @ (basis @ x)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(x[0])[2:].square().sum())


def test_ridge_reconstruction_is_least_squares() -> None:
    x = torch.randn(1, 7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([1, 4])
    theta = ridge_reconstruction(x @ x.transpose(-1, -2), kept, ridge=0.0)
    wanted = torch.linalg.lstsq(x[0, kept].T, x[0].T).solution.T
    torch.testing.assert_close(theta[0], wanted)


def test_greedy_subset_finds_the_tokens_that_span_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    mix = torch.rand(8, 2, generator=generator, dtype=torch.float64)
    mix[3], mix[6] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    x = (mix @ base)[None]
    gram = x @ x.transpose(-1, -2)
    kept = greedy_subset(gram, 2)
    rebuilt = ridge_reconstruction(gram, kept, 1e-12) @ x[:, kept]
    torch.testing.assert_close(rebuilt, x, atol=1e-5, rtol=1e-5)
    assert kept.tolist() == sorted(kept.tolist()) and len(set(kept.tolist())) == 2


def test_the_soft_mask_learns_the_tokens_that_matter() -> None:
    """Two tokens hold all there is; the mask begins at others and must move to them."""
    torch.manual_seed(0)
    base = torch.randn(64, 1, 2, 4)
    mix = torch.zeros(6, 2)
    mix[2, 0] = mix[5, 1] = 1.0
    keys = mix @ base
    soft = SoftLinear(6, 2, torch.tensor([0, 1]), torch.zeros(1, 6, 2))
    optimizer = torch.optim.Adam([{"params": [soft.theta], "lr": 0.05}, {"params": [soft.logits], "lr": 0.1}])
    for step in range(200):
        temperature = 1.0 * 0.1 ** (step / 199)
        loss = (
            unexplained(soft(keys, temperature), keys)
            + soft.ratio_loss(temperature)
            + 0.01 * soft.mask_loss(temperature)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert soft.kept().tolist() == [2, 5]


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Recipe(compression=2.5), (0.4, 0.4)),
        (Recipe(compression=20), (0.05, 0.05)),
        (Recipe(compression=1 / 0.41, codec=KVCapsuleShape(key_share=0.2)), (0.164, 0.656)),
        (Recipe(compression=1.25, codec=KVCapsuleShape(key_share=0.2)), (0.6, 1.0)),
        (Recipe(compression=2.5, codec=KVCapsuleShape(key_retention=0.1)), (0.1, 0.4)),
    ],
)
def test_one_ratio_gives_both(recipe: Recipe, wanted: tuple[float, float]) -> None:
    assert recipe.mean_ratios() == pytest.approx(wanted)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses(name: str) -> None:
    values = parse([name], pytest.fail)
    assert values.model == ("runs/smol-vlm" if name.startswith("smol-vlm-") else "pages-vlm")


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "The frozen VLM",
        "How many times fewer bytes are stored",
        "Share of the stored tokens",
        "Name of the column with the question",
    ):
        assert words in text


def test_a_run_leaves_a_capsule_with_its_logs(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "capsule"
    words = ["--model", vlm, "--output", str(output), *QUICK, "--compression", "3.3333333", "--optim.soft_steps", "3"]
    assert main([*words, "--optim.hard_steps", "3"]) == 0
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "recipe.yaml",
        "training_rows.safetensors",
    ]
    metrics = json.loads((output / "metrics.json").read_text())["train"]
    assert 0 < metrics["keys_unexplained"] < 1 and 0 < metrics["values_unexplained"] < 1
    run = Path(f"{output}.run")
    assert (run / "csv" / "metrics.csv").is_file() and list((run / "tensorboard").glob("events*"))
    checkpoint = torch.load(run / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 6
    assert not [name for name in checkpoint["state_dict"] if "language_model" in name or "vision" in name]
    assert main([*words, "--optim.hard_steps", "3", "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    ratios = Capsule.from_pretrained(output).config.codec.key_ratios
    assert sum(ratios) / len(ratios) == pytest.approx(0.3 * 2 * 0.6)


@pytest.mark.parametrize(("kl_weight", "measure"), [("0", "output_error"), ("20", "kl")])
def test_training_moves_what_it_weighs_down(vlm: str, tmp_path: Path, kl_weight: str, measure: str) -> None:
    """The error of attention's output, and with a weight of its own the KL of the logits."""
    found = []
    for steps in (0, 12):
        output = tmp_path / f"capsule-{steps}"
        words = [
            "--model",
            vlm,
            "--output",
            str(output),
            *QUICK,
            "--codec.key_share",
            "0.5",
            "--compression",
            "20",
            "--optim.lr",
            "5e-3",
        ]
        words += ["--optim.kl_weight", kl_weight]
        assert main([*words, "--optim.soft_steps", "0", "--optim.hard_steps", str(max(steps, 1))]) == 0
        found.append(json.loads((output / "metrics.json").read_text())["train"][measure])
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--compression", "0.5"], "--compression 0.5: give a number of at least 1"),
        (["--compression", "0"], "--compression 0.0: give a number of at least 1"),
        (["--ratio", "20"], "--ratio is --compression now"),
        (["--transform.maps=8"], "--transform.maps is --transform.max-map-mib now"),
        (["--transform.readers", "8"], "--transform.readers is --transform.query-bank now"),
        (["--codec.key-ratio", "0.5"], "--codec.key-ratio is --codec.key-retention now"),
        (["--codec.value_ratio", "0.5"], "--codec.value-ratio is --codec.value-retention now"),
        (["--optim.ratio-weight", "2"], "--optim.ratio-weight is --optim.retention-weight now"),
        (["--codec.tile", "300"], "nothing fills a tile"),
        (["--model", "no/such-model"], "cannot load the model"),
        (["--data.split", "dev"], "train, validation, test"),
        (["--held_out", "40"], "40 questions cannot spare 40 to measure on"),
        (["--resume", "true"], "nothing to resume"),
        (["--optim.mask_init", "clever"], "neither greedy, even nor random"),
    ],
)
def test_bad_input_is_one_clear_line(
    vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    output = tmp_path / "capsule"
    model = [] if "--model" in words else ["--model", vlm]
    assert main([*model, "--output", str(output), *QUICK, *words]) == 2
    error = capsys.readouterr().err
    assert "kvcapsule train: " in error and says in error and "Traceback" not in error
    assert not output.exists()


def test_missing_column_and_unreadable_image_are_named(
    vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "data.json"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    rows = [{"image": str(broken), "text": f"What is {i}?", "answer": "no"} for i in range(12)]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    words = ["--model", vlm, "--output", str(tmp_path / "c"), *QUICK, "--data.source", str(table)]
    assert main(words) == 2
    assert "no column 'prompt'; it has image, text, answer" in capsys.readouterr().err
    assert main([*words, "--data.prompt", "text", "--data.split", "all", "--held_out", "4"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_an_existing_capsule_is_not_overwritten(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").mkdir()
    assert main(["--model", vlm, "--output", str(tmp_path / "kept"), *QUICK]) == 2
    assert "--force" in capsys.readouterr().err
