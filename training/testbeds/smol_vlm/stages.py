"""Training stages of smol-vlm as Lightning modules: the connector learns names of visual tokens, then answers through
the frozen language model, at last together with a LoRA."""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .turns import IGNORE, TASKS, NameBatch, TurnBatch

_SHARPNESS = 20.0
"""Inverse temperature of the softmax over cosines with names."""


class Stage(L.LightningModule):
    """Base of the stages: trains a VLM's unfrozen parameters by AdamW with warm-up and cosine schedule; checkpoints
    hold these parameters alone."""

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float, warmup: int = 50) -> None:
        super().__init__()
        self.vlm = vlm
        self.steps, self.lr, self.warmup = steps, lr, warmup
        # Frozen parameters come from the packages, not from a checkpoint.
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in learning
        }

    def configure_optimizers(self) -> dict[str, object]:
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01)

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / self.warmup
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class NameStage(Stage):
    """Naming stage: trains the connector to map each visual token close to the language model's embedding of the name
    of the object shown.

    The language model does not run, which makes a step tens of times cheaper than in the later stages, and these then
    begin with meaningful tokens. The loss is the cross-entropy of a softmax over cosines with all names, plus the
    squared error of the token's length.
    """

    def __init__(
        self,
        vlm: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        names: tuple[str, ...],
        steps: int,
        lr: float = 2e-3,
    ) -> None:
        super().__init__(vlm, steps, lr)
        table = vlm.get_input_embeddings().weight.detach().float()
        rows = [table[tokenizer.encode(f" {name}", add_special_tokens=False)].mean(0) for name in names]
        self.length = float(table.norm(dim=-1).mean())
        self.register_buffer("names_ND", torch.stack(rows), persistent=False)
        vlm.requires_grad_(False)
        vlm.model.multi_modal_projector.requires_grad_(True)

    def training_step(self, batch: NameBatch, _: int) -> torch.Tensor:
        tokens = torch.stack(self.vlm.get_image_features(batch.pixel_values).pooler_output).float()
        # Name embeddings have a large common component, so cosines are taken without their mean.
        centre = self.names_ND.mean(0)
        cosines = F.normalize(tokens - centre, dim=-1) @ F.normalize(self.names_ND - centre, dim=-1).T
        known = batch.names != IGNORE
        losses = F.cross_entropy(_SHARPNESS * cosines[known], batch.names[known], reduction="none")
        shown = batch.names[known] > 0
        loss = 0.7 * losses[shown].mean() + 0.3 * losses[~shown].mean()
        length = (tokens.norm(dim=-1) / self.length - 1).square().mean()
        right = (cosines[known].argmax(-1) == batch.names[known]).float()
        self.log_dict(
            {"loss": loss, "length": length, "named": right[shown].mean(), "empty": right[~shown].mean()}, prog_bar=True
        )
        return loss + length


class ReadStage(Stage):
    """Answering stage: trains the connector, and the LoRA if there is one, on answers to packed questions."""

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float) -> None:
        super().__init__(vlm, steps, lr)
        for name, p in vlm.named_parameters():
            p.requires_grad_("multi_modal_projector" in name or "lora_" in name)

    def training_step(self, batch: TurnBatch, _: int) -> torch.Tensor:
        mask = batch.attention_mask
        if self.vlm.config.text_config._attn_implementation == "eager":
            dtype = self.vlm.get_input_embeddings().weight.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        hidden = self.vlm.model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        answered = batch.labels != IGNORE
        logits = self.vlm.lm_head(hidden[answered]).float()
        targets = batch.labels[answered]
        loss = F.cross_entropy(logits, targets)
        self.log("loss", loss, prog_bar=True)
        self._log_answers(logits.argmax(-1) == targets, batch.turns[answered], batch.tasks[answered])
        return loss

    def _log_answers(self, right: torch.Tensor, turns: torch.Tensor, tasks: torch.Tensor) -> None:
        """Log the share of answers whose tokens are all correct, by task."""
        for place, task in enumerate(TASKS):
            of_task = tasks == place
            if of_task.any():
                numbers, index = turns[of_task].unique(return_inverse=True)
                wrong = torch.zeros(len(numbers)).index_add_(0, index, (~right[of_task]).float().cpu())
                self.log(
                    task,
                    (wrong == 0).float().mean(),
                    prog_bar=False,
                    batch_size=len(numbers),
                    on_step=False,
                    on_epoch=True,
                )
