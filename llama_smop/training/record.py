"""What a training writes down about itself, from its start on, so that one that is killed can be read too."""

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

from llama_smop import files, provenance
from llama_smop.models.seal import SEAL
from llama_smop.reports.training import write_run_report
from llama_smop.training.config import TrainConfig
from llama_smop.training.lock import LOCK

logger = logging.getLogger(__name__)

STARTS = "starts.json"
NOTED = {"run", "processes", "data_workers"}  # of every start: what later ones ask for
WRITTEN = ("config.json", "metrics.json", "bad_clips.json", "report.html", "checkpoints", "model")


def check_places(config: TrainConfig) -> None:
    """Raises ValueError: a place to report to that is not installed."""
    if "wandb" in config.run.report_to and not is_wandb_available():
        raise ValueError("run.report_to names wandb, which is not installed: pip install wandb, or leave it out there")


def last_start(out: Path) -> dict | None:
    """What was noted of a run's last start."""
    starts = read_starts(out)
    return starts[-1] if starts else None


def read_starts(out: Path) -> list[dict]:
    """The record of a run's starts; a damaged one is set aside."""
    return files.read_record(
        out / STARTS, [], lambda starts: all(isinstance(start, dict) and start.keys() >= NOTED for start in starts)
    )


def claim(out: Path) -> None:
    """Raises FileExistsError: the folder is no training's, and holds what one would write over."""
    if (out / LOCK).exists() or (out / STARTS).exists() or any(out.glob(f"checkpoints/checkpoint-*/{SEAL}")):
        return
    found = [name for name in WRITTEN if (out / name).exists()]
    if found:
        raise FileExistsError(
            f"{out}: is not the folder of a training, and holds {', '.join(found)}, which one would write over; name a "
            "new or empty folder"
        )


class RunFolder(TrainerCallback):
    """Keeps the folder of a training; the first process alone writes.

    config.json: the whole setting, defaults too. starts.json: a record of each start, the first and those after
    interruptions: when, at which step, by which command, on what machine, with what versions and which commit of the
    code. metrics.json: the log so far.
    """

    def __init__(self, out: Path, config: TrainConfig, writes: bool):
        self.out, self.config, self.writes = out, config, writes
        self.wandb = "wandb" in config.run.report_to

    def begin(self, checkpoint: str | Path | None, processes: int, steps: int, fresh: bool) -> None:
        """Note a start of a training of so many steps in all, going on from `checkpoint` if there is one; `fresh`: what
        was noted before is forgotten."""
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
                "%s goes on with %d processes of %d data workers, before it had %d of %d: the rest of this epoch is "
                "shared out anew, and a clip may come twice in it or not at all",
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
        """One run there for all starts here; the Trainer's callback logs to the run that is open."""
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
        """After the model is saved: the whole log and the report."""
        if not self.writes:
            return
        files.write_json(self.out / "metrics.json", log)
        if self.wandb:
            import wandb

            wandb.finish()
        write_run_report(self.out)
