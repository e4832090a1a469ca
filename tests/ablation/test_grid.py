"""Grid files: which cells they stand for."""

import pytest
import yaml

from llama_smop.ablation.grid import cells, read_grid

BASE = {
    "model": {"tiny": {}, "projector": {"hidden_features": 16, "num_experts": 4, "top_k": 2}},
    "data": {"root": "corpus"},
    "optimizer": {"steps": 5},
}


def planned(folder, corpus=None, **content):
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "grid.yaml").write_text(yaml.safe_dump({"base": ["base.yaml"]} | content))
    grid, beside = read_grid(folder / "grid.yaml")
    return list(cells(grid, beside, corpus))


def test_axes_are_multiplied_and_impossible_or_equal_cells_left_out(tmp_path):
    found = planned(
        tmp_path, axes={"sharing": ["JEDR", "dense"], "num_experts": [2, 4], "top_k": [1, 4], "seed": [0, 1]}
    )
    sparse = {(c.num_experts, c.top_k) for c in found if c.sharing == "JEDR"}
    assert sparse == {(2, 1), (4, 1), (4, 4)}, "K above E"
    dense = [(c.hidden_features, c.top_k, c.seed) for c in found if c.sharing == "dense"]
    assert sorted(dense) == [(16, 1, 0), (16, 1, 1), (64, 4, 0), (64, 4, 1)], (
        "a dense projector has no E: one for each K"
    )
    assert len({c.name for c in found}) == len(found) == 10


def test_a_cell_is_its_base_with_that_one_point_of_the_grid(tmp_path):
    (cell,) = planned(
        tmp_path,
        corpus=tmp_path / "made",
        set={"optimizer": {"steps": 7}},
        axes={"sharing": ["JEJR"], "num_experts": [3], "top_k": [1], "rates": [[16, 5]], "seed": [5]},
    )
    projector = cell.config.model.projector
    assert (projector.kind, projector.sharing, projector.num_experts, projector.top_k) == ("smop", "JEJR", 3, 1)
    assert (cell.config.model.rate_audio, cell.config.model.rate_video, cell.config.run.seed) == (16, 5, 5)
    assert cell.config.optimizer.steps == 7 and cell.config.data.root == tmp_path / "made"


@pytest.mark.parametrize(("width", "hidden"), [("active", 32), ("expert", 16)])
def test_the_dense_baseline_is_as_wide_as_asked(tmp_path, width, hidden):
    (cell,) = planned(tmp_path, axes={"sharing": ["dense"]}, dense_hidden=width)
    assert cell.config.model.projector.kind == "dense"
    assert cell.config.model.projector.hidden_features == cell.hidden_features == hidden


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"sharing": ["JJ"]}}, "grid.yaml: axes.sharing.0"),
        ({"axes": {"experts": [1]}}, "grid.yaml: unknown key axes.experts"),
        ({"axes": {"forms": {"A form": {}}}}, "axes.forms"),
        ({"axes": {"sharing": ["JEJR"], "forms": {"odd": {"projector": {"expert": 1}}}}}, "form odd"),
        ({"axes": {"sharing": ["JEJR"], "num_experts": [2], "top_k": [3]}}, "no cell"),
        ({"set": {"optimizer": {"step": 3}}}, "unknown key optimizer.step"),
        ({"set": {"data": {"root": None, "shards": "tars"}}}, "score.root is needed"),
        ({"base": ["elsewhere.yaml"]}, "elsewhere.yaml: no such file"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=r".") as error:
        planned(tmp_path, **content)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_forms_are_multiplied_with_the_other_axes_and_leave_dense_alone(tmp_path):
    forms = {
        "as-it-is": {},
        "wide": {"projector": {"hidden_features": 32, "top_k": 4}, "router_z_coef": 0.5},
        "both-rates": {"rates": [[4, 2], [16, 5]], "rate_projectors": "separate"},
    }
    axes = {"sharing": ["dense", "DEDR"], "forms": forms, "rates": [[4, 2], [16, 5]], "seed": [0]}
    found = planned(tmp_path, axes=axes)
    assert [(c.name, c.form) for c in found] == [
        ("dense-h32-r4.2-s0", None),
        ("dense-h32-r16.5-s0", None),
        ("dedr-e4-k2-as-it-is-r4.2-s0", "as-it-is"),
        ("dedr-e4-k2-as-it-is-r16.5-s0", "as-it-is"),
        ("dedr-e4-k2-both-rates-s0", "both-rates"),
        ("dedr-e4-k2-wide-r4.2-s0", "wide"),
        ("dedr-e4-k2-wide-r16.5-s0", "wide"),
    ]
    several, wide = found[4].config.model, found[6].config.model
    assert (wide.projector.hidden_features, wide.projector.top_k, wide.router_z_coef) == (32, 4, 0.5)
    assert (wide.rate_audio, wide.rate_video, wide.projector.sharing) == (16, 5, "DEDR")
    assert several.rates == ((4, 2), (16, 5)) and several.rate_projectors == "separate"
