"""The README's "Use the published checkpoint", command by command, on the golden files in place of the authors'."""

import json

import pytest

from llama_smop.cli import main
from llama_smop.data.synthetic.corpus import make_corpus
from tests.golden_files import GOLDEN

FULL = GOLDEN / "full_model"
CONVERT = (
    "convert",
    str(FULL / "state_dict.safetensors"),
    "--language-model",
    str(FULL / "llm_hf"),
    "--audio-tower",
    str(GOLDEN / "whisper/hf_model"),
    "--video-tower",
    str(FULL / "large_tiny_iter5.pt"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    main([*CONVERT, "--to", str(folder)])
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    make_corpus(root, clips=8, seed=0, workers=1)
    return root


def test_convert_accounts_for_every_key(folder, capsys):
    main([*CONVERT, "--to", str(folder)])
    assert "284 renamed, 6 left out, 0 missing, 0 unexpected" in capsys.readouterr().out
    assert len(json.loads((folder / "conversion.json").read_text())["keys"]["renamed"]) == 284


def test_transcribe(folder, corpus, capsys):
    clips = sorted(str(p) for p in corpus.rglob("*.mp4"))[:2]
    main(["transcribe", *clips, "--model", str(folder), "--beams", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines if "\t" in line] == clips


def test_evaluate_gives_a_word_error_rate(folder, corpus, tmp_path, capsys):
    out = tmp_path / "rows.json"
    arguments = ["--labels", "test.csv", "--modality", "audiovisual", "--json", str(out)]
    main(["evaluate", "--model", str(folder), "--root", str(corpus), *arguments])
    assert "| audiovisual |" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())
    assert row["wer"] > 0
    assert row["transcripts"]


def test_a_refusal_ends_in_one_line_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes((FULL / "state_dict.safetensors").read_bytes()[:5000])
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "cut.safetensors"), "--to", str(tmp_path / "model"), *CONVERT[2:]])
    assert "cut.safetensors: truncated or damaged" in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
    assert not (tmp_path / "model").exists()
