"""The records of a run: settings, starts, log and report.

They are written from the start on, so that a killed run has them too.
"""

import datetime
import logging
import os
import platform
import shlex
import sys
import uuid
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import is_wandb_available

from llama_smop.models.seal import SEAL
from llama_smop.reports.training import write_run_report
from llama_smop.system import files, provenance
from llama_smop.system.lock import LOCK
from llama_smop.training.config import TrainConfig

logger = logging.getLogger(__name__)

STARTS = "starts.json"
START_FIELDS = {"run", "processes", "data_workers"}  # what a resumed run reads of earlier starts
RUN_FILES = ("config.json", "metrics.json", "bad_clips.json", "report.html", "checkpoints", "model")


def check_report_targets(config: TrainConfig) -> None:
    """Raises ValueError: `run.report_to` names something that is not installed."""
    if "wandb" in config.run.report_to and not is_wandb_available():
        raise ValueError("run.report_to names wandb, which is not installed: pip install wandb, or remove it")


def last_start(out: Path) -> dict | None:
    """The record of a run's last start; None before the first."""
    starts = read_starts(out)
    return starts[-1] if starts else None


def read_starts(out: Path) -> list[dict]:
    """The records of a run's starts; a damaged file is renamed and counts as empty."""
    return files.read_record(
        out / STARTS,
        [],
        lambda starts: all(isinstance(start, dict) and start.keys() >= START_FIELDS for start in starts),
    )


def check_run_folder(out: Path) -> None:
    """Raises FileExistsError: the folder is not a training's, and holds files that a training would overwrite."""
    if (out / LOCK).exists() or (out / STARTS).exists() or any(out.glob(f"checkpoints/checkpoint-*/{SEAL}")):
        return
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found:
        raise FileExistsError(
            f"{out}: is not the folder of a training, and holds {', '.join(found)}, which a training would overwrite; "
            "name a new or empty folder"
        )


class RunFolder(TrainerCallback):
    """Writes the records of a run into its folder; only rank 0 `writes`.

    config.json: the whole configuration with its defaults. starts.json: one record for each start, resumed ones too:
    time, step, command, machine, versions and commit of the code. metrics.json: the log so far.
    """

    def __init__(self, out: Path, config: TrainConfig, writes: bool):
        self.out, self.config, self.writes = out, config, writes
        self.wandb = "wandb" in config.run.report_to

    def begin(self, checkpoint: str | Path | None, processes: int, steps: int, fresh: bool) -> None:
        """Record a start of a training of `steps` steps, resumed at `checkpoint` if there is one. `fresh`: delete the
        earlier records."""
        if not self.writes:
            return
        if fresh:
            for name in ("metrics.json", "evaluation.json", "report.html"):
                files.remove(self.out / name)
        starts = [] if fresh else read_starts(self.out)
        drawing = {"processes": processes, "data_workers": self.config.data.workers}
        before = {name: starts[-1][name] for name in drawing} if starts else drawing
        if checkpoint is not None and drawing != before:
            logger.warning(
                "%s resumes with %d processes of %d data workers, before it had %d of %d: the rest of this epoch is "
                "distributed anew, so a clip may come twice in it or not at all",
                *(self.out, *drawing.values(), *before.values()),
            )
        starts.append(
            {
                "run": starts[0]["run"] if starts else uuid.uuid4().hex,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "from_step": 0 if checkpoint is None else int(Path(checkpoint).name.split("-")[1]),
                "steps": steps,
                "epochs": self.config.optimizer.epochs,
                "command": shlex.join(sys.argv),
                **drawing,
                "host": platform.node(),
                "machine": provenance.machine(),
                "versions": {"python": platform.python_version()} | provenance.versions(),
                **provenance.commit(),
            }
        )
        files.write_text(self.out / "config.json", self.config.model_dump_json(indent=2) + "\n")
        files.write_json(self.out / STARTS, starts)
        if self.wandb:
            self._begin_wandb(starts[0]["run"])

    def _begin_wandb(self, run: str) -> None:
        """Open one wandb run for all starts of this run; the Trainer's own callback logs to the open run."""
        import wandb

        wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llama-smop"),
            name=self.config.run.name or self.out.name,
            id=run,
            resume="allow",
            dir=str(self.out),
        )

    def on_log(self, args, state, control, **kwargs) -> None:
        if self.writes:
            files.write_json(self.out / "metrics.json", state.log_history)

    def end(self, log: list[dict]) -> None:
        """Write the whole log and the report, after the model is saved."""
        if not self.writes:
            return
        files.write_json(self.out / "metrics.json", log)
        if self.wandb:
            import wandb

            wandb.finish()
        write_run_report(self.out)
