"""The page of an ablation, README.md: setup, table, differences that exceed the spread over seeds, pictures."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt

from llama_smop.evaluation.wer import snr_label
from llama_smop.models.units import MODALITIES
from llama_smop.reports.ablation.plots import pictures
from llama_smop.reports.ablation.results import (
    Condition,
    Difference,
    by_setting,
    conditions,
    differences,
    mean_wer,
    wers,
)
from llama_smop.reports.html import shown
from llama_smop.reports.plots import NAMES
from llama_smop.system import files

NAMED = 12  # the most differences that a sentence names
ALL_LISTED = 40  # comparisons; of more, only those that exceed the spread are listed
CAPTIONS = {
    "wer_snr.png": "Word error rate against SNR by sharing. Mean over seeds; whiskers from the lowest to the highest.",
    "wer_num_experts.png": "Word error rate, mean over the scored conditions, against the number of experts.",
    "wer_top_k.png": "Word error rate, mean over the scored conditions, against K. Experts keep their width: a larger "
    "K also computes more.",
    "wer_rates.png": "Word error rate, mean over the scored conditions, against the compression rates.",
    "wer_forms.png": "Word error rate, mean over the scored conditions: a small dot for each seed, a large one for the "
    "mean of the seeds.",
    "expert_activation.png": "Which experts the tokens of each modality chose, on the scored clips, clean; dotted: an "
    "even load.",
    "router_entropy.png": "Entropy of the router's softmax, mean over real tokens, during training.",
}

WRITTEN = "_Written by `llama-smop ablate` from `results.json`._"


def check_page(folder: Path) -> None:
    """Raises FileExistsError: the folder has a README.md that is not an ablation's page."""
    page = folder / "README.md"
    if page.exists() and WRITTEN not in page.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{page}: is not an ablation's page, and would be overwritten; name another folder")


def write_page(folder: str | Path) -> Path:
    """`folder/README.md` and its pictures, from `folder/results.json`.

    Raises:
        ValueError: no results there, or their file has other content. FileExistsError: see `check_page`.
    """
    folder = Path(folder)
    check_page(folder)
    path = folder / "results.json"
    if not path.exists():
        raise ValueError(f"{path}: not there; run `llama-smop ablate --out {folder}` first")
    results = files.read_json(path)
    with shown(path):
        drawn = pictures(results)
        text = page(results, list(drawn))
    for name, figure in drawn.items():
        files.write_file(folder / name, lambda aside, figure=figure: figure.savefig(aside, format="png", dpi=110))
        plt.close(figure)
    return files.write_text(folder / "README.md", text)


def page(results: Mapping, drawn: Sequence[str] = ()) -> str:
    parts = [
        "# Ablation" + (" on synthetic data" if results["synthetic"] else ""),
        WRITTEN,
        what_was_run(results),
        *_forms(results),
        *_failed(results),
        "## Word error rates",
        "Per cent, mean ± standard deviation over seeds; the last column is the mean over the conditions of its line.",
        table(results),
        "## What exceeds the spread over seeds",
        spread(results),
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in _captions(results, drawn).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _captions(results: Mapping, drawn: Sequence[str]) -> dict[str, str]:
    compared = "by form" if _has_forms(results) else "by sharing"
    return {name: CAPTIONS[name].replace("by sharing", compared) for name in drawn}


def _has_forms(results: Mapping) -> bool:
    return bool((results["grid"].get("axes") or {}).get("forms"))


def what_was_run(results: Mapping) -> str:
    config, machine, grid = results["config"], results["machine"], results["grid"]
    done = [cell for cell in results["cells"] if "failed" not in cell]
    model = config["model"]
    lines = []
    if results["synthetic"]:
        counts = results["corpus"]["counts"]
        labels = Path(grid["score"]["labels"]).stem
        lines.append(
            f"**Synthetic data.** {counts['train']['clips']} generated talking-head clips to train on (espeak-ng "
            f"speech, drawn faces, a fixed grammar), {counts[labels]['clips']} of other sentences to score on "
            f"(`{labels}`). How these small models compare here is no estimate of how they would on people. "
            f"A random guess in each slot of the grammar gets {100 * results['guess']:.1f} % of the words wrong."
        )
    else:
        lines.append(f"Corpus: `{results['corpus']}`, scored on `{grid['score']['labels']}`.")
    lines.append(
        f"Base: {', '.join(grid['base'])}; "
        + ("a model from scratch" if model["tiny"] is not None else model["language_model"])
        + f", experts of hidden width {model['projector']['hidden_features']}, seeds "
        + ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in results["cells"]}))
        + ". A seed sets the weights at the start, the order of the clips, their crops and noise."
    )
    if grid["note"]:
        lines.append(grid["note"])
    dense = sorted({cell["hidden_features"] for cell in results["cells"] if cell["sharing"] == "dense"})
    if dense:
        why = (
            "K times an expert's: the arithmetic that K experts take for a token"
            if grid["dense_hidden"] == "active"
            else "that of one expert, which is less arithmetic than K of them"
        )
        lines.append(
            f"Dense: one MLP for each modality, with the same LayerNorm at its end, hidden width "
            f"{' and '.join(map(str, dense))}, {why}."
        )
    if done:
        steps = sorted({cell["steps"] for cell in done})
        cpu = [cell["seconds"]["all"]["cpu"] for cell in done]
        wall = [cell["seconds"]["all"]["wall"] for cell in done]
        begun = datetime.fromisoformat(min(cell["started"] for cell in done))
        ended = datetime.fromisoformat(max(cell["ended"] for cell in done))
        threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        lines.append(
            f"{len(done)} cells of {' or '.join(map(str, steps))} steps; machine: {machine['device']}, "
            f"{machine['cores']} cores, {machine['jobs']} cells at a time, {threads} each; "
            f"{(ended - begun).total_seconds() / 60:.0f} minutes from the first start to the last end "
            f"({begun:%Y-%m-%d}); a cell took {fmean(wall):.0f} s ({min(wall):.0f} to {max(wall):.0f}) and "
            f"{fmean(cpu):.0f} CPU seconds ({min(cpu):.0f} to {max(cpu):.0f}), training and scoring: "
            f"{100 * sum(cpu) / sum(wall):.0f} % of a core (less than all of it where other work "
            f"shared the machine); {versions}."
        )
    return "\n\n".join(lines)


