"""The report from JSON: what it says must be what was measured, and generating it twice changes nothing."""

from dataclasses import replace

import pytest

from benchmarks import report, results
from benchmarks.report import performance, readings, tables
from benchmarks.workloads import Workload


def timing(w: Workload, rival: str, which: str, median: float, noise: float = 0.02) -> dict:
    return {
        "workload": w.key, "rival": rival, "mode": "eager", "pass": which, "median_us": median, "q1_us": 0.98 * median,
        "q3_us": 1.04 * median, "runs": 20, "noise": noise, "tokens_per_s": round(w.tokens / median * 1e6),
        "tflops": 0.1, "floor_us": 10000.0, "share_of_floor": 10000.0 / median,
    }  # fmt: skip


@pytest.fixture
def measured() -> dict:
    """Two token counts and one variation; the eager loop is 1.5 times slower, grouped_mm within the noise of ours."""
    found = results.new("cpu")
    found["environment"] = {"device": "Test CPU", "cores": 2, "versions": {"torch": "2.x"}, "date": "2026-01-02",
                            "commit": "0123456789abcdef", "modified": False, "load_average": 0.1}  # fmt: skip
    found["ceilings"] = {"copy_gb_per_s": 20.0, "tflops": {"float32": 0.1}}
    base = Workload(64, "float32")
    for w in (base, replace(base, tokens=512), replace(base, tokens=150, sharing="DEDR")):
        ours = 20000.0 * w.tokens / 64
        for which in ("forward", "both"):
            found["timings"] += [
                timing(w, "ours_torch", which, ours),
                timing(w, "eager", which, 1.5 * ours),
                timing(w, "grouped_mm", which, 1.015 * ours),
                timing(w, "dense_KH", which, 0.8 * ours),
            ]
        memory = {"workload": w.key, "rival": "ours_torch", "kept_bytes": 1_500_000, "peak_bytes": None}
        results.add(found, {"memory": [memory]}, w)
    found["skipped"] = [{"workload": base.key, "rival": "liger", "reason": "the package liger_kernel is not installed"}]
    return found


def row(table: tables.Table, start: str) -> list[str]:
    return next(r for r in table.rows if r[0].startswith(start))


def test_cells_hold_the_medians_the_spread_and_the_ratio(measured):
    table = tables.over_tokens(measured, Workload(1, "float32"), "both")
    assert table.header == ["", "T 64", "T 512"]
    assert row(table, "ours")[1] == "**20.0 ± 0.60**"
    assert row(table, "eager")[1:] == ["30.0 ± 0.90 (1.50×)", "240 ± 7.20 (1.50×)"]
    assert row(table, "roofline")[1] == "10.0"


def test_a_difference_below_the_noise_is_a_tie(measured):
    table = tables.over_tokens(measured, Workload(1, "float32"), "both")
    assert row(table, "torch grouped_mm")[1] == "20.3 ± 0.61 (tie)"
    assert row(table, "dense")[1].endswith("(0.80×)"), "a faster rival is shown as faster"


def test_a_workload_outside_every_series_has_its_row(measured):
    table = tables.single_workloads(measured)
    assert [r[0] for r in table.rows] == ["T 150, DEDR, float32"] and table.rows[0][1].startswith("**46.9")


def test_what_was_not_timed_says_why(measured):
    assert row(tables.skipped(measured), "Liger")[1] == "the package liger_kernel is not installed"


def test_a_run_on_local_changes_says_so(measured):
    assert "at commit 0123456789;" in tables.conditions(measured)
    measured["environment"]["modified"] = True
    assert "with local changes" in tables.conditions(measured)


def test_the_report_writes_page_pictures_and_readme(measured, tmp_path):
    folder = tmp_path / "results"
    results.save(measured, folder / "cpu-test.json")
    front = tmp_path / "README.md"
    front.write_text(f"# Title\n{performance.BEGIN}\nSTALE\n{performance.END}\nAfter.\n")
    report.run(folder, front, say=lambda line: None)
    page = (folder / "index.html").read_text()
    pictures = sorted(p.name for p in folder.glob("*.png"))
    assert pictures == ["cpu-test-dense-float32.png", "cpu-test-memory-float32.png", "cpu-test-throughput-float32.png"]
    assert all(f"src='{name}'" in page for name in pictures) and "Test CPU, 2 cores" in page
    text = front.read_text()
    assert text.startswith("# Title\n") and text.endswith("After.\n") and "STALE" not in text
    assert "30.0 ± 0.90 (1.50×)" in text and "](results/cpu-test-throughput-float32.png)" in text
    report.run(folder, front, say=lambda line: None)
    assert front.read_text() == text, "generating twice must change nothing"


def test_every_row_of_a_table_has_a_cell_under_each_heading():
    with pytest.raises(ValueError, match="a row of 3 cells under 2 headings"):
        tables.Table("", ["tokens", "µs"], [["64", "10"], ["256", "12", "13"]])


def test_a_readme_without_markers_is_left_alone(tmp_path):
    front = tmp_path / "README.md"
    front.write_text("# Title\n")
    assert not performance.update(front, "numbers") and front.read_text() == "# Title\n"


def test_no_results_and_another_schema_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmarks cpu"):
        report.run(tmp_path, None, say=lambda line: None)
    (tmp_path / "x.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        results.load(tmp_path / "x.json")


def test_saved_results_load_as_they_were(measured, tmp_path):
    results.save(measured, tmp_path / "a.json")
    assert results.load(tmp_path / "a.json") == measured and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_committed_results_can_be_reported(path):
    """Every table of every committed file can be made, and a file without our timings says whose they are."""
    found = results.load(path)
    assert tables.all_tables(found) and tables.heading(found)
    if not any(readings.is_ours(t["rival"]) for t in found["timings"]):
        assert found["kind"] == "data" or (found["kind"] == "peers" and "not yet run" in found["note"])


def test_the_cpu_suite_runs_and_reports(tmp_path):
    from benchmarks import cpu

    path = tmp_path / "cpu.json"
    cpu.run(path, quick=True, model=False, say=lambda line: None)
    found = results.load(path)
    assert {"ours_torch", "eager", "grouped_mm", "dense_all", "dense_KH"} <= {t["rival"] for t in found["timings"]}
    assert not [s for s in found["skipped"] if "off by" in s["reason"]]
    assert tables.document([found]).count("|") > 100


def test_the_data_suite_runs_and_reports(tmp_path):
    from benchmarks import data

    pytest.importorskip("webdataset")
    data.run(tmp_path / "data.json", quick=True, say=lambda line: None)
    found = results.load(tmp_path / "data.json")
    decoder, transformed, decoded, complete = found["data"]
    assert decoder["share_of_decoder"] == transformed["share_of_decoder_and_transforms"] == 1
    assert 0 < complete["share_of_decoder"] < 1 and decoded["clips_per_s"] > complete["clips_per_s"]
    assert [row[0] for row in tables.data(found).rows][-1] == "from shards, a training's batches"
    report.run(tmp_path, None, say=lambda line: None)
    assert "of the decoder" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("suite", ("cpu", "data"))
def test_a_quick_run_must_not_overwrite_the_devices_results(capsys, suite):
    from benchmarks.__main__ import main

    assert main([suite, "--quick"]) == 2
    assert "--out" in capsys.readouterr().err
