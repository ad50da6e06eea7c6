"""The commands that are killed: trainings, with and without a store of harvests, and evaluations."""

import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from kill_switch import in_child
from kill_targets import Target, require_listed, require_no_litter
from PIL import Image
from safetensors.torch import load_file

from kvcapsule import Capsule

QUICK = ["--data.size", "24", "--held-out", "8", "--batch", "4", "--moment-batches", "4", "--device", "cpu"]
QUICK += ["--codec.tile", "28", "--workers", "0", "--threads", "1"]
CODES = ["--transform.logit-batches", "0", "--transform.query-bank", "0", "--transform.kl-weight", "0"]
STEPS = 7
"""Of the descent that is killed; a checkpoint is written every two."""


class Trainings(Target):
    """`kvcapsule train`, with a descent and in closed form; the next run resumes it where that is offered."""

    variants = ("descent", "closed form")

    def prepare(self) -> None:
        # Here, and not in each child.
        from support.kill_model import save_model

        import kvcapsule.training.fit  # noqa: F401

        self.model = save_model(self.room / "model")
        self.expected = {}
        for variant in self.variants:
            place = self.room / variant
            place.mkdir()
            in_child(partial(self.act, place, variant))
            self.expected[variant] = load_file(place / "c" / "model.safetensors")

    def words(self, place: Path, variant: str) -> list[str]:
        more = [*CODES, "--transform.steps", str(STEPS), "--transform.lr", "1e-3"] if variant == "descent" else CODES
        family = "transform" if variant == "descent" else "cross-layer"
        return [family, *QUICK, *more, "--model", self.model, "--output", str(place / "c")]

    def act(self, place: Path, variant: str) -> None:
        code, said = _command("training.main", self.words(place, variant))
        assert code == 0, said

    def check(self, place: Path, variant: str) -> None:
        from kvcapsule.training.run_state import require_intact

        if (place / "c").exists():
            self._require_same(place, variant)
        work = place / "c.run"
        require_intact(work)
        for name in ("run.json", "places.json"):
            if (work / name).exists():
                json.loads((work / name).read_bytes())

    def again(self, place: Path, variant: str) -> str:
        from kvcapsule.training.output_folder import has_state

        words, offered = self.words(place, variant), has_state(place / "c.run")
        code, said = _command("training.main", [*words, "--resume"])
        came = "resumed"
        if code:
            assert code == 2 and said.count("\n") == 1, said
            if "is finished" in said:
                came = "had finished"
            elif "exists: choose" in said:
                code, said = _command("training.main", [*words, "--resume", "--force"])
                assert code == 0, said
            else:
                assert "nothing to resume" in said and not offered, said
                code, said = _command("training.main", [*words, "--force"])
                assert code == 0, said
                came = "started anew"
        self._require_same(place, variant)
        require_listed(place, {"c", "c.run"})
        require_no_litter(place)
        return came

    def _require_same(self, place: Path, variant: str) -> None:
        """But for the last bits, in which sums differ by where in memory their terms lie."""
        Capsule.from_pretrained(place / "c")
        for name, tensor in load_file(place / "c" / "model.safetensors").items():
            torch.testing.assert_close(tensor, self.expected[variant][name], rtol=1e-5, atol=1e-6)


class Harvests(Trainings):
    """The same with --harvests: the next run finds whole harvests alone."""

    variants = ("closed form",)

    def words(self, place: Path, variant: str) -> list[str]:
        return [*super().words(place, variant), "--harvests", str(place / "kept")]

    def check(self, place: Path, variant: str) -> None:
        from kvcapsule.training.harvest_store import _SUFFIX, _read

        super().check(place, variant)
        for file in (place / "kept").glob(f"[!.]*{_SUFFIX}"):
            _read(file, torch.device("cpu"))

    def again(self, place: Path, variant: str) -> str:
        code, said = _command("training.main", [*self.words(place, variant), "--force"])
        assert code == 0, said
        self._require_same(place, variant)
        require_listed(place, {"c", "c.run", "kept"})
        require_listed(place / "kept", set(os.listdir(self.room / variant / "kept")))
        require_no_litter(place)
        return "trained"


class Evaluations(Target):
    """`kvcapsule eval` over the results of an older run."""

    variants = ("capsule", "suite")

    def prepare(self) -> None:
        from support.kill_model import save_capsule, save_model

        import kvcapsule.eval.report.scatter
        import kvcapsule.eval.run  # noqa: F401

        self.model = save_model(self.room / "model")
        self.pages: set[bytes] = set()
        for variant in self.variants:
            place = self.room / variant
            place.mkdir()
            if variant == "capsule":
                save_capsule(place / "c", self.model)
            else:
                entry = {"method": "evenly-spaced", "compression": 2}
                (place / "suite.yaml").write_text(json.dumps({"entries": [entry]}))
            for size in (4, 2):
                in_child(partial(self._run, place, variant, size))
                if variant == "suite":
                    self.pages.add((place / "page.md").read_bytes())

    def _run(self, place: Path, variant: str, size: int) -> None:
        os.chdir(place)
        words = ["--model", self.model, "--data.size", str(size), "--batch", "4", "--max-new-tokens", "4"]
        words += ["--timing", "false", "--json", "e.json", "--plot", "e.png", "--threads", "1"]
        capsule = ["--capsule", "c", "--methods", "int4", "--save-metrics"]
        words += capsule if variant == "capsule" else ["--suite", "suite.yaml", "--report", "page.md"]
        code, said = _command("eval.main", words)
        assert code == 0, said

    def reset(self, place: Path, variant: str) -> None:
        shutil.copytree(self.room / variant, place, dirs_exist_ok=True)

    def act(self, place: Path, variant: str) -> None:
        self._run(place, variant, 4)

    def check(self, place: Path, variant: str) -> None:
        assert _questions(place / "e.json") in (2, 4)
        with Image.open(place / "e.png") as picture:
            picture.load()
        if variant == "capsule":
            Capsule.from_pretrained(place / "c")
            metrics = json.loads((place / "c" / "metrics.json").read_bytes())
            assert metrics["train"] and metrics["eval"]["rows"][0]["n"] in (2, 4)
            assert "Measured" in (place / "c" / "README.md").read_text()
        else:
            assert (place / "page.md").read_bytes() in self.pages, "neither the old page nor the new one"

    def again(self, place: Path, variant: str) -> str:
        self._run(place, variant, 4)
        self.check(place, variant)
        assert _questions(place / "e.json") == 4
        require_listed(place, set(os.listdir(self.room / variant)))
        require_no_litter(place)
        return "measured"


def _command(module: str, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    out = io.StringIO()
    with redirect_stderr(out), redirect_stdout(io.StringIO()):
        code: int = import_module(f"kvcapsule.{module}").main(words)
    return code, out.getvalue()


def _questions(file: Path) -> Any:
    return json.loads(file.read_bytes())["rows"][0]["n"]
