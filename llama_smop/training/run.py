"""Training on transformers' Trainer: what the published recipe adds to it, and nothing of an engine of our own."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from llama_smop.models import model_folder
from llama_smop.models.lm_loss import check_fused_loss
from llama_smop.models.pretrained import put_special_token_rows
from llama_smop.models.seal import check_target
from llama_smop.training import checkpoints, fsdp
from llama_smop.training.averaging import average, newest
from llama_smop.training.build import Collator, build, compile_regions, training_clips, training_plan
from llama_smop.training.config import TrainConfig
from llama_smop.training.lock import alone
from llama_smop.training.record import RunFolder, check_places, claim
from llama_smop.training.resume import check_shared, starting_point
from llama_smop.training.setbacks import ReplacedClips, Setbacks
from llama_smop.training.signals import StopRequest
from llama_smop.training.trainer import LossBar, Rhythm, SmopTrainer

logger = logging.getLogger(__name__)


def train(config: TrainConfig, out: str | Path, resume: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Run a training and return the folder of its model, `out/model`.

    `out/checkpoints` holds what a run needs to go on after an interruption; with `resume` it does, at the step it had
    reached. `out/metrics.json` is the log: losses, expert load and learning rate by step; `out/report.html` shows it.
    Clips that could not be read are in `out/bad_clips.json`; setting and origin of the run as in `RunFolder`.

    Raises:
        ValueError, MediaError: a corpus or a label that cannot be used, or too many clips, by name; a loss or a place
            to report to that cannot be had here; another training in `out`.
        OSError: `out` or `out/model` holds something else, which would be written over, or cannot be written.
        RuntimeError: `run.max_bad_steps` steps in a row without a finite loss.
        Stopped: SIGTERM or SIGHUP came; a checkpoint of the last step is written.
    """
    out = Path(out)
    check_places(config)
    args = _arguments(config, out / "checkpoints")
    if args.n_gpu > 1:  # the Trainer would split every batch over them by threads, and its label positions with it
        logger.warning("%d GPUs are visible and one is used: start with torchrun to train on all of them", args.n_gpu)
        args._n_gpu = 1
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("run.strategy fsdp2 shards over processes: start it with torchrun, or take ddp")
    check_fused_loss(config.optimizer.fused_loss, args.device)
    with ExitStack() as held:
        if args.process_index == 0:
            claim(out)
            check_target(out / "model")
            held.enter_context(alone(out, "another training"))
            checkpoints.discard_unfinished(out)
        return _train(config, out, args, resume, callbacks)


def _train(
    config: TrainConfig, out: Path, args: TrainingArguments, resume: bool, callbacks: Sequence[TrainerCallback]
) -> Path:
    folder = RunFolder(out, config, writes=args.process_index == 0)
    check_shared(out, args)
    set_seed(config.run.seed)
    clips = training_clips(config, args.world_size)
    model, processor = build(config, clips.source.texts)
    if config.optimizer.global_aux_losses and config.model.projector.kind == "smop":
        model.multi_modal_projector.global_aux_losses = True
    if config.optimizer.compile:
        compile_regions(model)
    if args.fsdp:
        fsdp.plan(args, model)
    model.fused_loss = config.optimizer.fused_loss
    record = out / "bad_clips.json" if args.process_index == 0 else None
    stop = StopRequest()
    trainer = SmopTrainer(
        model=model,
        args=args,
        train_dataset=ReplacedClips(clips, config.data.max_bad_clips, processor.unfit),
        processing_class=processor,
        data_collator=Collator(processor),
        callbacks=[*callbacks, folder, stop],
        plan=training_plan(config, clips.source, args.process_index, args.world_size),
        setbacks=Setbacks(record, config.data.max_bad_clips, config.run.max_bad_steps),
        stop=stop,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.add_callback(Rhythm)
    steps = len(trainer.plan) // config.optimizer.accumulate
    start = starting_point(out, config, resume, args, steps)
    if start is not None and model.config.sources:
        put_special_token_rows(model, start)  # frozen, so not among the weights that the Trainer loads
    folder.begin(start, args.world_size, steps, fresh=not resume)
    trainer.setbacks.begin(start, fresh=not resume)
    with stop:
        trainer.train(resume_from_checkpoint=start)
        stop.check(trainer.state)
        weights = trainer.whole_weights() if config.run.average_last == 1 else None
        if trainer.is_world_process_zero():
            if config.run.average_last > 1:
                average(newest(out, config.run.average_last), out / "model")
            else:
                model_folder.save(trainer.accelerator.unwrap_model(trainer.model), processor, out / "model", weights)
        folder.end(trainer.state.log_history)
    return out / "model"


def _arguments(config: TrainConfig, out: Path) -> TrainingArguments:
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
        ddp_find_unused_parameters=True,  # a batch of one modality leaves the other's tower out
        **(fsdp.settings() if run.strategy == "fsdp2" else {}),
    )
