"""The pictures of an ablation. Bands and whiskers span the lowest to the highest seed."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from llama_smop.models.units import MODALITIES
from llama_smop.reports.ablation.results import Setting, by_setting, conditions, mean_wer, wers
from llama_smop.reports.plots import NAMES, draw_expert_activation, subplots

SHARINGS = {"JEJR": "#7b2d8b", "JEDR": "#00897b", "DEDR": "#d1495b", "dense": "#555555"}
MARKERS = ("o", "s", "^", "D", "v", "P")
AXES = {"num_experts": "experts E", "top_k": "active experts K", "rates": "compression (audio, video)"}


def pictures(results: Mapping) -> dict[str, Figure]:
    """{file name: figure}, only for what the results contain."""
    groups = by_setting(results)
    if not groups:
        return {}
    figures = {"wer_snr.png": wer_against_snr(results)}
    for axis in AXES:
        if len({getattr(s, axis) for s in groups if s.sharing != "dense"}) > 1:
            figures[f"wer_{axis}.png"] = wer_against(results, axis)
    if len({s.form for s in groups if s.form is not None}) > 1:
        figures["wer_forms.png"] = wer_by_form(results)
    if any(cell["expert_activation"] for seeds in groups.values() for cell in seeds.values()):
        figures["expert_activation.png"] = activation(results)
    if any(cell["router_entropy"] for seeds in groups.values() for cell in seeds.values()):
        figures["router_entropy.png"] = entropy(results)
    return figures


def one_of_each_sharing(results: Mapping) -> dict[Setting, dict[int, Mapping]]:
    """The first setting of each sharing and form: if other axes vary too, pictures by these show the first values of
    the others."""
    first: dict[tuple[str, str | None], Setting] = {}
    groups = by_setting(results)
    for setting in groups:
        first.setdefault((setting.sharing, setting.form), setting)
    return {setting: groups[setting] for setting in first.values()}


def colours(groups: Iterable[Setting]) -> dict[Setting, str]:
    """By form where there are several, else by sharing."""
    forms = list(dict.fromkeys(s.form for s in groups if s.form is not None))
    by_form = {form: f"C{number % 10}" for number, form in enumerate(forms)} if len(forms) > 1 else {}
    return {s: by_form.get(s.form, SHARINGS[s.sharing]) for s in groups}


def wer_against_snr(results: Mapping) -> Figure:
    """A row for each kind of noise, a column for each modality; video has no noise and gets a bar for each sharing or
    form."""
    groups, scored = one_of_each_sharing(results), conditions(results)
    colour = colours(groups)
    modalities = [m for m in MODALITIES if any(wers(c, m) for cells in groups.values() for c in cells.values())]
    noises = list(dict.fromkeys(noise for noise, snr in scored if snr is not None)) or [None]
    widths = [1 if m == "video" else 2 for m in modalities]
    figure, panels = subplots(
        2 + 1.9 * sum(widths),
        3.5 * len(noises),
        nrows=len(noises),
        ncols=len(modalities),
        squeeze=False,
        sharey=True,
        width_ratios=widths,
    )
    for number, (row, noise) in enumerate(zip(panels, noises, strict=True)):
        snrs = sorted(snr for kind, snr in scored if kind == noise and snr is not None)
        places: list[tuple] = [(noise, snr) for snr in snrs] + [(None, None)] * ((None, None) in scored)
        for axes, modality in zip(row, modalities, strict=True):
            axes.set_title(NAMES[modality])
            if modality == "video" and number:
                axes.axis("off")
                axes.set_title("")
                continue
            if results["guess"] is not None:
                axes.axhline(100 * results["guess"], color="#999999", linestyle=":", label="a guess per slot")
            if modality == "video":
                _bars(axes, groups, lambda cell: wers(cell, "video").get((None, None)))
                continue
            for line, (setting, cells) in enumerate(groups.items()):
                found = [wers(cell, modality) for cell in cells.values()]
                at = [x for x, place in enumerate(places) if all(place in f for f in found)]
                values = [[100 * f[places[x]] for f in found] for x in at]
                shift = 0.06 * (line - (len(groups) - 1) / 2)  # so that whiskers do not overlap
                _line(axes, [x + shift for x in at], values, colour[setting], setting.label(list(groups)))
            axes.set_xticks(range(len(places)), [*(f"{s:g}" for s in snrs), *["clean"] * (len(places) - len(snrs))])
            axes.set_xlabel("SNR in dB" if noise is None else f"{Path(noise).stem}, SNR in dB")
        row[0].set_ylabel("word error rate, %")
    for axes, modality in zip(panels[0], modalities, strict=True):
        if modality != "video":
            if len(groups) <= 5:
                axes.legend(frameon=False)
            else:
                figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
            break
    panels[0][0].set_ylim(bottom=0)
    return figure


def wer_by_form(results: Mapping) -> Figure:
    """Mean WER over the scored conditions, a line for each setting: a small dot for each seed, a large one for their
    mean; a panel for each modality."""
    groups = by_setting(results)
    labels = [setting.label(list(groups)) for setting in groups]
    modalities = [m for m in MODALITIES if any(wers(c, m) for cells in groups.values() for c in cells.values())]
    figure, panels = subplots(
        2 + 2.7 * len(modalities), 0.9 + 0.33 * len(groups), ncols=len(modalities), squeeze=False, sharey=True
    )
    colour = colours(groups)
    for axes, modality in zip(panels[0], modalities, strict=True):
        for place, (setting, cells) in enumerate(groups.items()):
            values = [100 * m for cell in cells.values() if (m := mean_wer(cell, modality)) is not None]
            if values:
                style = {"color": colour[setting], "marker": "o", "linestyle": "none"}
                axes.plot(values, [place] * len(values), markersize=4, alpha=0.5, **style)
                axes.plot([fmean(values)], [place], markersize=9, **style)
        axes.set_title(NAMES[modality])
        axes.set_xlabel("mean word error rate, %")
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
    panels[0][0].set_yticks(range(len(groups)), labels)
    panels[0][0].invert_yaxis()
    return figure


def wer_against(results: Mapping, axis: str) -> Figure:
    """Mean WER over the scored conditions against E, K or the rates: a panel for each modality, a line for each
    sharing and value of the other axes; dense is a level line."""
    groups = by_setting(results)
    modalities = [m for m in MODALITIES if any(wers(c, m) for cells in groups.values() for c in cells.values())]
    values = sorted({getattr(s, axis) for s in groups if s.sharing != "dense"})
    rest = [replace(s, **{axis: None}) for s in groups]  # without the axis: one line each
    colour = colours(groups)
    figure, panels = subplots(2.4 + 3.0 * len(modalities), 3.5, ncols=len(modalities), squeeze=False, sharey=True)
    for axes, modality in zip(panels[0], modalities, strict=True):
        for setting, cells in groups.items():
            if setting.sharing == "dense" and axis != "rates":
                level = fmean(100 * mean_wer(cell, modality) for cell in cells.values())
                axes.axhline(level, color=SHARINGS["dense"], linestyle=":", label=setting.label(list(groups)))
        drawn: dict[str, tuple[Setting, dict]] = {}
        for setting, cells in groups.items():
            if setting.sharing != "dense" or axis == "rates":
                label = replace(setting, **{axis: None}).label(rest)
                line = drawn.setdefault(label, (setting, {}))[1]
                line[getattr(setting, axis)] = [100 * mean_wer(cell, modality) for cell in cells.values()]
        numbers = Counter()
        for label, (setting, line) in drawn.items():
            at = [value for value in values if value in line]
            marker = MARKERS[numbers[colour[setting]] % len(MARKERS)]
            numbers[colour[setting]] += 1
            _line(axes, [values.index(v) for v in at], [line[v] for v in at], colour[setting], label, marker)
        axes.set_xticks(range(len(values)), [str(v) for v in values])
        axes.set_title(NAMES[modality])
        axes.set_xlabel(AXES[axis])
    panels[0][0].set_ylabel("mean word error rate, %")
    panels[0][0].set_ylim(bottom=0)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def activation(results: Mapping) -> Figure:
    """Shares of the choices on test clips: a row for each sparse sharing, a column for each seed. There is no mean over
    seeds, because experts of different seeds do not correspond."""
    groups = {
        setting: cells
        for setting, cells in one_of_each_sharing(results).items()
        if any(cell["expert_activation"] for cell in cells.values())
    }
    seeds = sorted({seed for cells in groups.values() for seed in cells})
    figure, panels = subplots(
        1.2 + 2.7 * len(seeds), 0.7 + 2.0 * len(groups), nrows=len(groups), ncols=len(seeds), squeeze=False, sharey=True
    )
    handles: dict = {}
    for row, (setting, cells) in zip(panels, groups.items(), strict=True):
        for axes, seed in zip(row, seeds, strict=True):
            axes.set_title(f"{setting.label(list(groups))}, seed {seed}")
            if seed in cells and (shown := cells[seed]["expert_activation"]):
                draw_expert_activation(axes, shown["shares"], shown["experts_of"])
                handles = handles or dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        row[0].set_ylabel("share of choices, %")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def entropy(results: Mapping) -> Figure:
    """Mean entropy of the router's softmax over real tokens, in nats, against training steps, by modality."""
    groups = {
        setting: cells
        for setting, cells in one_of_each_sharing(results).items()
        if any(cell["router_entropy"] for cell in cells.values())
    }
    colour = colours(groups)
    modalities = [
        m for m in ("audio", "video")
        if any(m in point for cells in groups.values() for c in cells.values() for point in c["router_entropy"])
    ]  # fmt: skip
    figure, panels = subplots(
        1 + 4 * len(modalities), 3.3, ncols=len(modalities), squeeze=False, sharex=True, sharey=True
    )
    for axes, modality in zip(panels[0], modalities, strict=True):
        for setting, cells in groups.items():
            curves = [{p["step"]: p[modality] for p in c["router_entropy"] if modality in p} for c in cells.values()]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            label = setting.label(list(groups))
            axes.plot(steps, [fmean(v) for v in values], color=colour[setting], label=label)
            low, high = ([bound(v) for v in values] for bound in (min, max))
            axes.fill_between(steps, low, high, color=colour[setting], alpha=0.15, linewidth=0)
        for experts in sorted({s.num_experts for s in groups}):
            axes.axhline(log(experts), color="#999999", linestyle=":", label=f"uniform, ln {experts}")
        axes.set_title(f"{modality} tokens")
        axes.set_xlabel("step")
    panels[0][0].set_ylabel("router entropy, nats")
    panels[0][-1].legend(frameon=False)
    return figure


def _line(axes, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str, marker: str = "o"):
    means = [fmean(v) for v in values]
    below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
    above = [max(v) - mean for mean, v in zip(means, values, strict=True)]
    style = {"color": colour, "label": label, "marker": marker, "markersize": 4, "capsize": 2, "elinewidth": 0.8}
    axes.errorbar(x, means, yerr=[below, above], **style)


def _bars(axes, groups: Mapping[Setting, Mapping[int, Mapping]], value: Callable[[Mapping], float | None]) -> None:
    colour = colours(groups)
    for place, (setting, cells) in enumerate(groups.items()):
        found = np.array([100 * v for v in map(value, cells.values()) if v is not None])
        if len(found):
            around = [[found.mean() - found.min()], [found.max() - found.mean()]]
            axes.bar(place, found.mean(), 0.7, color=colour[setting], yerr=around, capsize=3, ecolor="#222222")
    labels = [setting.label(list(groups)) for setting in groups]
    axes.set_xticks(range(len(groups)), labels, rotation=45, ha="right" if max(map(len, labels)) > 8 else "center")
    axes.grid(axis="x", visible=False)
