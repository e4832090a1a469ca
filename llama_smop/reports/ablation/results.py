"""Reading `results.json`: settings, their seeds, and which settings differ by more than their seeds do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

from scipy.stats import t as student_t

from llama_smop.models.units import MODALITIES

CONFIDENCE = 0.95
Condition = tuple[str | None, float | None]  # (noise kind, SNR); (None, None) is clean


@dataclass(frozen=True)
class Setting:
    """What the cells of different seeds have in common. Dense: no E, a width of its own, and the K that it stands for,
    if any."""

    sharing: str
    num_experts: int | None
    top_k: int | None
    rates: tuple[int, int] | None
    dense_hidden: int | None

    @classmethod
    def of(cls, cell: Mapping) -> "Setting":
        dense = cell["sharing"] == "dense"
        return cls(
            cell["sharing"],
            cell["num_experts"],
            cell["top_k"],
            (cell["rate_audio"], cell["rate_video"]),
            cell["hidden_features"] if dense else None,
        )

    def label(self, among: Sequence["Setting"]) -> str:
        """Its sharing, and whatever else varies `among` the settings."""
        parts = [self.sharing]
        for name, text in (
            ("num_experts", f"E {self.num_experts}"),
            ("top_k", f"K {self.top_k}"),
            ("dense_hidden", f"hidden {self.dense_hidden}"),
            ("rates", f"rates {self.rates}"),
        ):
            if name == "top_k" and self.sharing == "dense":  # its width says it
                continue
            values = {getattr(s, name) for s in among} - {None}
            if len(values) > 1 and getattr(self, name) is not None:
                parts.append(text)
        return ", ".join(parts)

    def differs_in(self, other: "Setting") -> int:
        """In how many things; what one of the two does not have is not compared."""
        names = ["sharing", "num_experts", "top_k", "rates", "dense_hidden"]
        if self.sharing == other.sharing == "dense":  # of two widths, which are one thing
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
    """{setting: {seed: cell}} of the cells that were finished, in the grid's order."""
    groups: dict[Setting, dict[int, Mapping]] = {}
    for cell in results["cells"]:
        if "failed" not in cell:
            groups.setdefault(Setting.of(cell), {})[cell["seed"]] = cell
    return groups


def wers(cell: Mapping, modality: str) -> dict[Condition, float]:
    return {(r["noise"], r["snr"]): r["wer"] for r in cell["rows"] if r["modality"] == modality}


def mean_wer(cell: Mapping, modality: str) -> float | None:
    """Over all conditions that were scored, each with the same weight; None if there are none."""
    found = wers(cell, modality)
    return fmean(found.values()) if found else None


def conditions(results: Mapping) -> list[Condition]:
    """Clean first, then by kind of noise and falling SNR."""
    found = {(r["noise"], r["snr"]) for c in results["cells"] if "rows" in c for r in c["rows"]}
    return sorted(found, key=lambda c: (c[1] is not None, c[0] or "", -(c[1] or 0)))


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, half width, p) of paired differences by Student's t: mean ± t(0.975, n − 1) · s / √n against 0.

    Raises ValueError: fewer than two values, of which there is no spread.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"a spread needs at least two seeds, got {n}")
    mean, error = fmean(values), stdev(values) / n**0.5
    half_width = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    if error == 0:
        return mean, 0.0, float(mean == 0)
    return mean, half_width, float(2 * student_t.sf(abs(mean) / error, n - 1))


def differences(results: Mapping) -> list[Difference]:
    """Every two settings that differ in one thing and share two seeds or more, by modality: mean WER, paired by seed.

    A seed fixes the order of the clips, their crops and noise, whatever the setting: so the pairs.
    """
    groups = by_setting(results)
    found = []
    for modality in MODALITIES:
        for a, b in combinations(groups, 2):
            if a.differs_in(b) != 1:
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
    """Marks those whose p is below 0.05 / (comparisons left), in order of p, up to the first that is not."""
    passed: set[int] = set()
    for rank, index in enumerate(sorted(range(len(found)), key=lambda i: found[i].p)):
        if found[index].p > (1 - CONFIDENCE) / (len(found) - rank):
            break
        passed.add(index)
    return [Difference(**vars(d) | {"holm": i in passed}) for i, d in enumerate(found)]
