"""The figures of the reports, made by matplotlib from plain numbers."""

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_smop.data.degrade import KINDS, Degradation
from llama_smop.evaluation.wer import snr_label, snr_order
from llama_smop.models.rates import rate_parsed, tokens_a_second

DASHES = ("-", "--", "-.", ":")  # of the curves of one colour
COLOURS = {"audio": "#d1495b", "video": "#2e86ab", "audiovisual": "#3a7d44"}
NAMES = {"audio": "audio", "video": "video", "audiovisual": "audio + video"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def subplots(*size: float, **kwargs):
    """`plt.subplots` of `size` in inches, in the style of the reports."""
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=size, **kwargs)


def losses(log: Sequence[Mapping]) -> Figure:
    """Language-model and CTC loss, and the two router losses, against training steps, from a Trainer's log."""
    figure, (left, right) = subplots(9, 3.2, ncols=2)
    rates = {key.removeprefix("lm_loss/") for row in log for key in row if key.startswith("lm_loss/")}
    shades = [
        (f"lm_loss/{rate}", f"language model, rate {rate}", f"C{number}")
        for number, rate in enumerate(sorted(rates, key=rate_parsed))
    ]
    panels = (
        (left, (("lm_loss", "language model", "#333333"), *shades, ("ctc_loss", "CTC of the towers", "#b08900"))),
        (right, (("load_balancing_loss", "load balancing", "#7b2d8b"), ("router_z_loss", "router z", "#00897b"))),
    )
    for axes, series in panels:
        for key, label, colour in series:
            points = [(row["step"], float(row[key])) for row in log if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, color=colour)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        if axes.has_data():
            axes.legend()
    ctc = [float(row["ctc_loss"]) for row in log if "ctc_loss" in row]
    if ctc:  # the first values are far larger than all later ones
        left.set_ylim(
            0, 1.15 * max(float(np.quantile(ctc, 0.9)), max(float(r["lm_loss"]) for r in log if "lm_loss" in r))
        )
    left.set_title("Loss")
    right.set_title("Router losses, before their weights")
    return figure


def schedule(log: Sequence[Mapping]) -> Figure:
    """Learning rate and norm of the gradient against training steps."""
    figure, panels = subplots(9, 2.5, ncols=2)
    for axes, (key, title) in zip(
        panels, (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm, before clipping")), strict=True
    ):
        points = [(row["step"], float(row[key])) for row in log if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color="#333333")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
    return figure


def expert_load(log: Sequence[Mapping], experts: Sequence[str]) -> Figure:
    """Each expert's share of all choices over training; `experts`: a name for each."""
    rows = [row for row in log if "expert_load/0" in row]
    shares = np.array([[100 * row[f"expert_load/{e}"] for row in rows] for e in range(len(experts))])
    figure, axes = subplots(9, 1.1 + 0.28 * len(experts))
    steps = [row["step"] for row in rows]
    mesh = axes.pcolormesh(_edges(steps), np.arange(len(experts) + 1), shares, cmap="YlGnBu", vmin=0)
    axes.set_yticks(np.arange(len(experts)) + 0.5, experts)
    axes.set_xlabel("step")
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label="share of choices, %", pad=0.01)
    return figure


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Boundaries of the intervals that end at the logged steps."""
    return np.array([2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1, *steps])


def router_entropy(log: Sequence[Mapping], num_experts: int) -> Figure:
    """Mean entropy of the router's probabilities over training, by modality; dotted: that of a uniform choice."""
    figure, axes = subplots(6.2, 2.8)
    for key in sorted({key for row in log for key in row if key.startswith("router_entropy/")}):
        modality = key.split("/")[1]
        points = [(row["step"], float(row[key])) for row in log if key in row]
        axes.plot(*zip(*points, strict=True), label=f"{modality} tokens", color=COLOURS.get(modality))
    axes.axhline(np.log(num_experts), color="#777777", linestyle=":", label="even")
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    return figure


def wer_against_snr(rows: Sequence[Mapping], chance: float | None = None) -> Figure:
    """WER in per cent by SNR and modality, of undegraded pictures; video has no noise and is a horizontal line."""
    rows = [r for r in rows if r.get("degradation") is None]
    figure, axes = subplots(6.2, 3.6)
    snrs = sorted({r["snr"] for r in rows if r["snr"] is not None})
    ticks = [*snrs, (snrs[-1] + 5) if snrs else 0]
    for modality in COLOURS:
        found = {r["snr"]: 100 * r["wer"] for r in rows if r["modality"] == modality}
        if not found:
            continue
        style = {"color": COLOURS[modality], "label": NAMES[modality], "marker": "o"}
        if modality == "video":
            axes.plot(ticks, [found[None]] * len(ticks), **style | {"marker": None, "linestyle": "--"})
        else:
            at = [(s, found[s]) for s in snrs if s in found] + ([(ticks[-1], found[None])] if None in found else [])
            axes.plot(*zip(*at, strict=True), **style)
    if chance is not None:
        axes.axhline(100 * chance, color="#999999", linestyle=":", label="a guess per slot")
    axes.set_xticks(ticks, [*(f"{s:g}" for s in snrs), "clean"])
    axes.set_xlabel("babble, SNR in dB")
    axes.set_ylabel("word error rate, %")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def wer_against_tokens(rows: Sequence[Mapping]) -> Figure:
    """WER in per cent by speech tokens a second, which a compression rate gives; a panel for each SNR, a line for each
    modality; undegraded pictures. rows: of a model for several rates, as of `evaluation.run.Row`."""
    rows = [r for r in rows if r.get("rate") is not None and r.get("degradation") is None]
    snrs = sorted({r["snr"] for r in rows}, key=snr_order)
    figure, panels = subplots(max(6.2, 2.9 * len(snrs)), 3.6, ncols=len(snrs), sharey=True, squeeze=False)
    for axes, snr in zip(panels[0], snrs, strict=True):
        for modality in COLOURS:
            found = [r for r in rows if (r["modality"], r["snr"]) == (modality, snr)]
            points = sorted((tokens_a_second(rate_parsed(r["rate"]), modality), 100 * r["wer"]) for r in found)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[modality], label=NAMES[modality])
        axes.set_title(snr_label(snr))
        axes.set_xlabel("speech tokens a second")
        axes.set_xlim(left=0)
    panels[0][0].set_ylabel("word error rate, %")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend(frameon=False)
    return figure


