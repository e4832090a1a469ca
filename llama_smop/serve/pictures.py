"""The picture of which experts were used when."""

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from llama_smop.models.units import STREAMS
from llama_smop.reports.plots import COLOURS, subplots
from llama_smop.serve.experts import ExpertTimes

INK = "#8a8f98"  # readable on white and on black
SHOWN_S = 60.0


def experts_over_time(times: Sequence[ExpertTimes], seconds: float) -> str:
    """An SVG: a row for each expert that a stream can choose, time to the right, the deeper the larger its share.

    Empty where there is nothing to show. seconds: the recording's; its first minute is shown.
    """
    import matplotlib.pyplot as plt

    shown = [name for name in STREAMS if any(t.stream == name for t in times)]
    if not shown:
        return ""
    end = min(seconds, SHOWN_S)
    experts = len(times[0].weights)
    used = {name: _rows([t.weights for t in times if t.stream == name], experts) for name in shown}
    height = 0.75 + 0.26 * sum(map(len, used.values())) + 0.3 * len(shown)
    ratios = [len(used[name]) for name in shown]
    figure, panels = subplots(9, height, nrows=len(shown), sharex=True, squeeze=False, height_ratios=ratios)
    for axes, name in zip(panels[:, 0], shown, strict=True):
        colours = LinearSegmentedColormap.from_list(name, [COLOURS[name] + "10", COLOURS[name]])
        rows = used[name]
        for t in times:
            if t.stream == name and t.start < end:
                edges = np.linspace(t.start, t.end, t.weights.shape[1] + 1)
                axes.pcolormesh(edges, np.arange(len(rows) + 1), t.weights[rows], cmap=colours, vmin=0, vmax=1)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [f"expert {row}" for row in rows])
        axes.set_ylim(len(rows), 0)
        axes.set_xlim(0, end)
        axes.set_title("sound" if name == "audio" else "lips", loc="left", color=COLOURS[name], fontsize=10)
        axes.grid(visible=False)
        axes.tick_params(colors=INK, labelsize=9)
        for spine in axes.spines.values():
            spine.set_color(INK)
    panels[-1, 0].set_xlabel("seconds", color=INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _rows(weights: Sequence[np.ndarray], experts: int) -> list[int]:
    """The experts that a stream can choose: a half of them where the other half is the other stream's."""
    chosen = np.concatenate(weights, axis=1).any(axis=1)
    return [e for e in range(experts) if chosen[e]] or list(range(experts))
