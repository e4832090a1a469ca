"""Figures of the results: throughput against tokens with the roofline, memory, dense against sparse."""

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report import readings, tables
from benchmarks.rivals import BY_NAME
from benchmarks.workloads import Workload

OURS = "#1257c4"
COLORS = {
    "eager": "#c8423b",
    "grouped_mm": "#e0912b",
    "grouped_gemm": "#a8742a",
    "dense_all": "#8a5ba6",
    "dense_KH": "#2b8f6f",
    "dense_EH": "#7a7f87",
    "dense_H": "#a9b4bd",
    "scattermoe": "#c55a9b",
    "liger": "#5c9ead",
    "floor": "#222222",
}
MARKERS = {"eager": "s", "grouped_mm": "^", "dense_all": "D", "dense_KH": "v", "dense_EH": "P", "dense_H": "X"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a9099",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 140,
    "savefig.facecolor": "white",
}


def draw(results: dict, folder: Path, stem: str) -> list[Path]:
    """The pictures of a device, as PNG files `stem`-….png in `folder`. What was not measured has no picture."""
    drawn = []
    with plt.rc_context(STYLE):
        for of in readings.series(results):
            if of.expert != "projector" or of.sharing != "JEJR":
                continue
            for name, figure in (
                ("throughput", throughput(results, of)),
                ("memory", memory(results, of)),
                ("dense", dense_against_sparse(results, of)),
            ):
                if figure is None:
                    continue
                path = folder / f"{stem}-{name}-{of.dtype}.png"
                figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                drawn.append(path)
    return drawn


def throughput(results: dict, of: Workload) -> Figure | None:
    """Tokens per second against tokens, forward and training pass, with the roofline; pale bars: the quartiles."""
    panels = [(which, readings.family(results, of, which)) for which in ("forward", "both")]
    if any(len(by_tokens) < 2 for _, by_tokens in panels):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharex=True, sharey=True)
    for ax, (which, by_tokens) in zip(axes, panels, strict=True):
        for rival in _rivals(by_tokens):
            points = [
                (T, readings.best(ts)[rival]) for T, ts in by_tokens.items() if any(t["rival"] == rival for t in ts)
            ]
            tokens = [T for T, _ in points]
            middle = [T / t["median_us"] * 1e6 for T, t in points]
            _line(ax, rival, tokens, middle)
            if all(t.get("q1_us") for _, t in points):
                low = [T / t["q3_us"] * 1e6 for T, t in points]
                high = [T / t["q1_us"] * 1e6 for T, t in points]
                ax.vlines(tokens, low, high, color=_color(rival), alpha=0.45, linewidth=4, zorder=2)
        floors = {
            T: next((t["floor_us"] for t in ts if t["rival"] in BY_NAME and BY_NAME[t["rival"]].exact), None)
            for T, ts in by_tokens.items()
        }
        known = {T: f for T, f in floors.items() if f}
        ax.plot(list(known), [T / f * 1e6 for T, f in known.items()], color=COLORS["floor"], linestyle=(0, (4, 2)),
                linewidth=1.3, label="roofline of the sparse layer")  # fmt: skip
        ax.set_title({"forward": "Forward", "both": "Forward + backward (training)"}[which])
        ax.set_xscale("log")
        ax.set_yscale("log")
        _token_axis(ax, list(by_tokens))
        ax.grid(which="minor", axis="y", color="#f1f3f5", linewidth=0.6)
    low, high = axes[0].get_ylim()
    steps = (1, 2, 5) if high / low < 200 else (1,)
    axes[0].yaxis.set_major_locator(LogLocator(subs=steps))  # both panels share the axis
    axes[0].yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("tokens per second")
    _titled(figure, results, of, "Projector throughput, best mode of each")
    _legend(figure, axes[0])
    return figure


def memory(results: dict, of: Workload) -> Figure | None:
    """Bytes kept between forward and backward, per token, at the most tokens measured."""
    found = [(readings.workload(results, m["workload"]), m) for m in results["memory"]]
    found = [(w.tokens, m) for w, m in found if replace(w, tokens=of.tokens) == of]
    if not found:
        return None
    most = max(tokens for tokens, _ in found)
    kept = {m["rival"]: m["kept_bytes"] / most / 1024 for tokens, m in found if tokens == most}
    rivals = sorted(kept, key=kept.get, reverse=True)
    figure, ax = plt.subplots(figsize=(7.2, 0.6 + 0.42 * len(rivals)))
    bars = ax.barh(range(len(rivals)), [kept[r] for r in rivals], height=0.68, color=[_color(r) for r in rivals])
    ax.bar_label(bars, [readings.number(kept[r]) for r in rivals], padding=4, fontsize=9, color="#444")
    ax.set_yticks(range(len(rivals)), [readings.label(r) for r in rivals])
    for tick, rival in zip(ax.get_yticklabels(), rivals, strict=True):
        tick.set_fontweight("bold" if readings.is_ours(rival) else "normal")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set_xlabel(f"KiB a token kept for backward, output included (T {most})")
    _titled(figure, results, of, "Memory between forward and backward")
    return figure


