"""Tables of results, written as Markdown or HTML."""

import html
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.report.readings import (
    MODE_NAMES,
    PASS_NAMES,
    best,
    compared_cell,
    describe,
    family,
    label,
    number,
    quickest_ours,
    ratio,
    series,
    time_cell,
    timings,
    unit,
    workload,
)
from benchmarks.rivals import BY_NAME
from benchmarks.workloads import Workload


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    text: bool = False  # words, not numbers

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row of {len(row)} cells under {len(self.header)} headings: {row}")

    def markdown(self, level: int = 3) -> str:
        lines = [f"{'#' * level} {self.title}", ""] if self.title else []
        align = "---|" if self.text else "---:|"
        lines += ["| " + " | ".join(self.header) + " |", "|---|" + align * (len(self.header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def html(self) -> str:
        def cells(row: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{_html(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "\n".join(cells(row, "td") for row in self.rows)
        note = f"<p class=note>{_html(self.note)}</p>" if self.note else ""
        kind = " class=text" if self.text else ""
        table = f"<table{kind}><thead>{cells(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        return f"<h3>{_html(self.title)}</h3><div class=scroll>{table}</div>{note}"


def _html(text: str) -> str:
    """Escaped, with Markdown's **bold** kept."""
    parts = html.escape(text).split("**")
    return "".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(parts))


# ------------------------------------------------------------------------------------------------------------ tables


def over_tokens(results: dict, of: Workload, which: str, best_modes: bool = False, cache: str = "cold") -> Table | None:
    """Rows: rivals (and modes). Columns: tokens. Cells: time, and its ratio to our quickest."""
    by_tokens = family(results, of, which, cache)
    if not by_tokens:
        return None
    name, scale = unit(results)
    chosen = {T: list(best(ts).values()) if best_modes else ts for T, ts in by_tokens.items()}
    rows_of = sorted(
        {(t["rival"], "best" if best_modes else t["mode"]) for ts in chosen.values() for t in ts},
        key=lambda row: (list(BY_NAME).index(row[0]), list(MODE_NAMES).index(row[1]) if row[1] in MODE_NAMES else 0),
    )
    rows = []
    for rival, mode in rows_of:
        row = [label(rival, "eager" if best_modes else mode)]
        for records in chosen.values():
            t = next((t for t in records if t["rival"] == rival and mode in ("best", t["mode"])), None)
            row.append(compared_cell(t, quickest_ours(records), scale))
        rows.append(row)
    floors = [next((t["floor_us"] for t in ts if BY_NAME[t["rival"]].exact), None) for ts in chosen.values()]
    rows.append(["roofline floor", *("–" if f is None else number(f / scale) for f in floors)])
    # Every record's noise is at least that of the callable that was timed twice, so that is the minimum.
    noises = [min((t["noise"] for t in ts if t.get("noise") is not None), default=None) for ts in chosen.values()]
    if any(n is not None for n in noises):
        rows.append(["noise", *("–" if n is None else f"{100 * n:.1f} %" for n in noises)])
    warm = ", hot L2" if cache == "hot" else ""
    return Table(
        f"{PASS_NAMES[which]}{warm}, {describe(of, tokens=False)} ({name})",
        ["", *(f"T {T}" for T in chosen)],
        rows,
    )


def rates(results: dict, of: Workload, which: str) -> Table | None:
    """Tokens a second, useful FLOP/s and share of its own floor, each rival in its best mode."""
    prefix, factor = ("G", 1e3) if results["kind"] == "cpu" else ("T", 1.0)
    by_tokens = {T: best(ts) for T, ts in family(results, of, which).items()}
    rivals = [r for r in BY_NAME if any(r in found for found in by_tokens.values())]

    def cell(t: dict | None) -> str:
        if t is None:
            return "–"
        share = "–" if t["share_of_floor"] is None else f"{100 * t['share_of_floor']:.0f} %"
        return f"{number(t['tokens_per_s'] / 1e3)} / {number(t['tflops'] * factor)} / {share}"

    return Table(
        f"{PASS_NAMES[which]}, {describe(of, tokens=False)} (thousand tokens/s / {prefix}FLOP/s / share of its floor)",
        ["", *(f"T {T}" for T in by_tokens)],
        [[label(r), *(cell(found.get(r)) for found in by_tokens.values())] for r in rivals],
    )


def single_workloads(results: dict, which: str = "both") -> Table | None:
    """A row for each workload that is not part of a series, a column for each rival that ran there."""
    in_series = series(results)
    rows_of: dict[str, dict[str, dict]] = {}
    for t in timings(results, which):
        w = workload(results, t["workload"])
        if replace(w, tokens=1) not in in_series:
            rows_of.setdefault(t["workload"], {})
    if not rows_of:
        return None
    for key in rows_of:
        rows_of[key] = best(t for t in timings(results, which) if t["workload"] == key)
    name, scale = unit(results)
    columns = [r for r in BY_NAME if any(r in found for found in rows_of.values())]
    rows = [
        [
            describe(workload(results, key)),
            *(compared_cell(found.get(r), quickest_ours(found.values()), scale) for r in columns),
        ]
        for key, found in rows_of.items()
    ]
    return Table(f"{PASS_NAMES[which]}, one thing changed at a time ({name})", ["", *(label(c) for c in columns)], rows)


def memory(results: dict, of: Workload) -> Table | None:
    """Megabytes kept for backward (y included), and on a GPU the peak of a training pass and the launches."""
    by_tokens: dict[int, dict[str, dict]] = {}
    for m in results["memory"]:
        w = workload(results, m["workload"])
        if replace(w, tokens=of.tokens) == of:
            by_tokens.setdefault(w.tokens, {})[m["rival"]] = m
    if not by_tokens:
        return None
    rivals = [r for r in BY_NAME if any(r in found for found in by_tokens.values())]
    on_gpu = any(m.get("peak_bytes") is not None for found in by_tokens.values() for m in found.values())
    rows = []
    for rival in rivals:
        row = [label(rival)]
        for T in sorted(by_tokens):
            m = by_tokens[T].get(rival)
            cell = "–" if m is None else number(m["kept_bytes"] / 1e6)
            if m is not None and m.get("peak_bytes") is not None:
                cell += f" / {number(m['peak_bytes'] / 1e6)}"
            row.append(cell)
        if on_gpu:
            known = [by_tokens[T][rival] for T in sorted(by_tokens) if rival in by_tokens[T]][-1]
            row += ["–" if known.get(k) is None else str(known[k]) for k in ("launches_both", "host_syncs")]
        rows.append(row)
    kept = "kept for backward, y included" + (" / peak of a training pass" if on_gpu else "")
    header = ["", *(f"T {T}" for T in sorted(by_tokens)), *(["launches", "host syncs"] if on_gpu else [])]
    return Table(f"memory, {describe(of, tokens=False)} (MB {kept})", header, rows)


def kernels(results: dict) -> Table | None:
    """Single operators; the ratio is to our quickest of the same operator."""
    tokens = sorted({workload(results, k["workload"]).tokens for k in results["kernels"]})
    if not tokens:
        return None
    name, scale = unit(results)
    rows = []
    for operator, who in dict.fromkeys((k["operator"], k["implementation"]) for k in results["kernels"]):
        row = [f"{operator.replace('_', ' ')}, {who.replace('_', ' ')}"]
        for T in tokens:
            same = [
                {**k, "rival": k["implementation"]}
                for k in results["kernels"]
                if k["operator"] == operator and workload(results, k["workload"]).tokens == T
            ]
            found = next((k for k in same if k["rival"] == who), None)
            row.append(compared_cell(found, quickest_ours(same), scale))
        rows.append(row)
    return Table(f"single operators ({name})", ["", *(f"T {T}" for T in tokens)], rows)


def correctness(results: dict) -> Table | None:
    """Backend by backend: shapes within twice PyTorch's own error against float64, and the worst tensor."""
    if not results["correctness"]:
        return None
    rows = []
    for backend in dict.fromkeys(c["backend"] for c in results["correctness"]):
        mine = [c for c in results["correctness"] if c["backend"] == backend]
        pairs = [
            (ours, plain, f"{name} at {describe(workload(results, c['workload']))}")
            for c in mine
            for name, (ours, plain) in c.get("errors_ours_and_torch", {}).items()
        ]
        worst = max(pairs, key=lambda p: p[0] / max(p[1], 1e-12)) if pairs else None
        broken = [c for c in mine if not c["within"]]
        failures = "; ".join(
            f"{describe(workload(results, c['workload']))}: {c.get('failure', 'beyond the bound')}" for c in broken
        )
        shown = "–" if worst is None else f"{worst[0]:.1e} against {worst[1]:.1e}, {worst[2]}"
        rows.append([backend, f"{len(mine) - len(broken)} of {len(mine)}", shown, failures or "none"])
    return Table(
        "correctness against float64, forward and every gradient",
        ["backend", "workloads within the bound", "worst against plain PyTorch of the same dtype", "failures"],
        rows,
        "Bound: twice the error of plain PyTorch in the same dtype, + 1e-5.",
        text=True,
    )


def model(results: dict) -> Table | None:
    if not results["model"]:
        return None
    ours = {r["model"]: r for r in results["model"] if r["projector"] == "smop"}
    names = {"smop": "ours", "eager": "eager loop over experts", "dense": "dense, same active FLOPs"}
    rows = []
    for r in results["model"]:
        reference = ours[r["model"]]
        step, generate = dict(r["step"], noise=r["step_noise"]), dict(r["generate"], noise=r["generate_noise"])
        mine = r["projector"] == "smop"
        step_ratio = "" if mine else ratio(step, dict(reference["step"], noise=reference["step_noise"]))
        new_ratio = "" if mine else ratio(generate, dict(reference["generate"], noise=reference["generate_noise"]))
        rows.append(
            [
                f"{r['model']}, {names[r['projector']]}",
                time_cell(step, 1e3) + (f" ({step_ratio})" if step_ratio else ""),
                number(r["speech_tokens_per_s"]),
                time_cell(r["projector_alone"], 1e3),
                f"{100 * r['projector_share']:.1f} %",
                number(r["new_tokens_per_s"]) + (f" ({new_ratio})" if new_ratio else ""),
                "–" if r["peak_bytes"] is None else number(r["peak_bytes"] / 1e6),
            ]
        )
    header = ["model, projector", "training step (ms)", "speech tokens/s", "projector alone (ms)", "its share",
              "new tokens/s", "peak (MB)"]  # fmt: skip
    return Table("whole model, random weights, synthetic inputs", header, rows)


def data(results: dict) -> Table | None:
    """Throughput of a data worker, and its share of the throughput of decoding only."""
    if not results.get("data"):
        return None
    names = {
        "decoder": "decoder alone, clips in memory",
        "decoder_transforms": "the same, with transforms, babble and batches",
        "shards_decoded": "from shards, decoded clips",
        "shards": "from shards, a training's batches",
    }
    rows = [
        [
            names[r["way"]],
            number(r["clips_per_s"]),
            *(f"{r[share]:.2f}" for share in ("share_of_decoder", "share_of_decoder_and_transforms")),
        ]
        for r in results["data"]
    ]
    clip = results["data"][0]["seconds_a_clip"]
    return Table(
        f"one data worker, audio-visual clips of {number(clip)} s",
        ["", "clips/s", "of the decoder", "of decoder and transforms"],
        rows,
        f"The same thing timed twice differs by {100 * results['data'][0]['noise']:.1f} %.",
    )


def predictions(results: dict) -> Table | None:
    """Single launches, beside what the model of the GPU says of them."""
    rows = [
        [r["question"], r["workload"], f"{r['backend']} {r['launch']}", number(r["median_us"]),
         "–" if r["predicted_us"] is None else number(r["predicted_us"]),
         "–" if r["predicted_us"] is None else f"{r['median_us'] / r['predicted_us'] - 1:+.0%}"]
        for r in results.get("predictions", ())
    ]  # fmt: skip
    note = "Each launch alone in a CUDA graph, whose start is part of both figures."
    header = ["", "workload", "launch", "measured (µs)", "predicted (µs)", "off"]
    return Table("predicted and measured", header, rows, note, text=True) if rows else None


def techniques(results: dict) -> Table | None:
    """What the kernels do, beside what it replaced."""
    records = results.get("techniques", ())
    best = {}
    for r in records:
        key = r["question"], r["workload"], r["backend"]
        best[key] = min(best.get(key, r["median_us"]), r["median_us"])
    rows = [
        [r["question"], r["workload"], r["backend"], r["way"], number(r["median_us"]),
         f"{r['median_us'] / best[r['question'], r['workload'], r['backend']]:.2f}×"]
        for r in records
    ]  # fmt: skip
    header = ["", "workload", "backend", "way", "µs", "of the quickest"]
    return Table("ways to the same end", header, rows, "Each in a CUDA graph.", text=True) if rows else None


def skipped(results: dict) -> Table | None:
    """The reasons why rivals were not timed, and the failures; identical reasons once."""
    timed = {t["rival"] for t in results["timings"]}
    reasons: dict[str, dict[str, None]] = {}
    for s in results["skipped"]:
        if "mode" in s or s["rival"] not in timed:
            reasons.setdefault(label(s["rival"], s.get("mode", "eager")), {})[s["reason"]] = None
    rows = [[who, "; ".join(why).replace("|", "/")] for who, why in reasons.items()]
    return Table("not timed, and why", ["", "reason"], rows, text=True) if rows else None


def stages(results: dict) -> Table | None:
    known = {n: s for n, s in results["stages"].items() if "finished" in s}
    if not known:
        return None
    rows = [
        [
            name,
            s["status"],
            str(len(s["finished"]) - len(s["failed"])),
            "; ".join(f"{c}: {e}" for c, e in s["failed"].items()).replace("|", "/") or s.get("note", ""),
            f"{s['seconds']:.0f}",
        ]
        for name, s in known.items()
    ]
    return Table("stages of the run", ["", "status", "cases", "failures, notes", "s"], rows, text=True)


# ---------------------------------------------------------------------------------------------------------- documents


def heading(results: dict) -> str:
    e = results["environment"]
    cores = f", {e.get('cores')} cores"
    more = {"cpu": cores, "peers": " (peers only)", "gpu": "", "data": f"{cores} (data)"}[results["kind"]]
    return e.get("device", "unknown device") + more


def conditions(results: dict) -> str:
    """One paragraph on device, versions, date and caveats."""
    e, c = results["environment"], results["ceilings"]
    parts = [", ".join(f"{n} {v}" for n, v in e.get("versions", {}).items())]
    if c:
        rates = ", ".join(f"{dtype} {_rate(tflops)}" for dtype, tflops in c["tflops"].items())
        copy = f"copy {number(c['copy_gb_per_s'])} GB/s"
        parts.append(f"ceilings measured in the same run: {copy}, matrix product {rates}")
    if e.get("date"):
        parts.append(f"measured {e['date']}")
    if e.get("commit"):
        parts.append(f"at commit {e['commit'][:10]}" + (" with local changes" if e.get("modified") else ""))
    if e.get("load_average") is not None:
        parts.append(f"load average {e['load_average']} before, {e.get('load_average_after', '–')} after")
    text = "; ".join(p for p in parts if p) + "."
    return f"{results['note']} {text}" if results.get("note") else text


def _rate(tflops: float) -> str:
    return f"{number(tflops)} TFLOP/s" if tflops >= 10 else f"{number(1e3 * tflops)} GFLOP/s"


def all_tables(results: dict) -> list[Table]:
    found = []
    for of in series(results):
        found += [over_tokens(results, of, which) for which in ("both", "forward", "backward")]
        if results["kind"] == "gpu":
            found.append(over_tokens(results, of, "forward", cache="hot"))
        found.append(rates(results, of, "both"))
        found.append(memory(results, of))
    found += [single_workloads(results, which) for which in ("both", "forward")]
    found += [kernels(results), model(results), data(results)]
    found += [correctness(results), predictions(results), techniques(results), stages(results), skipped(results)]
    return [t for t in found if t is not None]


def document(devices: list[dict], more: Iterable[Table] = ()) -> str:
    """Every table of every device and `more` tables, as Markdown."""
    parts = ["# Benchmark results\n", "Generated by `python -m benchmarks report` from the JSON files beside it.\n"]
    for results in devices:
        parts += [f"## {heading(results)}\n", conditions(results) + "\n", LEGEND + "\n"]
        parts += [t.markdown() for t in all_tables(results)]
    parts += [table.markdown(level=2) for table in more]
    return "\n".join(parts)


LEGEND = (
    "Cells: median ± half the interquartile range (where recorded), then how many times our quickest time it is; a "
    "“tie” is closer than the same thing timed twice. Bold: our quickest."
)
