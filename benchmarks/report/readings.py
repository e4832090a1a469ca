"""Selects, groups, names and formats results for tables and plots."""

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.measure import tie
from benchmarks.rivals import BY_NAME
from benchmarks.workloads import Workload

PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
MODE_NAMES = {"eager": "", "graph": ", CUDA graph", "compiled": ", torch.compile"}  # in the order of rows


# ------------------------------------------------------------------------------------------------------- selection


def workload(results: dict, key: str) -> Workload:
    return Workload(**results["workloads"][key])


def label(rival: str, mode: str = "eager") -> str:
    return BY_NAME[rival].label + MODE_NAMES[mode]


def is_ours(rival: str) -> bool:
    return rival.startswith("ours_")


def timings(results: dict, which: str, cache: str = "cold") -> list[dict]:
    """Timings of a pass; on a GPU those with this L2 state."""
    return [t for t in results["timings"] if t["pass"] == which and t.get("cache", cache) == cache]


def family(results: dict, of: Workload, which: str, cache: str = "cold") -> dict[int, list[dict]]:
    """Timings of the workloads that differ from `of` only in their tokens, by tokens."""
    found: dict[int, list[dict]] = {}
    for t in timings(results, which, cache):
        w = workload(results, t["workload"])
        if replace(w, tokens=of.tokens) == of:
            found.setdefault(w.tokens, []).append(t)
    return dict(sorted(found.items()))


def best(records: Iterable[dict]) -> dict[str, dict]:
    """The quickest mode of each rival."""
    quickest: dict[str, dict] = {}
    for t in records:
        if t["rival"] not in quickest or t["median_us"] < quickest[t["rival"]]["median_us"]:
            quickest[t["rival"]] = t
    return quickest


def quickest_ours(records: Iterable[dict]) -> dict | None:
    ours = [t for t in records if is_ours(t["rival"])]
    return min(ours, key=lambda t: t["median_us"]) if ours else None


def series(results: dict) -> list[Workload]:
    """The workloads that were measured at several token counts, each with tokens = 1."""
    found = []
    for sizes in results["workloads"].values():
        w = replace(Workload(**sizes), tokens=1)
        if w not in found:
            found.append(w)
    return [w for w in found if len(family(results, w, "both")) > 1]


def describe(w: Workload, tokens: bool = True) -> str:
    """Only what differs from the paper's 1B projector."""
    parts = [f"T {w.tokens}"] if tokens else []
    base = Workload(w.tokens, w.dtype)
    if (w.in_features, w.hidden_features, w.out_features) != (1024, 2048, 2048):
        parts.append(f"{w.in_features}→{w.hidden_features}→{w.out_features}")
    if w.num_experts != base.num_experts:
        parts.append(f"E {w.num_experts}")
    if w.top_k != base.top_k:
        parts.append(f"K {w.top_k}")
    if w.sharing != base.sharing:
        parts.append(w.sharing)
    if w.routing != base.routing:
        parts.append({"zipf": "skewed routing", "one": "all to one"}[w.routing])
    if w.expert != base.expert:
        parts.append({"mlp": "no bias, no LayerNorm", "swiglu": "gated experts"}[w.expert])
    return ", ".join([*parts, w.dtype])


# -------------------------------------------------------------------------------------------------------- formatting


def unit(results: dict) -> tuple[str, float]:
    """CPU times in milliseconds, GPU times in microseconds."""
    return ("ms", 1e3) if results["kind"] == "cpu" else ("µs", 1.0)


def number(value: float) -> str:
    """Three significant digits, never scientific."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def time_cell(t: dict, scale: float) -> str:
    """Median ± half the interquartile range, if recorded."""
    text = number(t["median_us"] / scale)
    if t.get("q3_us") is not None:
        text += f" ± {number((t['q3_us'] - t['q1_us']) / 2 / scale)}"
    return text


def ratio(t: dict, ours: dict | None) -> str:
    """The time relative to ours; "tie" if they differ by less than the noise."""
    if ours is None:
        return ""
    if t.get("noise") is not None and tie(t["median_us"], ours["median_us"], max(t["noise"], ours["noise"])):
        return "tie"
    return f"{number(t['median_us'] / ours['median_us'])}×"


def compared_cell(t: dict | None, ours: dict | None, scale: float) -> str:
    if t is None:
        return "–"
    if t is ours:
        return f"**{time_cell(t, scale)}**"
    compared = ratio(t, ours)
    return time_cell(t, scale) + (f" ({compared})" if compared else "")
