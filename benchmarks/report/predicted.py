"""docs/performance.md's pages on what is predicted, not measured: where a step's time goes, and the price of memory."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report import performance
from benchmarks.report.plots import STYLE
from benchmarks.report.tables import Table

BEGIN, END = "<!-- predicted:begin -->", "<!-- predicted:end -->"
MEMORY = "<!-- layer-memory:begin -->", "<!-- layer-memory:end -->"
PICTURE = "where-the-time-goes-predicted.png"
# Launches by what they do, forward from the left: name, colour.
PARTS = {
    "starts and gaps": "#c9ced4",
    "router": "#a9c6f5",
    "schedule": "#7fa9ec",
    "h = act(x·W1)": "#1257c4",
    "z = h·W2": "#0b3c8a",
    "combine": "#5c9ead",
    "combine, backward": "#e8b36b",
    "dh": "#c8423b",
    "sums of partials": "#d9c27a",
    "dW2": "#8a2f2a",
    "dW1": "#e07b6a",
    "router, backward": "#b6a6d6",
}
TITLES = {"triton": "Triton", "cuda": "CUDA C++"}


def draw(predicted: dict, folder: Path) -> Path:
    """Shares of a training pass's predicted time by launch, for each backend and number of tokens."""
    path = folder / PICTURE
    with plt.rc_context(STYLE):
        figure = _shares(predicted)
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return path


def _shares(predicted: dict) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    for axis, backend in zip(axes, TITLES, strict=True):
        title, passes = next(
            (title, found) for title, found in _by_title(predicted) if title.startswith(TITLES[backend])
        )
        for column, one in enumerate(passes):
            bottom = 0.0
            for part, us in _parts(one, predicted).items():
                share = 100 * us / one["both_us"]
                axis.bar(column, share, 0.72, bottom, color=PARTS[part], label=part if column == 0 else None)
                if share >= 6:
                    dark = part in ("h = act(x·W1)", "z = h·W2", "dh", "dW2")
                    axis.text(
                        column, bottom + share / 2, f"{us:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if dark else "black",
                    )  # fmt: skip
                bottom += share
            axis.text(column, 101.5, f"{one['both_us']:.0f} µs", ha="center", fontsize=9, fontweight="bold")
        axis.set_xticks(range(len(passes)), [_label(one) for one in passes])
        axis.set_title(f"{title}, predicted", pad=18)
        axis.grid(False)
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("share of forward + backward, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False, fontsize=9)
    return figure


def _label(one: dict) -> str:
    w = one["workload"]
    return f"T {w['tokens']}" + ("" if w["sharing"] == "JEJR" else f"\n{w['sharing']}")


def _parts(one: dict, predicted: dict) -> dict[str, float]:
    """Microseconds by part, in the order of `PARTS`; what is no launch is the start of the graph and the gaps."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for launch in one["launches"]:
        spent[launch["part"]] += launch["us"]
    spent["starts and gaps"] = one["both_us"] - sum(spent.values())
    return {part: us for part, us in spent.items() if us > 0}


def _by_title(predicted: dict) -> list[tuple[str, list[dict]]]:
    """(backend and compiler, its passes), as they are listed; the first of a backend is the newest compiler's."""
    found: dict[str, list[dict]] = {}
    for one in predicted["passes"]:
        version = "" if one["backend"] == "cuda" else " " + one["compiler"].rpartition(".")[0]
        found.setdefault(TITLES[one["backend"]] + version, []).append(one)
    return list(found.items())


def times(predicted: dict) -> Table:
    """Forward and training pass of both backends, by number of tokens, beside what they were to reach."""
    rows = []
    for which, name in (("forward", "forward"), ("both", "forward + backward")):
        for title, passes in _by_title(predicted):
            rows.append([f"{title}, {name}", *(f"{p[which + '_us']:.0f}" for p in passes)])
            counted = [p["copies_counted"] for p in passes if "copies_counted" in p]
            if counted:
                rows.append([f"{title}, every copy counted, {name}", *(f"{c[which + '_us']:.0f}" for c in counted)])
        for backend, goals in predicted["goals_us"].items():
            rows.append([f"goal of {TITLES[backend]}, {name}", *(str(goal) for goal in goals[which])])
    header = ["predicted, not measured (µs)", *(_label(p).replace("\n", " ") for p in passes)]
    return Table("", header, rows)


def limits(predicted: dict) -> Table:
    """Microseconds of a training pass by what its launches wait for, and its two longest launches."""
    bounds = {
        "tensor": "tensor cores", "L2": "L2", "shared": "shared memory", "DRAM": "DRAM", "issue": "issue slots",
        "producer": "a producer warp", "latency": "latency",
    }  # fmt: skip
    rows = []
    for title, passes in _by_title(predicted):
        for one in passes:
            spent: dict[str, float] = dict.fromkeys(bounds, 0.0)
            for launch in one["launches"]:
                spent[launch["bound"]] += launch["us"]
            between = one["both_us"] - sum(spent.values())
            longest = sorted(one["launches"], key=lambda launch: -launch["us"])[:2]
            rows.append([
                f"{title}, {_label(one)}".replace("\n", " "), *(f"{us:.0f}" if us else "–" for us in spent.values()),
                f"{between:.0f}", ", ".join(f"{launch['part']} {launch['us']:.0f}" for launch in longest),
            ])  # fmt: skip
    header = ["forward + backward, predicted (µs)", *bounds.values(), "starts and gaps", "the longest"]
    return Table("", header, rows)


def memory(found: dict, predicted: dict) -> Table:
    """What the projector keeps for backward and needs at most, beside the predicted price of keeping less."""
    rows = []
    for case in found["cases"]:
        one = next(
            p for p in predicted["passes"]
            if p["backend"] == "triton" and p["workload"] == {"tokens": case["tokens"], "sharing": "JEJR"}
        )  # fmt: skip
        again = [name for name in ("h = act(x·W1)", "z = h·W2") if name[0] in case["recompute"].replace("none", "")]
        price = sum(launch["us"] for launch in one["launches"] if launch["part"] in again)
        rows.append([
            f"T {case['tokens']}, `\"{case['recompute']}\"`", f"{case['kept_bytes'] / 1e6:.1f}",
            f"{case['peak_bytes'] / 1e6:.1f}", f"{price:.0f} ({price / one['both_us']:.0%})" if again else "–",
        ])  # fmt: skip
    header = ["tokens, `recompute=`", "kept (MB)", "peak (MB)", "price, predicted (µs)"]
    return Table("", header, rows)


def update(document: Path, predicted: dict, found: dict, picture: Path) -> None:
    """Put both sections between their markers."""
    link = Path(os.path.relpath(picture, document.parent)).as_posix()
    note = f"_Generated by `python -m benchmarks report` from `benchmarks/predicted/`. {predicted['note']}_"
    note += f"\n\n_{predicted['multicast']}_"
    text = f"{note}\n\n{times(predicted).markdown()}\n![Where the time goes, predicted]({link})\n"
    text += f"\nWhat the launches of a training pass wait for:\n\n{limits(predicted).markdown()}"
    performance.update(document, text, BEGIN, END)
    performance.update(document, memory(found, predicted).markdown(), *MEMORY)
