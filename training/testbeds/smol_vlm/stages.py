"""smol-vlm's training as Lightning modules: visual tokens learn names, then to be read by the language model, which at
last learns too."""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .turns import IGNORE, TASKS, NameBatch, TurnBatch

_SHARPNESS = 20.0
"""What a cosine with a name is multiplied by, for a softmax over names."""


class Stage(L.LightningModule):
    """What of a VLM may learn, under AdamW with a warm-up and a cosine; checkpoints hold that alone."""

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float, warmup: int = 50) -> None:
        super().__init__()
        self.vlm = vlm
        self.steps, self.lr, self.warmup = steps, lr, warmup
        # What is frozen comes from the packages, not from a checkpoint.
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
    """The connector alone: each visual token comes to lie where the language model's embeddings have the name of what
    it shows.

    The language model does not run, which makes a step tens of times cheaper than one that reads; it then finds tokens
    that already mean something to it. The loss is a softmax of cosines with all names, and the squared error of the
    length.
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
        # Names share much of their direction; what tells them apart is what is left without their mean.
        centre = self.names_ND.mean(0)
        cosines = F.normalize(tokens - centre, dim=-1) @ F.normalize(self.names_ND - centre, dim=-1).T
        known = batch.names != IGNORE
        each = F.cross_entropy(_SHARPNESS * cosines[known], batch.names[known], reduction="none")
        shown = batch.names[known] > 0
        loss = 0.7 * each[shown].mean() + 0.3 * each[~shown].mean()
        length = (tokens.norm(dim=-1) / self.length - 1).square().mean()
        right = (cosines[known].argmax(-1) == batch.names[known]).float()
        self.log_dict(
            {"loss": loss, "length": length, "named": right[shown].mean(), "empty": right[~shown].mean()}, prog_bar=True
        )
        return loss + length


class ReadStage(Stage):
    """Answers to packed questions: the connector learns through the frozen language model, and with it a LoRA where
    there is one."""

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
        asked = batch.labels != IGNORE
        logits = self.vlm.lm_head(hidden[asked]).float()
        targets = batch.labels[asked]
        loss = F.cross_entropy(logits, targets)
        self.log("loss", loss, prog_bar=True)
        self._log_answers(logits.argmax(-1) == targets, batch.turns[asked], batch.tasks[asked])
        return loss

    def _log_answers(self, right: torch.Tensor, turns: torch.Tensor, tasks: torch.Tensor) -> None:
        """The share of answers whose tokens are all right, by task."""
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
