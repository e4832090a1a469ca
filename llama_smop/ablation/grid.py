"""What a grid file (YAML) may say, and the cells it stands for."""

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


class CorpusSection(Section):
    """A synthetic corpus, made in OUT/corpus; it takes the place of the base's data.root."""

    clips: int = Field(600, ge=8)
    seed: int = 0


class AxesSection(Section):
    """What is varied. An axis that is left out stays at the base's value."""

    sharing: tuple[Sharing, ...] = Field(("JEJR", "JEDR", "DEDR", "dense"), min_length=1)
    num_experts: tuple[AtLeastOne, ...] | None = Field(None, min_length=1)
    top_k: tuple[AtLeastOne, ...] | None = Field(None, min_length=1)
    rates: tuple[tuple[AtLeastOne, AtLeastOne], ...] | None = Field(None, min_length=1)  # (audio, video)
    seed: tuple[int, ...] | None = Field(None, min_length=1)


class ScoreSection(Section):
    """What every trained cell is scored on. Noise kinds: "babble" or a sound file."""

    labels: str = "test.csv"
    root: Path | None = None  # the corpus of the labels and of the babble; by default the one that is trained on
    modalities: tuple[Modality, ...] | None = None  # by default all that the model takes
    snrs: tuple[Snr | None, ...] = Field((None, 5, 0, -5), min_length=1)
    noises: tuple[str, ...] = Field(("babble",), min_length=1)
    beams: AtLeastOne = 1


class GridConfig(Section):
    """A grid: `llama-smop ablate --config GRID.yaml --out DIR`.

    base: training files, as `train --config` takes them, and `set`, nested keys that replace theirs.
    note: what a reader of the results should know.
    dense_hidden: the width of the dense baseline's MLPs, one for each modality: "active", K times an expert's, is the
    arithmetic that K experts take for a token; "expert" is the width of one.
    """

    base: tuple[str, ...] = Field(min_length=1)
    set: dict = Field(default_factory=dict)
    corpus: CorpusSection | None = None
    axes: AxesSection = AxesSection()
    score: ScoreSection = ScoreSection()
    note: str = ""
    dense_hidden: Literal["active", "expert"] = "active"
    jobs: AtLeastOne = 1
    threads: AtLeastOne | None = None  # of each job; by default the cores shared out


@dataclass(frozen=True)
class Cell:
    """One training and its scores."""

    name: str
    sharing: str
    num_experts: int | None  # None: dense
    top_k: int | None  # of a dense one: the K whose arithmetic its width stands for
    rate_audio: int
    rate_video: int
    hidden_features: int
    seed: int
    config: TrainConfig


def read_grid(source: str | Path) -> tuple[GridConfig, Path]:
    """A checked grid file, by path or shipped name, and the folder that its `base` names are beside.

    Raises ValueError: one line, naming file and key.
    """
    return compose(source).check(GridConfig), find(source).parent


def cells(grid: GridConfig, beside: Path, corpus: Path | None) -> Iterator[Cell]:
    """Every cell once, seeds innermost. There is no cell with K above E; a dense one has no E.

    Raises ValueError: a base or a setting that cannot be used, or no cell at all.
    """
    base = _composed(grid, beside, corpus).check(TrainConfig)
    if (grid.score.root or base.data.root) is None:
        raise ValueError("score.root is needed where the training reads shards: the corpus of score.labels")
    model, axes = base.model, grid.axes
    projector = model.projector
    E_axis = axes.num_experts or (projector.num_experts,)
    K_axis = axes.top_k or (projector.top_k,)
    rates_axis = axes.rates or ((model.rate_audio, model.rate_video),)
    made: set[str] = set()
    for sharing, E, K, rates, seed in product(axes.sharing, E_axis, K_axis, rates_axis, axes.seed or (base.run.seed,)):
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
        name = "-".join([*parts, f"r{rates[0]}.{rates[1]}", f"s{seed}"])
        if name in made:
            continue
        made.add(name)
        changes: dict = {
            "model": {"projector": kind, "rate_audio": rates[0], "rate_video": rates[1]},
            "run": {"seed": seed},
        }
        composition = _composed(grid, beside, corpus)
        composition.add(changes, f"cell {name}")
        config = composition.check(TrainConfig)
        active = None if dense and grid.dense_hidden != "active" else K
        yield Cell(name, sharing, None if dense else E, active, *rates, hidden, seed, config)
    if not made:
        raise ValueError("the grid has no cell: every top_k lies above every num_experts")


def _composed(grid: GridConfig, beside: Path, corpus: Path | None) -> Composition:
    composition = compose(grid.base, grid.set, beside=beside)
    if corpus is not None:
        composition.add({"data": {"root": str(corpus), "shards": None}}, "corpus")
    return composition