def _forms(results: Mapping) -> list[str]:
    """A table of what the forms of the grid change, if it has forms."""
    if not _has_forms(results):
        return []
    lines = ["| form | what it changes under `model` |", "|---|---|"]
    for name, changed in results["grid"]["axes"]["forms"].items():
        text = json.dumps(changed, ensure_ascii=False).replace('"', "").replace("|", "/")
        lines.append(
            f"| {name} | {f'`{text}`' if changed else 'nothing: the base, with which the others are compared'} |"
        )
    return ["\n".join(lines)]


def _failed(results: Mapping) -> list[str]:
    return [f"**{cell['name']} failed**: {cell['failed']}" for cell in results["cells"] if "failed" in cell]


def table(results: Mapping) -> str:
    """Markdown: a line for each setting and modality, a column for each condition."""
    groups, scored = by_setting(results), conditions(results)
    several = len({noise for noise, snr in scored if snr is not None}) > 1
    head = ["projector", "parameters", "seeds", "input", *(_condition(c, several) for c in scored), "mean"]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---:|" * (len(scored) + 1)]
    for modality in MODALITIES:
        for setting, cells in groups.items():
            found = [wers(cell, modality) for cell in cells.values()]
            if not any(found):
                continue
            size = next(iter(cells.values()))["projector_parameters"]
            columns = [_cell([f[c] for f in found if c in f]) for c in scored]
            mean = _cell([m for cell in cells.values() if (m := mean_wer(cell, modality)) is not None])
            first = [setting.label(list(groups)), f"{size:,}", str(len(cells)), NAMES[modality]]
            lines.append("| " + " | ".join([*first, *columns, mean]) + " |")
    return "\n".join(lines)


def _condition(condition: Condition, name_noise: bool) -> str:
    noise, snr = condition
    return snr_label(snr) + (f" {Path(noise).stem}" if name_noise and snr is not None else "")


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def spread(results: Mapping) -> str:
    """The rule of comparison and its result."""
    found = differences(results)
    if not found:
        return "Nothing can be said: no two settings share two seeds."
    seeds = sorted({d.seeds for d in found})
    exceeding = [d for d in found if d.exceeds]
    two = "two settings that differ in one thing"
    two += " (of forms, the first and another)" if _has_forms(results) else ""
    chance = f"about {len(found) / 20:.1f} of these {len(found)}"
    rule = (
        f"Rule: for every {two}, and every kind of input, take each seed's mean WER "
        "over the scored conditions, subtract seed by seed, and call a difference larger than the spread when 0 lies "
        f"outside mean ± t(0.975, n − 1) · s / √n of the n = {' or '.join(map(str, seeds))} differences (s their "
        f"standard deviation). One in twenty comparisons does so by chance, {chance}; the last column says which "
        "remain after Holm's correction for them all. With so few seeds only large and steady differences can show, "
        "and one that does not show is not thereby absent. All seeds are scored on the same clips, so what other "
        "clips would change is not in the spread."
    )
    verdict = f"**None of {len(found)} differences is larger than its spread over seeds.**"
    if exceeding:
        named = f": {'; '.join(map(_sentence, exceeding))}" if len(exceeding) <= NAMED else ""
        remain = sum(d.holm for d in found)
        verdict = (
            f"**{len(exceeding)} of {len(found)} differences larger than their spread over seeds{named}. "
            f"After Holm's correction: {remain or 'none'}.**"
        )
    listed = found if len(found) <= ALL_LISTED else exceeding
    lines = [
        "| input | a | b | WER a − b, points | larger than the spread | after Holm |",
        "|---|---|---|---:|---|---|",
    ]
    for d in listed:
        marks = ("yes" if d.exceeds else "no", "yes" if d.holm else "no")
        interval = f"{100 * d.mean:+.1f} ± {100 * d.half_width:.1f}"
        lines.append(f"| {NAMES[d.modality]} | {d.a} | {d.b} | {interval} | {marks[0]} | {marks[1]} |")
    return "\n\n".join([verdict, rule, "\n".join(lines)] if listed else [verdict, rule])


def _sentence(d: Difference) -> str:
    better, worse = (d.a, d.b) if d.mean < 0 else (d.b, d.a)
    return f"{NAMES[d.modality]}: {better} below {worse} by {100 * abs(d.mean):.1f} points"
