"""What a model's card says about its training, from the records of the run's folder."""

from pathlib import Path

from llama_smop.system import files
from llama_smop.training.config import TrainConfig
from llama_smop.training.record import last_start


def training_facts(out: Path, averaged: int = 1) -> dict:
    """Facts by name for `card_records.write_training`; those that the records do not hold are left out.

    averaged: number of checkpoints whose mean the model is. Of paths only the last part is told: cards are public.
    """
    start, file = last_start(out), out / "config.json"
    if start is None or not file.is_file():
        return {}
    try:
        config = TrainConfig.model_validate(files.read_json(file))
    except ValueError:  # a run of another version
        return {}
    data, optimizer, versions = config.data, config.optimizer, start.get("versions") or {}
    log = files.read_record(out / "metrics.json", [])
    losses = [entry["loss"] for entry in log if isinstance(entry, dict) and "loss" in entry]
    steps = start.get("steps")
    machine = start.get("machine") or {}
    return {
        "name": config.run.name or out.resolve().name,
        "clips": data.shards.rstrip("/").rpartition("/")[2] if data.root is None else f"{data.root.name}, {data.train}",
        "steps": steps,
        "last loss": losses[-1] if losses else None,
        "mean of checkpoints": averaged if averaged > 1 else None,
        "seed": config.run.seed,
        "precision": optimizer.precision,
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "batch": f"at most {data.max_frames * optimizer.accumulate * start['processes']} video frames a step",
        "noise": _noise(config),
        "machine": f"{start['processes']} processes on {', '.join(machine.get('gpus') or [machine.get('cpu', '')])}",
        "versions": ", ".join(f"{p} {versions[p]}" for p in ("llama-smop", "torch", "transformers") if p in versions),
    }


def _noise(config: TrainConfig) -> str | None:
    noise = config.data.noise
    if noise is None or not any(stage.noise for stage in config.data.stages):
        return None
    snrs = ", ".join("clean" if snr is None else f"{snr:g} dB" for snr in noise.snrs)
    return f"{Path(noise.source).name} at {snrs}"
