"""Writing: what stood at a target is there still, or was ours to replace."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llama_smop.models import seal
from llama_smop.models.pretrained import merging_into
from llama_smop.system import files
from tests.mounted_writes import a_model

SHM = Path("/dev/shm")
ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def precious(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "labels").mkdir(parents=True)
    (folder / "labels/train.csv").write_text("lrs3,a.mp4,25,,hello\n")
    return folder


@pytest.mark.parametrize(
    "write", (lambda target: files.write_json(target, {}), lambda target: files.write_bytes(target, b""))
)
def test_a_folder_is_never_replaced_by_a_file(precious, write):
    before = tree(precious)
    with pytest.raises(IsADirectoryError, match=f"{precious}: is a folder"):
        write(precious)
    assert tree(precious) == before and os.listdir(precious.parent) == ["corpus"]


def test_a_folder_of_others_is_never_replaced_by_a_model(precious):
    before = tree(precious)
    with pytest.raises(FileExistsError, match=f"{precious}: is not empty"):
        a_model(precious)
    assert tree(precious) == before and os.listdir(precious.parent) == ["corpus"]


@pytest.mark.parametrize("content", ("", "[]", '{"config.json": 5}', "{", "[" * 100_000), ids=range(5))
def test_a_seal_that_cannot_be_read_is_no_leave_to_replace(precious, content, caplog):
    (precious / seal.SEAL).write_text(content)
    with pytest.raises(FileExistsError):
        a_model(precious)
    assert not seal.is_whole(precious) and str(precious / seal.SEAL) in caplog.text


def test_a_checkpoint_of_a_training_is_not_replaced(tmp_path):
    folder = a_model(tmp_path / "checkpoint-4")
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is a checkpoint of a training"):
        a_model(folder)


def test_of_a_model_that_is_replaced_files_of_others_stay(tmp_path):
    folder = a_model(tmp_path / "model", "old")
    (folder / "notes.txt").write_text("mine")
    (folder / "scores").mkdir()
    (folder / "scores/test.json").write_text("{}")
    os.symlink("notes.txt", folder / "link")
    a_model(folder)
    assert {"notes.txt", "scores/test.json", "config.json", "tower/weights", "link"} < set(tree(folder))
    assert (folder / "config.json").read_text() == "new" and os.readlink(folder / "link") == "notes.txt"
    assert seal.is_whole(folder) and os.listdir(tmp_path) == ["model"]


def test_a_seal_does_not_reach_out_of_its_folder(tmp_path):
    folder = a_model(tmp_path / "model")
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    files.write_json(folder / seal.SEAL, {"../outside.txt": "0", str(outside): "0", "config.json": "0"})
    os.symlink(folder, tmp_path / "link")
    a_model(tmp_path / "link")
    assert outside.read_text() == "mine"


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        a_model(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    folder = a_model(tmp_path / "model", "old")
    before = tree(folder)

    def full(aside: Path) -> None:
        (aside / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"{folder}: could not be saved .No space left"):
        seal.write_sealed(folder, full)
    assert tree(folder) == before and os.listdir(tmp_path) == ["model"]


def test_a_full_disk_is_the_same_error_whoever_meets_it(tmp_path):
    """safetensors writes in Rust, and has an error of its own."""

    def full(aside: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=f"{tmp_path / 'model'}: could not be saved .*No space left"):
        seal.write_sealed(tmp_path / "model", full)
    assert not os.listdir(tmp_path)


def test_saving_into_a_sealed_folder_renews_its_seal(tmp_path):
    """What transformers' `save_pretrained` does to a folder that a training wrote."""
    folder = a_model(tmp_path / "model", "old")
    (folder / "tower/weights").unlink()
    with merging_into(folder) as aside:
        (aside / "config.json").write_text("new")
        (aside / "weights-2").write_text("new")
    assert seal.is_whole(folder) and set(files.read_json(folder / seal.SEAL)) == {"config.json", "weights-2"}


@pytest.mark.parametrize("way", ("same disk", "other disk"))
def test_through_a_link_its_end_is_written(tmp_path, way):
    with tempfile.TemporaryDirectory(dir=SHM if way == "other disk" else tmp_path) as far:
        os.symlink(far, tmp_path / "link")
        for text in ("old", "new"):
            a_model(tmp_path / "link", text)
        assert (Path(far) / "config.json").read_text() == "new" and seal.is_whole(Path(far))
        (Path(far) / "scores.json").write_text("old")
        os.symlink(Path(far) / "scores.json", tmp_path / "scores.json")
        files.write_json(tmp_path / "scores.json", [1])
        assert files.read_json(Path(far) / "scores.json") == [1] and (tmp_path / "scores.json").is_symlink()
        assert sorted(os.listdir(far)) == ["config.json", "scores.json", seal.SEAL, "tower"]


