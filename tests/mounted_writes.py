"""Writes into mount points of the working directory; a process of its own, without what the tests import."""

from pathlib import Path

from llama_smop.models import seal
from llama_smop.system import files


def a_model(folder: Path, text: str = "new") -> Path:
    """What this package writes, as far as files are concerned."""

    def write(aside: Path) -> None:
        (aside / "config.json").write_text(text)
        (aside / "tower").mkdir()
        (aside / "tower/weights").write_text(text)

    return seal.write_sealed(folder, write)


if __name__ == "__main__":
    for folder in (Path("model"), Path("bound")):
        for text in ("old", "new"):
            a_model(folder, text)
        assert seal.is_whole(folder) and (folder / "config.json").read_text() == "new", folder
        assert not list(folder.glob(".*")), folder
    files.write_json("file.json", [1])
    assert files.read_json("source.json") == [1]
