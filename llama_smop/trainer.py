"""What the published recipe adds to transformers' Trainer: the training step, the log, and the bar."""

import math
from collections import defaultdict

import torch
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer

from llama_smop import checkpoint
from llama_smop.data.plan import TrainingPlan
from llama_smop.setbacks import Setbacks

LOSSES = ("lm_loss", "load_balancing_loss", "router_z_loss", "ctc_loss")


class SmopTrainer(Trainer):
    """Draws by a `TrainingPlan`, logs the parts of the loss and the experts' load, writes checkpoints aside, skips
    steps whose loss or gradient is not finite.

    On several processes the gradient is that of one process with their batches joined: the language model's loss is
    the mean over all tokens of the joint batch. The auxiliary losses are means over the processes.
    """

    def __init__(self, *args, plan: TrainingPlan, setbacks: Setbacks, **kwargs):
        super().__init__(*args, **kwargs)
        self.plan, self.setbacks = plan, setbacks
        self._sums: dict[str, torch.Tensor] = defaultdict(float)
        self._batches: dict[str, torch.Tensor] = defaultdict(float)
        self._finite = True

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(  # not prepared by accelerate: the plan is this process's own already
            self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.setbacks.clips(inputs.pop("bad_clips", {}))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite = self._finite and bool(loss.isfinite())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if self.accelerator.num_processes > 1:
            weight = self._token_share(inputs["labels"])
            outputs.loss = outputs.loss + (weight - 1) * outputs.lm_loss
            outputs.lm_loss = weight * outputs.lm_loss
        for name in LOSSES:
            if name in outputs:
                self._add(name, outputs[name])
        if outputs.expert_counts is not None:
            self._add("expert_counts", outputs.expert_counts)
        if outputs.router_entropy is not None:
            for modality, entropy in zip(("audio", "video"), outputs.router_entropy, strict=True):
                self._add(f"router_entropy/{modality}", entropy)  # a batch without that modality is not counted
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _token_share(self, labels: torch.Tensor) -> torch.Tensor:
        """Text tokens of this process's batch, by their mean over the processes."""
        tokens = (labels[:, 1:] != -100).sum().float()
        return tokens / self.accelerator.reduce(tokens, "mean")

    def _clip_grad_norm(self, model):
        """Where the loss of any process or the common gradient is not finite, there is then no gradient to apply."""
        norm = super()._clip_grad_norm(model)
        bad = torch.tensor(float(not (self._finite and math.isfinite(norm))), device=self.args.device)
        finite, self._finite = not self.accelerator.reduce(bad, "sum"), True
        if not finite:
            model.zero_grad()
            norm = torch.zeros(())
        self.setbacks.step(self.state.global_step + 1, finite)
        return norm

    def _add(self, name: str, value: torch.Tensor) -> None:
        value, finite = value.detach(), value.detach().isfinite().all()  # stay on the device until they are logged
        self._sums[name] = self._sums[name] + torch.where(finite, value, 0)
        self._batches[name] = self._batches[name] + finite.float()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        for name in sorted(self._sums):
            total, batches = (self.accelerator.reduce(s[name], "sum") for s in (self._sums, self._batches))
            if name == "expert_counts":
                load = (total / total.sum().clamp(min=1)).tolist()
                logs |= {f"expert_load/{e}": round(share, 4) for e, share in enumerate(load)}
            elif batches:
                logs[name] = round((total / batches).item(), 5)
        if self.setbacks.skipped_steps:
            logs["skipped_steps"] = self.setbacks.skipped_steps
        self._sums.clear()
        self._batches.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        with checkpoint.publishing(self):
            super()._save_checkpoint(model, trial)


class LossBar(ProgressCallback):
    """The Trainer's bar with the newest losses behind it, in place of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {
                name.removesuffix("_loss"): f"{logs[name]:.3g}" for name in ("lm_loss", "ctc_loss") if name in logs
            }
            if shown:
                self.training_bar.set_description("train")
                self.training_bar.set_postfix(shown)
