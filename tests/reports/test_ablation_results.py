"""Differences against their spread, the table and the pictures, on made-up numbers."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from llama_smop.cli import main
from llama_smop.reports.ablation.page import page, table, write_page
from llama_smop.reports.ablation.plots import pictures
from llama_smop.reports.ablation.results import Setting, differences, paired


@pytest.fixture(autouse=True)
def closed_pictures():
    yield
    plt.close("all")


def cell(sharing, seed, wer, experts=4, top_k=2, snrs=(None, 0), noises=("babble",)):
    dense = sharing == "dense"
    rows = [
        {
            "modality": m,
            "snr": snr,
            "noise": None if snr is None else noise,
            "wer": wer + (0.1 if snr is not None else 0),
        }
        for number, noise in enumerate(noises)
        for m in ("audio", "video", "audiovisual")
        for snr in snrs
        if (m != "video" or snr is None) and (number == 0 or snr is not None)
    ]
    total = 2 * experts if sharing == "DEDR" else experts
    own = {"audio": list(range(experts)), "video": list(range(total - experts, total))}
    shares = {m: [1 / experts if e in own[m] else 0 for e in range(total)] for m in own}
    return {
        "name": f"{sharing}-{experts}-{top_k}-{seed}",
        "sharing": sharing,
        "num_experts": None if dense else experts,
        "top_k": None if dense else top_k,
        "rate_audio": 4,
        "rate_video": 2,
        "hidden_features": 32 if dense else 16,
        "seed": seed,
        "steps": 10,
        "projector_parameters": 1000,
        "rows": rows,
        "expert_activation": None if dense else {"sharing": sharing, "shares": shares, "experts_of": own},
        "router_entropy": [] if dense else [{"step": 5, "audio": 1.3}, {"step": 10, "audio": 1.2, "video": 1.1}],
        "seconds": {"all": {"wall": 60.0, "cpu": 30.0}},
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:10:00+00:00",
    }


def results(cells) -> dict:
    return {
        "synthetic": True,
        "corpus": {"clips": 16, "seed": 0, "counts": {"train": {"clips": 12}, "test": {"clips": 2}}},
        "guess": 0.8,
        "grid": {"base": ["demo"], "note": "", "score": {"labels": "test.csv"}, "dense_hidden": "active"},
        "config": {"model": {"tiny": {}, "projector": {"hidden_features": 16}}},
        "machine": {"device": "CPU", "cores": 2, "jobs": 2, "threads": 1, "versions": {"torch": "2"}},
        "cells": list(cells),
    }


def test_the_interval_is_students():
    mean, half_width, p = paired([1.0, 2.0, 3.0])
    assert mean == 2
    assert half_width == pytest.approx(4.30265 / 3**0.5, rel=1e-4), "t(0.975, 2) · 1 / √3"
    assert p == pytest.approx(0.07418, rel=1e-3)
    assert paired([0.5, 0.5]) == (0.5, 0, 0) and paired([0.0, 0.0]) == (0, 0, 1)
    with pytest.raises(ValueError, match="at least two seeds"):
        paired([1.0])


def test_differences_are_paired_over_seeds():
    """Seeds that move both settings alike leave the difference clear; the same numbers in another order hide it."""
    noise = (0.0, 0.2, 0.4)
    steady = [cell("JEJR", s, 0.30 + noise[s] + 0.001 * s) for s in range(3)]
    steady += [cell("DEDR", s, 0.25 + noise[s]) for s in range(3)]
    for d in differences(results(steady)):
        assert (d.a, d.b, d.seeds) == ("JEJR", "DEDR", 3)
        assert d.mean == pytest.approx(0.051) and d.exceeds, d.modality
    shuffled = [cell("JEJR", s, 0.30 + noise[s]) for s in range(3)]
    shuffled += [cell("DEDR", s, 0.25 + noise[(s + 1) % 3]) for s in range(3)]
    assert not any(d.exceeds or d.holm for d in differences(results(shuffled)))


def test_holms_correction_asks_more_of_more_comparisons():
    """p = 0.03 alone is significant; beside three others it is not."""

    def one(sharing, values):
        return [cell(sharing, s, v, snrs=(None,)) for s, v in enumerate(values)]

    found = differences(results(one("JEJR", (0.30, 0.31, 0.325)) + one("JEDR", (0.2, 0.2, 0.2))))
    assert all(d.exceeds and d.holm for d in found), "equal in all three modalities, p about 0.005"
    found = differences(results(one("JEJR", (0.23, 0.24, 0.255)) + one("JEDR", (0.2, 0.2, 0.2))))
    assert all(0.0167 < d.p < 0.05 and d.exceeds and not d.holm for d in found)


def test_only_settings_that_differ_in_one_thing_are_compared():
    cells = [cell(s, seed, 0.3, E, K) for s in ("JEJR", "DEDR") for E in (2, 4) for K in (1, 2) for seed in (0, 1)]
    audio = [d for d in differences(results(cells)) if d.modality == "audio"]
    assert len(audio) == 12, "a cube's edges"
    assert ("JEJR, E 2, K 1", "DEDR, E 2, K 1") in {(d.a, d.b) for d in audio}


def formed(form, seed, wer, rates=None, rate=(4, 2)):
    """A sparse cell of a form; `rates`: scored at each of them, at the second with a tenth more of the words wrong."""
    made = cell("DEDR", seed, wer) | {"form": form, "rate_audio": rate[0], "rate_video": rate[1]}
    if rates is None:
        return made
    rows = [
        row | {"rate": at, "wer": row["wer"] + 0.1 * number} for number, at in enumerate(rates) for row in made["rows"]
    ]
    return made | {"rows": rows}


def with_forms(cells, **forms):
    made = results(cells)
    made["grid"]["axes"] = {"forms": forms}
    return made


def test_forms_are_compared_with_the_first_alone():
    cells = [cell("dense", seed, 0.5) for seed in range(2)]
    cells += [formed(form, seed, 0.3) for form in ("paper", "gated", "shared") for seed in range(2)]
    made = with_forms(cells, paper={}, gated={"projector": {"gated": True}}, shared={"projector": {"top_k": 1}})
    compared = {(d.a, d.b) for d in differences(made) if d.modality == "audio"}
    assert compared == {("dense", "paper"), ("paper", "gated"), ("paper", "shared")}
    text = page(made, list(pictures(made)))
    assert "| gated | `{projector: {gated: true}}` |" in text and "of forms, the first and another" in text
    assert "| paper | nothing: the base" in text and "Word error rate against SNR by form" in text
    labels = [tick.get_text() for tick in pictures(made)["wer_forms.png"].axes[0].get_yticklabels()]
    assert labels == ["dense", "paper", "gated", "shared"]


def test_a_model_for_several_rates_has_a_line_for_each():
    cells = [formed("one-rate", seed, 0.3, rate=rate) for rate in ((4, 2), (16, 5)) for seed in range(2)]
    cells += [formed("both", seed, 0.4, ("4,2", "16,5")) for seed in range(2)]
    made = with_forms(cells, **{"one-rate": {}, "both": {"rates": [[4, 2], [16, 5]]}})
    lines = [line for line in table(made).splitlines() if "| audio |" in line]
    assert [line.split("|")[1].strip() for line in lines] == [
        f"{form}, rates {rate}" for form in ("one-rate", "both") for rate in ((4, 2), (16, 5))
    ]
    assert "| 50.0 ± 0.0 |" in lines[3], "the second rate's rows are not its own"
    compared = {(d.a, d.b): round(d.mean, 3) for d in differences(made) if d.modality == "audio"}
    assert compared == {
        ("one-rate, rates (4, 2)", "one-rate, rates (16, 5)"): 0,
        ("one-rate, rates (4, 2)", "both, rates (4, 2)"): -0.1,
        ("one-rate, rates (16, 5)", "both, rates (16, 5)"): -0.2,
        ("both, rates (4, 2)", "both, rates (16, 5)"): -0.1,
    }
    drawn = pictures(made)["wer_rates.png"].axes[0]
    assert [len(line[0].get_xdata()) for line in drawn.containers] == [2, 2]


def test_one_seed_says_nothing_about_the_spread():
    one = results([cell("JEJR", 0, 0.3), cell("DEDR", 0, 0.1)])
    assert differences(one) == [] and "Nothing can be said" in page(one)


def test_the_table_has_a_line_for_each_setting_and_input():
    text = table(results([cell("JEJR", 0, 0.30), cell("JEJR", 1, 0.32), cell("dense", 0, 0.4)]))
    lines = text.splitlines()
    assert lines[0].endswith("| clean | 0 dB | mean |") and len(lines) == 2 + 6
    (audio,) = [line for line in lines if line.startswith("| JEJR") and "| audio |" in line]
    assert "| 2 | audio | 31.0 ± 1.4 | 41.0 ± 1.4 | 36.0 ± 1.4 |" in audio
    (video,) = [line for line in lines if line.startswith("| dense") and "| video |" in line]
    assert "| 1 | video | 40.0 |  | 40.0 |" in video, "lips have no SNR"


def test_kinds_of_noise_have_columns_and_rows_of_their_own():
    made = results([cell(s, 0, 0.3, noises=("babble", "sounds/engine.wav")) for s in ("JEJR", "dense")])
    assert "| clean | 0 dB babble | 0 dB engine | mean |" in table(made).splitlines()[0]
    assert len(pictures(made)["wer_snr.png"].axes) == 6


def test_lips_are_clean_where_no_clean_sound_was_scored():
    made = results([cell(s, 0, 0.3) for s in ("JEJR", "dense")])
    for record in made["cells"]:
        record["rows"] = [r for r in record["rows"] if r["snr"] is not None or r["modality"] == "video"]
    audio = pictures(made)["wer_snr.png"].axes[0]
    assert [len(line[0].get_xdata()) for line in audio.containers] == [1, 1], "one point: 0 dB"


def test_a_line_for_everything_that_is_not_on_the_axis():
    """Sharing × K over E; and over the rates, dense projectors of two widths."""
    cells = [cell("JEJR", 0, 0.3, E, K) for E in (2, 4) for K in (1, 2)]
    cells += [cell("dense", 0, 0.3) | {"hidden_features": h, "rate_audio": r} for h in (16, 32) for r in (4, 16)]
    cells += [cell("JEJR", 0, 0.3, 4, 2) | {"rate_audio": 16}]

    def lines(name):
        return [container.get_label() for container in drawn[name].axes[0].containers]

    drawn = pictures(results(cells))
    assert lines("wer_num_experts.png") == [
        "JEJR, K 1, rates (4, 2)",
        "JEJR, K 2, rates (4, 2)",
        "JEJR, K 2, rates (16, 2)",
    ]
    assert {"dense, hidden 16", "dense, hidden 32"} <= set(lines("wer_rates.png"))


def test_pictures_show_what_varies(tmp_path):
    cells = [cell(s, seed, 0.3, E) for s in ("JEJR", "DEDR", "dense") for E in (2, 4) for seed in (0, 1)]
    (tmp_path / "results.json").write_text(json.dumps(results(cells)))
    main(["report", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"wer_snr.png", "wer_num_experts.png", "expert_activation.png", "router_entropy.png"}
    assert all(f"({name})" in text for name in drawn)


def test_the_page_says_synthetic_first_and_names_what_failed():
    failed = {k: v for k, v in cell("JEDR", 0, 0).items() if k in ("name", "sharing", "seed", "hidden_features")}
    text = page(results([cell("JEJR", 0, 0.3), failed | {"failed": "ValueError: no such clip"}]))
    assert text.startswith("# Ablation on synthetic data")
    assert "**JEDR-4-2-0 failed**: ValueError: no such clip" in text


def test_nothing_finished_is_still_a_page():
    failed = {k: v for k, v in cell("JEDR", 0, 0).items() if k in ("name", "sharing", "seed", "hidden_features")}
    assert "failed" in page(results([failed | {"failed": "x"}])) and pictures(results([])) == {}


def test_a_page_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        write_page(tmp_path)


@pytest.mark.parametrize("content", ("{}", "[]", '{"cells": [{}]}', "5", "{"))
def test_results_that_are_none_are_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/results\.json: (cannot be shown|damaged)"):
        write_page(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_dense_projector_is_compared_with_the_k_that_its_width_stands_for():
    k1, k4 = (Setting("JEDR", 4, K, (4, 2), None) for K in (1, 4))
    narrow, wide = (Setting("dense", None, K, (4, 2), 16 * K) for K in (1, 4))
    assert (narrow.differs_in(k1), wide.differs_in(k4)) == (1, 1)
    assert (narrow.differs_in(k4), wide.differs_in(k1)) == (2, 2)
    assert narrow.differs_in(wide) == 1, "its width, and nothing else"
    assert narrow.label([k1, k4, narrow, wide]) == "dense, hidden 16"


def test_a_label_says_what_varies_and_nothing_else():
    a = Setting("JEJR", 4, 2, (4, 2), None)
    dense = Setting("dense", None, None, (4, 2), 64)
    assert [s.label([a, dense]) for s in (a, dense)] == ["JEJR", "dense"]
    other = Setting("JEJR", 4, 2, (16, 5), None)
    assert other.label([a, other]) == "JEJR, rates (16, 5)"


def test_the_committed_page_is_what_its_results_give():
    folder = Path(__file__).parents[2] / "docs/ablation"
    kept = json.loads((folder / "results.json").read_text())
    assert len(kept["cells"]) == 12 and not any("failed" in cell for cell in kept["cells"])
    drawn = re.findall(r"^!\[.*\]\((.*)\)$", (folder / "README.md").read_text(), re.M)
    assert (folder / "README.md").read_text() == page(kept, drawn), "run `llama-smop report docs/ablation`"
    assert {path.name for path in folder.glob("*.png")} == set(drawn)
