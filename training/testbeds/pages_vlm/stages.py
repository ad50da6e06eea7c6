"""Two training stages of pages-vlm as Lightning modules: the vision tower classifies patches, then the full model
answers questions."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from kvcapsule.testbeds.pages import LINES, MAX_DIGITS, WORDS

from .data import IGNORE, SYMBOLS, TASK_WEIGHT, PatchBatch, TurnBatch


class Stage(L.LightningModule):
    """Base of both stages: trains a VLM by AdamW with warm-up and cosine schedule."""

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
    """Stage 1: linear heads, discarded afterwards, predict each patch's symbol, line, column and the line's word."""

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
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            loss = loss + 0.5 * losses[shown].mean() + 0.5 * losses[~shown].mean()
            self.log(f"{name}", (logits[shown].argmax(-1) == target[shown]).float().mean(), prog_bar=True)
        self.log("loss", loss, prog_bar=True)
        return loss


class ReaderStage(Stage):
    """Stage 2: the full model answers packed questions; the vision tower has a fraction of the learning rate.

    Two auxiliary losses speed this up (training/NOTES.md). At each visual token the language part predicts the symbol
    shown there, so that attention learns to copy it long before the questions alone would teach it. And at every token
    of an answer a head at half depth, discarded afterwards, predicts the question's key, so that symbols read so far
    can be compared with it.
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
        answered = targets != IGNORE
        logits = self.vlm.lm_head(hidden[:, :-1][answered])
        losses = F.cross_entropy(logits, targets[answered], reduction="none")
        weights = batch.weights[:, 1:][answered]
        loss = (losses * weights).sum() / weights.sum()
        shown = batch.names != IGNORE
        named = self.vlm.lm_head(hidden[:, 1 : 1 + shown.shape[1]][shown])
        naming = F.cross_entropy(named, batch.names[shown])
        sought = batch.keys != IGNORE
        keyed = self.key_head(read.hidden_states[self.halfway][sought])
        # Answers of a look-up are shorter than those of a count; the weights compensate.
        share = batch.weights[sought] ** 2
        keys = (F.cross_entropy(keyed, batch.keys[sought], reduction="none") * share).sum() / share.sum()
        right = (logits.argmax(-1) == targets[answered]).float()
        self.log("loss", loss, prog_bar=True)
        self.log("naming", naming, prog_bar=True)
        self.log("keys", keys, prog_bar=True)
        for name, weight in TASK_WEIGHT.items():
            self.log(name, right[weights == weight].mean(), prog_bar=True)
        return loss + self.naming * naming + self.keys * keys
