"""The report of a training, running or finished: curves, experts, setbacks, scores, origin."""

import html
import shlex
from pathlib import Path

import yaml

from llama_smop.models.rates import rate_text
from llama_smop.projector_forms import SMoPForm
from llama_smop.reports import plots
from llama_smop.reports.html import facts, picture, shown, wer_table, write_page
from llama_smop.system import files

REPORT = "report.html"


def is_run(folder: Path) -> bool:
    return (folder / "starts.json").exists()


def write_run_report(run: str | Path) -> Path:
    """Write `run/report.html` from config.json, starts.json and metrics.json in the folder of a training, and from
    bad_clips.json and evaluation.json (`llama-smop evaluate --json`) if they exist.

    Raises:
        ValueError: nothing was logged yet, or a file has other content than it should.
    """
    run = Path(run)
    files.check_file(run / REPORT)
    config, starts, log = (_read(run, name) for name in ("config", "starts", "metrics"))
    if not log:
        raise ValueError(f"{run}: nothing was logged yet; wait for the training's first run.log_every steps")
    parts = (
        ("metrics", lambda: _check_log(log)),
        ("config", lambda: _header(run, config, log)),
        ("metrics", lambda: _losses(log)),
        ("metrics", lambda: _schedule(log)),
        ("metrics", lambda: _experts(config, log)),
        ("metrics", lambda: _entropy(config, log)),
        ("bad_clips", lambda: _setbacks(log, _read(run, "bad_clips") or {})),
        ("evaluation", lambda: _scores(run, _read(run, "evaluation"))),
        ("starts", lambda: _starts(starts or [])),
        ("config", lambda: _setting(config)),
    )
    body = []
    for name, part in parts:
        with shown(run / f"{name}.json"):
            body.append(part())
    return write_page(run / REPORT, f"Llama-SMoP training, {run.resolve().name}", body)


def _check_log(log) -> str:
    """Shows nothing. Raises ValueError: the log is not a list of rows of numbers."""
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ValueError("expected a list of rows")
    for number, row in enumerate(log, 1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"row {number}: step is {row.get('step')!r}")
        odd = [f"{key} is {value!r}" for key, value in row.items() if not isinstance(value, int | float)]
        if odd:
            raise ValueError(f"row {number}: {odd[0]}")
    return ""


def _setting(config: dict) -> str:
    return f"<h2>Setting</h2><pre>{html.escape(yaml.safe_dump(config, sort_keys=False, width=100))}</pre>"


def _read(run: Path, name: str):
    path = run / f"{name}.json"
    return files.read_json(path) if path.exists() else None


def _header(run: Path, config: dict, log: list[dict]) -> str:
    projector, model = config["model"]["projector"], config["model"]
    what = [
        "a model from scratch" if model["tiny"] else str(model["language_model"]),
        " + ".join(model["modalities"]),
        _rates(model),
        f"{projector['sharing']}, {projector['num_experts']} experts, top {projector['top_k']}"
        if projector["kind"] == "smop"
        else "dense projector",
        *SMoPForm.of(projector).described(),
    ]
    steps, seconds = (
        log[-1]["step"],
        log[-1].get("train_runtime"),
    )  # train_runtime: in a finished one
    state = f"Not ended, logged up to step {steps}."
    if seconds is not None:
        state = f"Ended after {steps} steps; its last start took {_duration(seconds)}."
    return (
        f"<h1>{html.escape(run.resolve().name)}</h1>"
        f'<p class="lead">Training of a Llama-SMoP: {html.escape(", ".join(what))}.</p><p>{html.escape(state)}</p>'
    )


def _rates(model: dict) -> str:
    if not model.get("rates"):
        return f"rates {model['rate_audio']} and {model['rate_video']}"
    each = "a projector for each" if model.get("rate_projectors") == "separate" else "one projector"
    return f"rates {' and '.join(map(rate_text, model['rates']))} with {each}"


def _losses(log: list[dict]) -> str:
    return "<h2>Losses</h2>" + picture(plots.losses(log), "Means over the steps since the point before.")


