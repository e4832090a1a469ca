"""The list of rows: what it names is there, and a test that was left out does not pass for one that ran."""

from pathlib import Path

from tests.gpu_path.__main__ import LONG_ROWS, REPOSITORY, ROWS, skipped

HERE = Path(__file__).parent


def test_rows_name_every_test_file():
    names = [row.name for row in (*ROWS, *LONG_ROWS)]
    assert len(set(names)) == len(names)
    run = {name for row in ROWS if not row.tests.startswith("-") for name in row.tests.split()}
    files = {path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")}
    assert run == files - {"rows"}


def test_what_is_skipped_for_an_unforeseen_reason_is_trouble():
    known = "SKIPPED [2] tests/gpu_path/test_numbers.py:14: the cuda backend does not compute in torch.float32"
    assert skipped(f"...\n{known}\n5 passed, 2 skipped") is None
    assert "no driver" in skipped(f"{known}\nSKIPPED [1] tests/gpu_path/test_streams.py:9: cuda: no driver\n1 skipped")


def test_the_environment_is_told_from_the_makefile():
    for name in ("requirements.txt", "requirements-no-deps.txt"):
        assert f"tests/gpu_path/{name}" in (REPOSITORY / "Makefile").read_text() and (HERE / name).is_file()