def wer_against_degradation(rows: Sequence[Mapping]) -> Figure:
    """WER in per cent by how much worse the picture is made, a panel for each way; audio sees none of it.

    rows: of one set of clips, as of `evaluation.run.Row`; those without a degradation are where each curve begins.
    """
    degraded = [(Degradation.parse(r["degradation"]), r) for r in rows if r.get("degradation") is not None]
    names = list(dict.fromkeys(worse.name for worse, _ in degraded))
    conditions = sorted(
        {(r["modality"], r["snr"]) for r in rows}, key=lambda c: (list(NAMES).index(c[0]), snr_order(c[1]))
    )
    snrs = [snr for modality, snr in conditions if modality == "audiovisual"] or [None]
    figure, panels = subplots(max(6.2, 3.6 * len(names)), 3.6, ncols=len(names), sharey=True, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        clean = KINDS[name].high if name == "fps" else KINDS[name].low
        for modality, snr in conditions:
            own = [(worse, r) for worse, r in degraded if (r["modality"], r["snr"]) == (modality, snr)]
            whole = [r for r in rows if (r["modality"], r["snr"], r.get("degradation")) == (modality, snr, None)]
            points = [(clean, r) for r in whole] + [(worse.amount, r) for worse, r in own if worse.name == name]
            label = NAMES[modality] if modality == "video" else f"{NAMES[modality]}, {snr_label(snr)}"
            dashes = DASHES[snrs.index(snr) % len(DASHES)] if snr in snrs and modality != "video" else "-"
            style = {"color": COLOURS[modality], "label": label, "linestyle": dashes}
            if modality == "audio":
                axes.axhline(100 * whole[0]["wer"], **style)
            elif points:
                curve = sorted((amount, 100 * r["wer"]) for amount, r in points)
                axes.plot(*zip(*curve, strict=True), marker="o", **style)
        axes.set_xlabel(f"{name}: {KINDS[name].unit}")
        axes.set_ylim(bottom=0)
        if name == "fps":
            axes.invert_xaxis()
    panels[0][0].set_ylabel("word error rate, %")
    panels[0][-1].legend(fontsize=8)
    return figure


def expert_activation(shares: Mapping[str, Sequence[float]], experts_of: Mapping[str, Sequence[int]]) -> Figure:
    """The shares of each modality's choices by expert.

    shares: {modality: X numbers}. experts_of: {modality: the experts that it can choose}.
    """
    figure, axes = subplots(6.2, 3.0)
    draw_expert_activation(axes, shares, experts_of)
    axes.set_xlabel("expert")
    axes.set_ylabel("share of choices, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def draw_expert_activation(axes: Axes, shares: Mapping[str, Sequence[float]], experts_of: Mapping[str, Sequence[int]]):
    """The bars of `expert_activation`; dotted: an even load."""
    experts = len(next(iter(shares.values())))
    width = 0.8 / len(shares)
    for i, (modality, values) in enumerate(shares.items()):
        own = list(experts_of[modality])
        alone = sum(own == list(experts_of[m]) for m in shares) == 1 and len(own) < experts
        offset = 0 if alone else (i - (len(shares) - 1) / 2) * width
        axes.bar(
            np.array(own) + offset,
            [100 * values[e] for e in own],
            0.75 if alone else width,
            color=COLOURS[modality],
            label=f"{modality} tokens",
        )
        axes.hlines(100 / len(own), min(own) - 0.45, max(own) + 0.45, color="#777777", linestyle=":")
    axes.set_xticks(range(experts))


def clip_strip(frames: np.ndarray, audio: np.ndarray, columns: int = 10) -> Figure:
    """Frames uint8 (T, H, W, 3) of a clip side by side over the waveform (samples,)."""
    figure, axes = subplots(9, 1.75, nrows=2, height_ratios=(3, 1))
    chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    axes[0].imshow(np.concatenate(list(frames[chosen]), axis=1))
    axes[1].fill_between(*_envelope(audio), color="#555555", linewidth=0)
    axes[1].set_xlim(0, 1)
    for a in axes:
        a.axis("off")
    return figure


def _envelope(audio: np.ndarray, bins: int = 600):
    parts = np.array_split(audio, bins)
    return np.linspace(0, 1, bins), [p.min() for p in parts], [p.max() for p in parts]


def projector_bars(rows: Sequence[Mapping]) -> Figure:
    """Throughput and memory of projectors side by side; a row has name, tokens_per_second, kept_bytes, parameters."""
    figure, panels = subplots(9, 1.0 + 0.42 * len(rows), ncols=3, sharey=True)
    measures = (
        ("tokens_per_second", 1e-3, "thousand tokens/s\n(forward + backward)"),
        ("kept_bytes", 1e-6, "MB kept for backward"),
        ("parameters", 1e-6, "million parameters"),
    )
    names = [row["name"] for row in rows]
    colours = ["#3a7d44" if row["sparse"] else "#9aa5b1" for row in rows]
    for axes, (key, scale, label) in zip(panels, measures, strict=True):
        values = [row[key] * scale for row in rows]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
        axes.set_xlabel(label)
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return figure