def test_where_a_folder_cannot_be_renamed_its_files_are_moved(tmp_path, monkeypatch):
    """A mount point; what is no longer written goes, what was never ours stays."""
    folder = a_model(tmp_path / "model", "old")
    (folder / "notes.txt").write_text("mine")
    moves, replace = [], os.replace

    def mounted(source, target):
        if Path(source) == folder or Path(target) == folder:
            raise OSError(16, "Device or resource busy")
        moves.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", mounted)
    seal.write_sealed(folder, lambda aside: (aside / "config.json").write_text("new"))
    assert tree(folder).keys() == {"config.json", "notes.txt", seal.SEAL} and seal.is_whole(folder)
    assert moves[1:3] == [seal.SEAL, "config.json"], "the seal first, so that a half-moved model is not taken for whole"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_mount_point_is_written(tmp_path):
    """As `docker run -v ...:/out` has it: another disk, the same one, and a file by itself."""
    for name in ("model", "bound", "source"):
        (tmp_path / name).mkdir()
    for name in ("file.json", "source.json"):
        (tmp_path / name).write_text("{}")
    mounts = "mount -t tmpfs none model && mount --bind source bound && mount --bind source.json file.json || exit 77"
    command = f"{mounts}; mkdir model/lost+found; exec {sys.executable} -m tests.mounted_writes"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounting here")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["bound", "file.json", "model", "source", "source.json"]


@pytest.mark.skipif(os.getuid() != 0, reason="becoming somebody else needs root")
def test_an_own_folder_in_somebody_elses(tmp_path):
    with tempfile.TemporaryDirectory(dir=SHM) as parent:
        os.chmod(parent, 0o755)
        own = Path(parent) / "own"
        own.mkdir()
        os.chown(own, 65534, 65534)
        child = os.fork()
        if not child:
            os.setgid(65534)
            os.setuid(65534)
            try:
                for text in ("old", "new"):
                    a_model(own, text)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert seal.is_whole(own) and (own / "config.json").read_text() == "new"
        assert set(os.listdir(own)) == {"config.json", "tower", seal.SEAL} and os.listdir(parent) == ["own"]


def test_a_device_is_written_and_stays_one(tmp_path):
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full")
    files.write_json("/dev/null", {})
    assert not Path("/dev/null").is_file() and not list(Path("/dev").glob(".null*"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.write_json("/dev/full", {})


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_a_pipe_and_a_removed_file_are_written_by_the_name_of_their_descriptor(tmp_path):
    """`--srt /dev/stdout | less` and `--json >(jq .)`: their links name no file."""
    end, start = os.pipe()
    files.write_text(f"/dev/fd/{start}", "a line\n")
    assert os.read(end, 100) == b"a line\n"
    with open(tmp_path / "gone", "w+") as gone:
        os.remove(tmp_path / "gone")
        files.write_text(f"/dev/fd/{gone.fileno()}", "a line\n")
        assert gone.read() == "a line\n"
    assert not os.listdir(tmp_path)
    os.close(end), os.close(start)


def test_what_a_killed_write_moved_away_is_put_back(tmp_path):
    folder = a_model(tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder, tmp_path / ".model.writing-123456")
    folder.rename(tmp_path / ".model.old-123456")
    files.discard_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["model"] and (folder / "notes.txt").read_text() == "mine"


def test_a_claimed_folder_admits_the_same_settings_again_and_no_others(tmp_path):
    note = tmp_path / "new/settings.json"
    files.claim(note, {"clips": 5, "seed": 0}, "corpus")
    files.claim(note, {"clips": 5, "seed": 0}, "corpus")
    with pytest.raises(ValueError, match=r"holds a corpus with other settings \(seed\)"):
        files.claim(note, {"clips": 5, "seed": 1}, "corpus")
    assert files.read_json(note) == {"clips": 5, "seed": 0}, "a refused claim changed the note"


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(ValueError, match="is not empty and holds no corpus"):
        files.claim(tmp_path / "settings.json", {}, "corpus")
    assert os.listdir(tmp_path) == ["lock"]
    files.claim(tmp_path / "settings.json", {}, "corpus", ignored={"lock"})


def test_a_note_of_an_earlier_version_is_upgraded_before_it_is_compared(tmp_path):
    note = tmp_path / "settings.json"
    files.write_json(note, {"clips": 5})
    files.claim(note, {"clips": 5, "seed": 0}, "corpus", upgrade=lambda noted: {"seed": 0} | noted)
    with pytest.raises(ValueError, match="seed"):
        files.claim(note, {"clips": 5, "seed": 1}, "corpus", upgrade=lambda noted: {"seed": 0} | noted)
