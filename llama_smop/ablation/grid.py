"""The schema of a grid file (YAML), and the cells of a grid."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llama_smop.training.compose import Composition, compose, find
from llama_smop.training.config import Modality, Section, Snr, TrainConfig

AtLeastOne = Annotated[int, Field(ge=1)]
Sharing = Literal["JEJR", "JEDR", "DEDR", "dense"]
FormName = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]


class CorpusSection(Section):
    """A synthetic corpus, made in OUT/corpus; it replaces the base's data.root."""

    clips: int = Field(600, ge=8)
    seed: int = 0


class AxesSection(Section):
    """The axes of the grid. An omitted axis keeps the base's value.

    forms: keys under `model` by the name of what they make of a sparse model: another form of its projector, or several
    compression rates. They replace what the other axes say. The first form is the one that the others are compared
    with; a dense cell has none.
    """

    sharing: tuple[Sharing, ...] = Field(("JEJR", "JEDR", "DEDR", "dense"), min_length=1)
    num_experts: tuple[AtLeastOne, ...] | None = Field(None, min_length=1)
    top_k: tuple[AtLeastOne, ...] | None = Field(None, min_length=1)
    rates: tuple[tuple[AtLeastOne, AtLeastOne], ...] | None = Field(None, min_length=1)  # (audio, video)
    forms: dict[FormName, dict] | None = Field(None, min_length=1)
    seed: tuple[int, ...] | None = Field(None, min_length=1)


class ScoreSection(Section):
    """The conditions that every trained cell is scored on. A kind of noise is "babble" or a sound file."""

    labels: str = "test.csv"
    root: Path | None = None  # corpus of the labels and of the babble; default: the training corpus
    modalities: tuple[Modality, ...] | None = None  # default: all that the model takes
    snrs: tuple[Snr | None, ...] = Field((None, 5, 0, -5), min_length=1)
    noises: tuple[str, ...] = Field(("babble",), min_length=1)
    beams: AtLeastOne = 1


class GridConfig(Section):
    """A grid: `llama-smop ablate --config GRID.yaml --out DIR`.

    base: training files, as `train --config` takes them. set: nested keys that override theirs.
    note: text for the page of the results.
    dense_hidden: the width of the dense baseline's MLPs, one for each modality. "active" is K times an expert's width,
    which has the arithmetic of K experts per token; "expert" is the width of one expert.
    """

    base: tuple[str, ...] = Field(min_length=1)
    set: dict = Field(default_factory=dict)
    corpus: CorpusSection | None = None
    axes: AxesSection = AxesSection()
    score: ScoreSection = ScoreSection()
    note: str = ""
    dense_hidden: Literal["active", "expert"] = "active"
    jobs: AtLeastOne = 1
    threads: AtLeastOne | None = None  # of each job; default: the cores divided by the jobs


@dataclass(frozen=True)
class Cell:
    """One training and its scores: the point of the axes, whose settings a form may replace."""

    name: str
    sharing: str
    form: str | None  # None: dense, or the grid has no forms
    num_experts: int | None  # None: dense
    top_k: int | None  # dense: the K whose arithmetic its width matches, if any
    rate_audio: int
    rate_video: int
    hidden_features: int
    seed: int
    config: TrainConfig


def read_grid(source: str | Path) -> tuple[GridConfig, Path]:
    """A validated grid file, by path or shipped name, and the folder that its `base` names are relative to.

    Raises ValueError: one line that names file and key.
    """
    return compose(source).check(GridConfig), find(source).parent


def cells(grid: GridConfig, beside: Path, corpus: Path | None) -> Iterator[Cell]:
    """Every cell once, seeds innermost, without those with K > E; a dense cell has no E.

    Raises ValueError: an invalid base or setting, or no cell.
    """
    base = _composed(grid, beside, corpus).check(TrainConfig)
    if (grid.score.root or base.data.root) is None:
        raise ValueError("score.root is needed if the training reads shards: the corpus of score.labels")
    model, axes = base.model, grid.axes
    projector = model.projector
    E_axis = axes.num_experts or (projector.num_experts,)
    K_axis = axes.top_k or (projector.top_k,)
    rates_axis = axes.rates or ((model.rate_audio, model.rate_video),)
    made: set[str] = set()
    points = product(axes.sharing, axes.forms or {None: {}}, E_axis, K_axis, rates_axis, axes.seed or (base.run.seed,))
    for sharing, form, E, K, rates, seed in points:
        dense = sharing == "dense"
        if K > E and not dense:
            continue
        hidden = projector.hidden_features
        if dense:
            hidden *= K if grid.dense_hidden == "active" else 1
            parts = [sharing, f"h{hidden}"]
            kind = {"kind": "dense", "hidden_features": hidden}
        else:
            parts = [sharing.lower(), f"e{E}", f"k{K}"]
            kind = {"kind": "smop", "sharing": sharing, "num_experts": E, "top_k": K}
        form = None if dense else form
        changed = {} if form is None else axes.forms[form]
        several = "rates" in changed
        name = "-".join([*parts, *([] if form is None else [form]), *_rates_part(rates, several), f"s{seed}"])
        if name in made:
            continue
        made.add(name)
        at = {} if several else {"rate_audio": rates[0], "rate_video": rates[1]}
        composition = _composed(grid, beside, corpus)
        composition.add({"model": {"projector": kind, **at}, "run": {"seed": seed}}, f"cell {name}")
        composition.add({"model": changed}, f"form {form}")
        config = composition.check(TrainConfig)
        first = config.model.rate_audio, config.model.rate_video
        active = None if dense and grid.dense_hidden != "active" else K
        yield Cell(name, sharing, form, None if dense else E, active, *first, hidden, seed, config)
    if not made:
        raise ValueError("the grid has no cell: every top_k is greater than every num_experts")


def _rates_part(rates: tuple[int, int], several: bool) -> list[str]:
    """Of a cell's name; a form for several rates has its own, whatever the axis says."""
    return [] if several else [f"r{rates[0]}.{rates[1]}"]


def _composed(grid: GridConfig, beside: Path, corpus: Path | None) -> Composition:
    composition = compose(grid.base, grid.set, beside=beside)
    if corpus is not None:
        composition.add({"data": {"root": str(corpus), "shards": None}}, "corpus")
    return composition