def _schedule(log: list[dict]) -> str:
    caption = "A step that was skipped counts with a norm of 0."
    return "<h2>Learning rate and gradient</h2>" + picture(plots.schedule(log), caption)


def _experts(config: dict, log: list[dict]) -> str:
    count = sum(key.startswith("expert_load/") for key in next((r for r in log if "expert_load/0" in r), {}))
    if not count:
        return ""
    E = config["model"]["projector"]["num_experts"]
    own = count > E  # DEDR: each modality has its own, audio's first
    names = [f"{('audio', 'video')[e // E]} {e % E}" if own else str(e) for e in range(count)]
    caption = f"Every choice of every real token, {config['model']['projector']['sharing']}."
    return "<h2>Load of the experts</h2>" + picture(plots.expert_load(log, names), caption)


def _entropy(config: dict, log: list[dict]) -> str:
    if not any(key.startswith("router_entropy/") for row in log for key in row):
        return ""
    figure = plots.router_entropy(log, config["model"]["projector"]["num_experts"])
    return "<h2>How decided the router is</h2>" + picture(figure, "Entropy of its probabilities; 0 = always sure.")


def _setbacks(log: list[dict], bad_clips: dict[str, str]) -> str:
    skipped = max((int(row.get("skipped_steps", 0)) for row in log), default=0)
    if not skipped and not bad_clips:
        return "<h2>Setbacks</h2><p>None: no step was skipped, every clip could be used.</p>"
    steps = f"<p>Steps skipped because loss or gradient was not finite: {skipped}.</p>" if skipped else ""
    clips = f"<p>Clips that could not be used and were replaced by others: {len(bad_clips)}.</p>{facts(bad_clips)}"
    return f"<h2>Setbacks</h2>{steps}{clips if bad_clips else ''}"


def _scores(run: Path, evaluation) -> str:
    if evaluation is None:
        model, scores = (shlex.quote(str(run / name)) for name in ("model", "evaluation.json"))
        command = f"llama-smop evaluate --model {model} --root CORPUS --snr clean --snr 0 --json {scores}"
        return f"<h2>Word error rate</h2><p>Not scored yet: <code>{html.escape(command)}</code></p>"
    figures = []
    for labels, rate in dict.fromkeys((r["labels"], r.get("rate")) for r in evaluation):
        rows = [r for r in evaluation if (r["labels"], r.get("rate")) == (labels, rate)]
        what = f"Clips of {labels}" + ("" if rate is None else f", rate {rate}")
        if any(r["snr"] is not None for r in rows):
            figures.append(picture(plots.wer_against_snr(rows), f"{what}."))
        if any(r.get("degradation") is not None for r in rows):
            figures.append(picture(plots.wer_against_degradation(rows), f"{what}, pictures made worse."))
    for labels in dict.fromkeys(r["labels"] for r in evaluation if r.get("rate") is not None):
        rows = [r for r in evaluation if r["labels"] == labels]
        figures.append(picture(plots.wer_against_tokens(rows), f"Clips of {labels}, at each compression rate."))
    return f"<h2>Word error rate</h2>{''.join(figures)}{wer_table(evaluation, {})}"


def _starts(starts: list[dict]) -> str:
    lines = []
    for start in starts:
        where = start["machine"]
        gpus = [f"{where['gpus'].count(g)} × {g}" for g in dict.fromkeys(where["gpus"])]
        machine = ", ".join([f"{start['processes']} processes on"] * (start["processes"] > 1) + [where["cpu"], *gpus])
        code = f"{start['commit'][:10]}{', with changes' if start['modified'] else ''}" if start["commit"] else "–"
        time = start["time"].replace("T", " ").replace("+00:00", " UTC")
        cells = (time, start["from_step"], code, machine)
        lines.append(
            f"<tr>{''.join(f'<td>{html.escape(str(c))}</td>' for c in cells)}"
            f"<td><code>{html.escape(start['command'])}</code></td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("started", "at step", "code", "machine", "command"))
    versions = facts(starts[-1]["versions"]) if starts else ""
    return f"<h2>Starts</h2><table><tr>{head}</tr>{''.join(lines)}</table><h2>Versions</h2>{versions}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