def dense_against_sparse(results: dict, of: Workload) -> Figure | None:
    """Training throughput at equal active FLOPs and at equal parameters, against our sparse layer."""
    by_tokens = {T: readings.best(ts) for T, ts in readings.family(results, of, "both").items()}
    columns = {T: (readings.quickest_ours(found.values()), found) for T, found in by_tokens.items()}
    columns = {T: (ours, found) for T, (ours, found) in columns.items() if ours and "dense_KH" in found}
    if len(columns) < 2:
        return None
    bars = [
        ("sparse, ours", OURS, lambda ours, found: ours),
        ("dense, same active FLOPs (K·H)", COLORS["dense_KH"], lambda ours, found: found.get("dense_KH")),
        ("dense, same parameters (E·H)", COLORS["dense_EH"], lambda ours, found: found.get("dense_EH")),
    ]
    figure, ax = plt.subplots(figsize=(6.4, 4.1))
    width = 0.26
    for i, (name, color, pick) in enumerate(bars):
        for j, (T, (ours, found)) in enumerate(columns.items()):
            t = pick(ours, found)
            if t is None:
                continue
            height = T / t["median_us"] * 1e6
            at = j + (i - 1) * width
            ax.bar(at, height, width * 0.92, color=color, label=name if j == 0 else None)
            ax.annotate(_thousands(height), (at, height), ha="center", va="bottom", fontsize=7.5, color="#444",
                        xytext=(0, 2), textcoords="offset points")  # fmt: skip
    ax.set_xticks(range(len(columns)), [str(T) for T in columns])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("tokens T")
    ax.set_ylabel("tokens per second, forward + backward")
    ax.yaxis.set_major_formatter(FuncFormatter(_thousands))
    _titled(figure, results, of, "Dense against sparse")
    _legend(figure, ax)
    return figure


def _line(ax: Axes, rival: str, tokens: list[int], values: list[float]) -> None:
    mine = readings.is_ours(rival)
    look = {"linewidth": 2.6, "zorder": 5} if mine else {"linewidth": 1.5, "zorder": 3}
    marker = {"marker": MARKERS.get(rival, "o"), "markersize": 5.5}
    ax.plot(tokens, values, label=readings.label(rival), color=_color(rival), **look, **marker)


def _rivals(by_tokens: dict[int, list[dict]]) -> list[str]:
    seen = {t["rival"] for ts in by_tokens.values() for t in ts}
    return [r for r in BY_NAME if r in seen]


def _color(rival: str) -> str:
    if readings.is_ours(rival):
        return {"ours_torch": OURS, "ours_triton": "#0a8fd6", "ours_cuda": "#0b2f7a"}[rival]
    return COLORS.get(rival, "#55606b")


def _token_axis(ax: Axes, tokens: list[int]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(tokens))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    ax.set_xlabel("tokens T")


def _thousands(value: float, _=None) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.0f}{suffix}" if scaled >= 10 or scaled == int(scaled) else f"{scaled:.1f}{suffix}"
    return f"{value:g}" if value < 10 else f"{value:.0f}"


def _titled(figure: Figure, results: dict, of: Workload, title: str) -> None:
    """Title and conditions above the axes, whose height in inches does not depend on the figure's."""
    sizes = f"{of.in_features}→{of.hidden_features}→{of.out_features}, E {of.num_experts}, K {of.top_k}"
    figure.tight_layout()
    inch = 1 / figure.get_figheight()
    line = {"x": 0.01, "ha": "left", "va": "bottom"}
    figure.text(y=1 + 0.28 * inch, s=title, fontsize=13, fontweight="bold", **line)
    figure.text(y=1 + 0.06 * inch, s=f"{tables.heading(results)} · {of.dtype} · {sizes}", color="#555", **line)


def _legend(figure: Figure, ax: Axes, columns: int = 3) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.01, 0.01), ncol=columns, frameon=False, fontsize=9
    )
