"""Two processes in one folder: the second is told who the first is; one that has died holds nothing."""

import os
import time
from pathlib import Path

import pytest

from llama_smop.system.lock import LOCK, folder_lock
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train
from tests.training import children


def hold(folder: Path, with_child: bool) -> None:
    with folder_lock(folder, "another training"):
        if with_child and not os.fork():  # a data worker
            time.sleep(60)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(60)


@pytest.mark.parametrize("with_child", (False, True))
def test_the_second_is_refused_until_the_first_has_ended_or_died(tmp_path, with_child):
    folder = tmp_path / "run"
    child = children.start(hold, folder, with_child)
    while not (folder / "held").exists():
        time.sleep(0.02)
    with (
        pytest.raises(
            ValueError, match=f"{folder}: another training is running in this folder, process {child.pid} on"
        ),
        folder_lock(folder, "another training"),
    ):
        pass
    assert str(child.pid) in (folder / LOCK).read_text(), "who was refused has not written its own name there"
    child.kill()
    child.join()
    with folder_lock(folder, "another training"):
        assert (folder / LOCK).read_text().split()[:2] == ["process", str(os.getpid())]
    with folder_lock(folder, "another training"):
        pass


def test_a_training_asks_for_the_lock_before_it_reads_anything(tmp_path):
    folder = tmp_path / "run"
    child = children.start(hold, folder, False)
    while not (folder / "held").exists():
        time.sleep(0.02)
    asked = {"model": {"tiny": {}}, "data": {"root": "nowhere"}, "optimizer": {"steps": 1, "precision": "fp32"}}
    with pytest.raises(ValueError, match="another training is running in this folder"):
        train(TrainConfig.model_validate(asked), folder)
    child.kill()
    child.join()
    with pytest.raises(ValueError, match="nowhere"):
        train(TrainConfig.model_validate(asked), folder)
