"""The two stages of pages-vlm as Lightning modules: the vision tower learns what each patch shows, then the whole model
answers."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from kvcapsule.testbeds.pages import LINES, MAX_DIGITS, WORDS

from .data import IGNORE, SYMBOLS, TASK_WEIGHT, PatchBatch, TurnBatch


class Stage(L.LightningModule):
    """A VLM under AdamW with a warm-up and a cosine."""

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float, warmup: int = 100) -> None:
        super().__init__()
        self.vlm = vlm
        self.steps, self.lr, self.warmup = steps, lr, warmup

    def groups(self) -> list[dict[str, object]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.groups(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0.02)

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / self.warmup
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PatchStage(Stage):
    """Stage 1: every patch names its symbol, line, column and the word of its line, through linear heads that are
    thrown away."""

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float = 2e-3) -> None:
        super().__init__(vlm, steps, lr)
        width = vlm.config.vision_config.hidden_size
        self.norm = nn.LayerNorm(width)
        sizes = (len(SYMBOLS), LINES[1] + 1, MAX_DIGITS + 2, 1 + 10 + len(WORDS))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        vlm.model.language_model.requires_grad_(False)
        vlm.model.multi_modal_projector.requires_grad_(False)

    def training_step(self, batch: PatchBatch, _: int) -> torch.Tensor:
        tower = self.vlm.model.vision_tower(batch.pixel_values, output_hidden_states=True)
        features = self.norm(tower.hidden_states[-1])
        loss = features.new_zeros(())
        shown = batch.labels[..., 0] > 0
        for name, head, target in zip(
            ("symbol", "line", "column", "word"), self.heads, batch.labels.unbind(-1), strict=True
        ):
            logits = head(features)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            loss = loss + 0.5 * each[shown].mean() + 0.5 * each[~shown].mean()
            self.log(f"{name}", (logits[shown].argmax(-1) == target[shown]).float().mean(), prog_bar=True)
        self.log("loss", loss, prog_bar=True)
        return loss


class ReaderStage(Stage):
    """Stage 2: the whole model answers packed questions; the vision tower learns at a fraction of the rate.

    Beside the answers, the language part names the symbol that each visual token shows: attention then finds tokens
    worth copying, long before the questions alone would have taught it so. And half way up, through a head that is
    thrown away, it names at every token of an answer what the question looks for: what has just been read can then be
    compared with it (training/NOTES.md).
    """

    def __init__(
        self,
        vlm: LlavaForConditionalGeneration,
        steps: int,
        lr: float = 1.5e-3,
        vision_lr: float = 0.5,
        naming: float = 0.5,
        keys: float = 0.5,
    ) -> None:
        super().__init__(vlm, steps, lr)
        self.vision_lr, self.naming, self.keys = vision_lr, naming, keys
        text = vlm.config.text_config
        self.halfway = text.num_hidden_layers // 2
        self.key_head = nn.Sequential(nn.LayerNorm(text.hidden_size), nn.Linear(text.hidden_size, text.vocab_size))
        vlm.requires_grad_(True)

    def groups(self) -> list[dict[str, object]]:
        tower = list(self.vlm.model.vision_tower.parameters())
        known = {id(p) for p in tower}
        rest = [p for p in self.parameters() if id(p) not in known]
        return [{"params": rest}, {"params": tower, "lr": self.lr * self.vision_lr}]

    def training_step(self, batch: TurnBatch, _: int) -> torch.Tensor:
        read = self.vlm.model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        hidden = read.last_hidden_state
        targets = batch.labels[:, 1:]
        asked = targets != IGNORE
        logits = self.vlm.lm_head(hidden[:, :-1][asked])
        each = F.cross_entropy(logits, targets[asked], reduction="none")
        weights = batch.weights[:, 1:][asked]
        loss = (each * weights).sum() / weights.sum()
        shown = batch.names != IGNORE
        named = self.vlm.lm_head(hidden[:, 1 : 1 + shown.shape[1]][shown])
        naming = F.cross_entropy(named, batch.names[shown])
        sought = batch.keys != IGNORE
        keyed = self.key_head(read.hidden_states[self.halfway][sought])
        # Answers of a look-up are shorter than those of a count, and are not to count for less.
        share = batch.weights[sought] ** 2
        keys = (F.cross_entropy(keyed, batch.keys[sought], reduction="none") * share).sum() / share.sum()
        right = (logits.argmax(-1) == targets[asked]).float()
        self.log("loss", loss, prog_bar=True)
        self.log("naming", naming, prog_bar=True)
        self.log("keys", keys, prog_bar=True)
        for name, weight in TASK_WEIGHT.items():
            self.log(name, right[weights == weight].mean(), prog_bar=True)
        return loss + self.naming * naming + self.keys * keys
