"""The training recipe: it builds model, data and Trainer from a configuration, trains, and saves the model.

The engine is transformers' Trainer; `SmopTrainer` adds what the published recipe needs.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from llama_smop.models import model_folder
from llama_smop.models.lm_loss import check_fused_loss
from llama_smop.models.pretrained import put_special_token_rows
from llama_smop.models.seal import check_target
from llama_smop.system.lock import folder_lock
from llama_smop.training import build, checkpoints, fsdp
from llama_smop.training.averaging import average, newest
from llama_smop.training.config import TrainConfig
from llama_smop.training.record import RunFolder, check_report_targets, check_run_folder
from llama_smop.training.resume import check_shared, starting_point
from llama_smop.training.setbacks import ReplacedClips, Setbacks
from llama_smop.training.signals import StopRequest
from llama_smop.training.summary import training_facts
from llama_smop.training.trainer import LogAndSaveSteps, LossBar, SmopTrainer

logger = logging.getLogger(__name__)


def train(config: TrainConfig, out: str | Path, resume: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Run a training and return the folder of its model, `out/model`.

    `out/checkpoints` holds the training's checkpoints; with `resume` an interrupted training resumes at the newest
    whole one. `out/metrics.json` is the log: losses, expert load and learning rate by step; `out/report.html` shows it.
    Clips that could not be read are in `out/bad_clips.json`. `RunFolder` lists the records of settings and origin.

    Raises:
        ValueError, MediaError: a corpus or a label that cannot be used, or too many unusable clips, by name; a loss or
            a logging target that is not available here; another training runs in `out`.
        OSError: `out` or `out/model` holds something else, which would be overwritten, or cannot be written.
        RuntimeError: `run.max_bad_steps` steps in a row without a finite loss.
        Stopped: SIGTERM or SIGHUP arrived; a checkpoint of the last step is written.
    """
    out = Path(out)
    check_report_targets(config)
    args = training_arguments(config, out / "checkpoints")
    _check_devices(config, args)
    with _run_folder(out, args):
        check_shared(out, args)
        set_seed(config.run.seed)
        clips = build.training_clips(config, args.world_size)
        model, processor = build.build_model(config, clips.source.texts)
        plan = build.training_plan(config, clips.source, args.process_index, args.world_size)
        steps = len(plan) // config.optimizer.accumulate

        folder = RunFolder(out, config, writes=args.process_index == 0)
        record = out / "bad_clips.json" if args.process_index == 0 else None
        setbacks = Setbacks(record, config.data.max_bad_clips, config.run.max_bad_steps)
        stop = StopRequest()
        trainer = SmopTrainer(
            model=model,
            args=args,
            train_dataset=ReplacedClips(clips, config.data.max_bad_clips, processor.unfit),
            processing_class=processor,
            data_collator=build.Collator(processor),
            callbacks=[*callbacks, folder, stop],
            plan=plan,
            setbacks=setbacks,
            stop=stop,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar)
        trainer.add_callback(LogAndSaveSteps)

        checkpoint = starting_point(out, config, resume, args, steps)
        if checkpoint is not None and model.config.sources:
            put_special_token_rows(model, checkpoint)  # they are frozen, so the Trainer does not load them
        folder.begin(checkpoint, args.world_size, steps, fresh=not resume)
        setbacks.restore(checkpoint, fresh=not resume)
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
            stop.check(trainer.state)
            _save_model(trainer, processor, out, config.run.average_last)
            folder.end(trainer.state.log_history)
    return out / "model"


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """What transformers' Trainer takes; `out`: the folder of the checkpoints."""
    optimizer, run = config.optimizer, config.run
    steps = optimizer.steps
    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=1,  # the plan is one pass over all the steps
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=optimizer.warmup,  # below 1: a share of the steps
        gradient_accumulation_steps=optimizer.accumulate,
        gradient_checkpointing=optimizer.gradient_checkpointing,
        bf16=optimizer.precision == "bf16",
        max_steps=-1 if steps is None else steps,
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=run.log_every,
        save_steps=run.save_every,
        save_total_limit=run.keep,
        report_to=list(run.report_to),
        run_name=run.name,
        remove_unused_columns=False,
        dataloader_num_workers=config.data.workers,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=False,
        ddp_find_unused_parameters=True,  # a batch of one modality does not use the other modality's tower
        **(fsdp.settings() if run.strategy == "fsdp2" else {}),
    )


def _check_devices(config: TrainConfig, args: TrainingArguments) -> None:
    """Raises ValueError: a strategy or a fused loss that does not work on these devices."""
    if args.n_gpu > 1:  # the Trainer would use DataParallel, which splits `target_positions` wrongly
        logger.warning("%d GPUs are visible and one is used: start with torchrun to train on all of them", args.n_gpu)
        args._n_gpu = 1
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("run.strategy fsdp2 shards over processes: start it with torchrun, or use ddp")
    check_fused_loss(config.optimizer.fused_loss, args.device)


@contextmanager
def _run_folder(out: Path, args: TrainingArguments) -> Iterator[None]:
    """While open, the first process holds the lock of the run's folder; errors as in `train`."""
    if args.process_index != 0:
        yield
        return
    check_run_folder(out)
    check_target(out / "model")
    with folder_lock(out, "another training"):
        checkpoints.discard_unfinished(out)
        yield


def _save_model(trainer: SmopTrainer, processor, out: Path, average_last: int) -> None:
    """Write `out/model`: the weights as they are, or the mean of the last checkpoints. Every process takes part."""
    weights = trainer.whole_weights() if average_last == 1 else None
    if not trainer.is_world_process_zero():
        return
    if average_last > 1:
        average(newest(out, average_last), out / "model", out)
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model_folder.save(model, processor, out / "model", weights, training_facts(out))
