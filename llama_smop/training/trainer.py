"""transformers' Trainer with what the published recipe needs: its loss, log, checkpoints and progress bar."""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from llama_smop.data.training_plan import TrainingPlan
from llama_smop.models.rates import rate_text
from llama_smop.models.units import IGNORED_LABEL
from llama_smop.training import checkpoints, fsdp, weight_decay
from llama_smop.training.setbacks import Setbacks
from llama_smop.training.signals import StopRequest, ignore_first_signal

CONFIGURED = ("initial_lr", "weight_decay", "betas")  # settings of a parameter group that a checkpoint does not restore
LOSSES = ("lm_loss", "load_balancing_loss", "router_z_loss", "ctc_loss")


class SmopTrainer(Trainer):
    """Follows a `TrainingPlan`, logs the parts of the loss and the expert load, writes checkpoints atomically, skips
    steps whose loss or gradient is not finite, and stops on a signal (`stop`).

    The gradient of a step is that of one joint batch: the micro-batches of all processes (`accumulate` of each). The
    language model's loss is the mean over its text tokens, the CTC loss the mean over its clips. An auxiliary loss
    compares the tokens of one micro-batch, so a step takes the mean of the auxiliary losses of its micro-batches. With
    the projector's `global_aux_losses`, the micro-batches that the processes compute at the same time count as one.
    """

    def __init__(self, *args, plan: TrainingPlan, setbacks: Setbacks, stop: StopRequest | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.plan, self.setbacks, self.stop = plan, setbacks, stop or StopRequest()
        self.ctc_weight = self.model.config.ctc_weight
        self.model_accepts_loss_kwargs = False  # compute_loss weights by tokens itself
        self._mean_counts: torch.Tensor | None = None  # (2,) mean text tokens and clips of this step's micro-batches
        self._sums: dict[str, torch.Tensor] = defaultdict(float)
        self._batches: dict[str, torch.Tensor] = defaultdict(float)
        self._finite = True

    def create_accelerator_and_postprocess(self):
        if self.args.fsdp:
            fsdp.plan(self.args, self.model)
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            fsdp.enable_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(  # accelerate must not shard it: the plan is this process's own
            self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_first_signal,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return weight_decay.decayed_names(model)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        optimizer.register_load_state_dict_pre_hook(lambda _, state: weight_decay.regrouped(state, self.model))
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            own = torch.stack([_counts(batch["labels"]) for batch in batches]).mean(0)
            self._mean_counts = self.accelerator.reduce(own.to(device), "mean")
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.setbacks.record_clips(inputs.pop("bad_clips", {}))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite = self._finite and bool(loss.isfinite())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # accelerate does not autocast with FSDP2
            outputs = model(**inputs)
        if model.training:  # the Trainer and DDP average over micro-batches and processes
            tokens, clips = _counts(inputs["labels"]) / self._mean_counts
            outputs.loss = outputs.loss + (tokens - 1) * outputs.lm_loss
            outputs.lm_loss = tokens * outputs.lm_loss
            if outputs.ctc_loss is not None:
                outputs.loss = outputs.loss + (clips - 1) * self.ctc_weight * outputs.ctc_loss
                outputs.ctc_loss = clips * outputs.ctc_loss
        for name in LOSSES:
            if name in outputs:
                self._add(name, outputs[name])
        if "rate" in inputs:
            self._add(f"lm_loss/{rate_text(inputs['rate'])}", outputs.lm_loss)
        if outputs.expert_counts is not None:
            self._add("expert_counts", outputs.expert_counts)
        if outputs.router_entropy is not None:
            for modality, entropy in zip(self.model.config.modalities, outputs.router_entropy, strict=True):
                self._add(f"router_entropy/{modality}", entropy)  # NaN where the batch lacks that modality: not counted
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _clip_grad_norm(self, model):
        """Clip the gradient, or drop it if it or the loss of any process is not finite.

        The same reduction tells every process whether one of them has received a signal to stop.
        """
        norm = super()._clip_grad_norm(model)
        own = (not (self._finite and math.isfinite(norm)), self.stop.received is not None)
        bad, stop = self.accelerator.reduce(
            torch.tensor(own, dtype=torch.float, device=self.args.device), "sum"
        ).tolist()
        finite, self._finite, self.stop.agreed = not bad, True, stop > 0
        if not finite:
            model.zero_grad()
            norm = torch.zeros(())
        self.setbacks.record_step(self.state.global_step + 1, finite)
        return norm

    def _add(self, name: str, value: torch.Tensor) -> None:
        value, finite = value.detach(), value.detach().isfinite().all()  # no host synchronisation before the log
        self._sums[name] = self._sums[name] + torch.where(finite, value, 0)
        self._batches[name] = self._batches[name] + finite.float()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        for name, total, batches in self._totals():
            if name == "expert_counts":
                load = (total / total.sum().clamp(min=1)).tolist()
                logs |= {f"expert_load/{e}": round(share, 4) for e, share in enumerate(load)}
            elif batches:
                logs[name] = round((total.sum() / batches).item(), 7)
        if self.accelerator.num_processes > 1:
            for clips in gather_object([self.setbacks.bad_clips]):
                self.setbacks.record_clips(clips)
        if self.setbacks.skipped_steps:
            logs["skipped_steps"] = self.setbacks.skipped_steps
        self._sums.clear()
        self._batches.clear()
        super().log(logs, *args, **kwargs)

    def _totals(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, sum, number of batches) of the logged values over all processes, in one reduction."""
        names = sorted(self._sums)
        if not names:
            return
        own = [torch.cat([self._sums[name].flatten(), self._batches[name].flatten()]).double() for name in names]
        joint = self.accelerator.reduce(torch.cat(own), "sum")
        for name, values in zip(names, joint.split([len(part) for part in own]), strict=True):
            yield name, values[:-1], values[-1]

    def _save_checkpoint(self, model, trial) -> None:
        with checkpoints.atomic_save(self) as staging:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                self.setbacks.save(staging / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        weights = self.whole_weights()
        if self.args.should_save:
            self._save(output_dir, weights)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The gathered weights of a sharded model, else None. Every process must call it."""
        return fsdp.whole_weights(self.model) if self.is_fsdp_enabled else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = fsdp.gather(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        fsdp.load_weights(model, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        configured = [{name: group[name] for name in CONFIGURED} for group in self.optimizer.param_groups]
        if self.is_fsdp_enabled:
            fsdp.load_optimizer(self.optimizer, self.model, Path(checkpoint) / OPTIMIZER_NAME)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        # The configuration may have changed since the checkpoint was written; its present values apply.
        schedule = self.lr_scheduler
        schedule.base_lrs = [settings["initial_lr"] for settings in configured]
        rules = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * rule(schedule.last_epoch) for base, rule in rules]
        for group, settings, lr in zip(self.optimizer.param_groups, configured, schedule._last_lr, strict=True):
            group |= settings | {"lr": lr}


def _counts(labels: torch.Tensor) -> torch.Tensor:
    """(2,) float32: predicted text tokens and clips of labels (B, L)."""
    tokens = (labels[:, 1:] != IGNORED_LABEL).sum().float()
    return torch.stack([tokens, tokens.new_full((), len(labels))])


class LogAndSaveSteps(TrainerCallback):
    """Takes the logging and saving intervals from the configuration, not from the checkpoint that is resumed.

    A step that saves a checkpoint also logs. So no row of the log is a mean over steps on both sides of a checkpoint,
    and a resumed run logs the same rows as an uninterrupted one.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            control.should_log = True


class LossBar(ProgressCallback):
    """The Trainer's progress bar, which shows the newest losses instead of printing a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {
                name.removesuffix("_loss"): f"{logs[name]:.3g}" for name in ("lm_loss", "ctc_loss") if name in logs
            }
            if shown:
                self.training_bar.set_description("train")
                self.training_bar.set_postfix(shown)
