"""Reads `results.json`: settings, their seeds, and differences that exceed the spread over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

from llama_smop.evaluation.wer import snr_order
from llama_smop.models.rates import rate_parsed
from llama_smop.models.units import MODALITIES

CONFIDENCE = 0.95
Condition = tuple[str | None, float | None]  # (noise kind, SNR); (None, None) is clean


@dataclass(frozen=True)
class Setting:
    """What cells that differ only in their seed have in common.

    A dense one has no E; it has its own width and, if any, the K whose arithmetic it matches.
    """

    sharing: str
    num_experts: int | None
    top_k: int | None
    rates: tuple[int, int] | None
    dense_hidden: int | None
    form: str | None = None

    @property
    def name(self) -> str:
        """Its form where the grid has forms, else its sharing."""
        return self.form or self.sharing

    @classmethod
    def of(cls, cell: Mapping) -> "Setting":
        dense = cell["sharing"] == "dense"
        return cls(
            cell["sharing"],
            cell["num_experts"],
            cell["top_k"],
            (cell["rate_audio"], cell["rate_video"]),
            cell["hidden_features"] if dense else None,
            cell.get("form"),
        )

    def label(self, among: Sequence["Setting"]) -> str:
        """Its sharing, and every other axis that varies `among` the settings."""
        several = len({s.sharing for s in among if s.form is not None}) > 1
        parts = [self.name] if self.form is None or not several else [self.sharing, self.form]
        for name, text in (
            ("num_experts", f"E {self.num_experts}"),
            ("top_k", f"K {self.top_k}"),
            ("dense_hidden", f"hidden {self.dense_hidden}"),
            ("rates", f"rates {self.rates}"),
        ):
            if name == "top_k" and self.sharing == "dense":  # its width implies it
                continue
            values = {getattr(s, name) for s in among} - {None}
            if len(values) > 1 and getattr(self, name) is not None:
                parts.append(text)
        return ", ".join(parts)

    def differs_in(self, other: "Setting") -> int:
        """The number of axes in which the two differ; an axis that only one of them has does not count."""
        names = ["sharing", "form", "num_experts", "top_k", "rates", "dense_hidden"]
        if self.sharing == other.sharing == "dense":  # K and the width are one axis
            names.remove("top_k")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return sum(a != b for a, b in pairs if a is not None and b is not None)


@dataclass(frozen=True)
class Difference:
    """Setting a's WER less setting b's, as fractions: the mean over `seeds` shared seeds ± `half_width`.

    `exceeds`: the interval does not hold 0. `holm`: also after Holm's correction over all the comparisons made.
    """

    a: str
    b: str
    modality: str
    seeds: int
    mean: float
    half_width: float
    p: float
    exceeds: bool
    holm: bool = False


def by_setting(results: Mapping) -> dict[Setting, dict[int, Mapping]]:
    """{setting: {seed: cell}} of the finished cells, in the grid's order; a cell for several rates once for each."""
    groups: dict[Setting, dict[int, Mapping]] = {}
    for cell in results["cells"]:
        for scored in at_each_rate(cell) if "failed" not in cell else ():
            groups.setdefault(Setting.of(scored), {})[cell["seed"]] = scored
    return groups


def at_each_rate(cell: Mapping) -> list[Mapping]:
    """The cell itself, or one for each of the compression rates that its model has, with the rows of that."""
    rates = list(dict.fromkeys(row.get("rate") for row in cell["rows"]))
    if rates in ([], [None]):
        return [cell]
    return [
        {**cell, "rate_audio": audio, "rate_video": video, "rows": [row for row in cell["rows"] if row["rate"] == rate]}
        for rate, (audio, video) in ((rate, rate_parsed(rate)) for rate in rates)
    ]


def wers(cell: Mapping, modality: str) -> dict[Condition, float]:
    return {(r["noise"], r["snr"]): r["wer"] for r in cell["rows"] if r["modality"] == modality}


def mean_wer(cell: Mapping, modality: str) -> float | None:
    """Unweighted mean over all scored conditions; None if there are none."""
    found = wers(cell, modality)
    return fmean(found.values()) if found else None


def conditions(results: Mapping) -> list[Condition]:
    """The scored conditions: clean first, then by kind of noise and falling SNR."""
    found = {(r["noise"], r["snr"]) for c in results["cells"] if "rows" in c for r in c["rows"]}
    return sorted(found, key=lambda c: (c[1] is not None, c[0] or "", snr_order(c[1])))


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, half width, p) of paired differences by Student's t: mean ± t(0.975, n − 1) · s / √n against 0.

    Raises ValueError: fewer than two values, which have no spread.
    """
    n = len(values)
    from scipy.stats import t as student_t  # takes seconds to import

    if n < 2:
        raise ValueError(f"a spread needs at least two seeds, got {n}")
    mean, error = fmean(values), stdev(values) / n**0.5
    half_width = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    if error == 0:
        return mean, 0.0, float(mean == 0)
    return mean, half_width, float(2 * student_t.sf(abs(mean) / error, n - 1))


def differences(results: Mapping) -> list[Difference]:
    """For each modality, the settings that differ in one axis and share two seeds or more: mean WER, paired by seed.
    Of forms, each is compared with the first.

    They are paired because a seed fixes the order, crops and noise of the clips for every setting.
    """
    groups = by_setting(results)
    first = next((setting.form for setting in groups if setting.form is not None), None)
    found = []
    for modality in MODALITIES:
        for a, b in combinations(groups, 2):
            if a.differs_in(b) != 1 or (a.form != b.form and first not in (a.form, b.form)):
                continue
            pairs = [
                (mean_wer(groups[a][seed], modality), mean_wer(groups[b][seed], modality))
                for seed in sorted(groups[a].keys() & groups[b].keys())
            ]
            values = [x - y for x, y in pairs if x is not None and y is not None]
            if len(values) < 2:
                continue
            mean, half_width, p = paired(values)
            labels = a.label(list(groups)), b.label(list(groups))
            found.append(Difference(*labels, modality, len(values), mean, half_width, p, abs(mean) > half_width))
    return _holm(found)


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down correction: in order of p, marks those with p <= 0.05 / (comparisons left), and stops."""
    passed: set[int] = set()
    for rank, index in enumerate(sorted(range(len(found)), key=lambda i: found[i].p)):
        if found[index].p > (1 - CONFIDENCE) / (len(found) - rank):
            break
        passed.add(index)
    return [Difference(**vars(d) | {"holm": i in passed}) for i, d in enumerate(found)]
