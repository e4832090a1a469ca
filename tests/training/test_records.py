"""Damaged side records: set aside by name, and the training goes on."""

import json
from pickle import UnpicklingError
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from llama_smop.ablation.cell import ResourceUse
from llama_smop.models import model_folder, seal
from llama_smop.system import files
from llama_smop.training import checkpoints
from llama_smop.training.record import STARTS, last_start, read_starts
from llama_smop.training.setbacks import Setbacks

DAMAGED = ("", "[{", "5", '"text"', "null", "\x00\x00", "[" * 100_000)


@pytest.mark.parametrize("content", (*DAMAGED, "{}", "[5]", "[{}]", '[{"run": "x"}]'), ids=range(11))
def test_a_damaged_record_of_starts_is_set_aside(tmp_path, content, caplog):
    (tmp_path / STARTS).write_text(content)
    assert read_starts(tmp_path) == [] and last_start(tmp_path) is None
    assert str(tmp_path / STARTS) in caplog.text and "damaged-starts.json" in caplog.text
    assert (tmp_path / "damaged-starts.json").read_text() == content and not (tmp_path / STARTS).exists()


@pytest.mark.parametrize("content", (*DAMAGED, "[]", '{"a.mp4": 5}'), ids=range(9))
def test_a_damaged_record_of_bad_clips_is_set_aside(tmp_path, content, caplog):
    record = tmp_path / "bad_clips.json"
    record.write_text(content)
    setbacks = Setbacks(record, 10, 10)
    setbacks.restore(None, fresh=False)
    assert setbacks.bad_clips == {} and str(record) in caplog.text
    setbacks.record_clips({"a.mp4": "torn"})
    assert json.loads(record.read_text()) == {"a.mp4": "torn"}


@pytest.mark.parametrize("content", DAMAGED, ids=range(7))
def test_a_checkpoint_with_a_damaged_seal_is_passed_over(tmp_path, content, caplog):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal.seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / seal.SEAL).write_text(content)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-2"
    assert str(tmp_path / "checkpoint-4" / seal.SEAL) in caplog.text


@pytest.mark.parametrize("content", (*DAMAGED, '{"wall": "x"}'), ids=range(8))
def test_a_cell_counts_its_time_anew_where_the_count_is_damaged(tmp_path, content):
    (tmp_path / "used.json").write_text(content)
    assert ResourceUse(tmp_path).now()["starts"] == 1


@pytest.mark.parametrize(
    "error",
    (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        SafetensorError("I/O error: No space left on device"),
    ),
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_is_full_when_a_checkpoint_is_written_is_one_error(tmp_path, error):
    """Of Python, torch and safetensors; the folder is named."""
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    with (
        pytest.raises(OSError, match=f"{tmp_path}: a checkpoint could not be written"),
        checkpoints.atomic_save(trainer),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    (KeyError("x"), AttributeError("no x"), ImportError("x"), TypeError("x"), UnpicklingError("x"), OverflowError("x")),
    ids=lambda error: type(error).__name__,
)
def test_a_model_that_cannot_be_read_is_named(tmp_path, monkeypatch, error):
    (tmp_path / "config.json").write_text("{}")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(model_folder.LlamaSmopForConditionalGeneration, "from_pretrained", fail)
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read: .*x"):
        model_folder.load(tmp_path)


def test_any_other_json_that_is_damaged_is_named(tmp_path):
    (tmp_path / "asked.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"asked\.json: damaged, no JSON"):
        files.read_json(tmp_path / "asked.json")
